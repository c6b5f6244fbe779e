"""The second data set: images with a line of English each, known ones and held-out ones, and views of them on the device.

Sources: `debian` (the package tuxpaint-stamps-default, fetched by apt-get; GPL-2, not redistributed here), a folder, or a file
that `pack_images` wrote. A folder has, anywhere below it, PNG images, each next to a text file of the same name whose first
line is the caption, as Tux Paint's stamps are (further lines are translations); a line `nomirror` in a .dat file next to it
says that a mirror image would be wrong. An image is put on white and fitted into 96 x 96 pixels.

Images that share a caption, whatever its case, are known or held out together, so no held-out caption was trained on.

Legend: P images, C distinct captions, R samples, B batch.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.accuracy.pair import open_tokenizer
from benchmarks.accuracy.photos import from_webp, to_webp
from benchmarks.accuracy.scenes import CANVAS, Album, Asked

__all__ = [
    "PROMPT",
    "CaptionSamples",
    "CaptionedImages",
    "Easel",
    "caption_of",
    "draw",
    "load_images",
    "pack_images",
    "split",
]

PROMPT = "Describe the picture."
PACKAGE, STAMPS = "tuxpaint-stamps-default", Path("usr/share/tuxpaint/stamps")
LONGEST = 24  # tokens of a caption
SPLIT_SEED = 20260123
KNOWN = 0.8  # share of the distinct captions that are trained on
KINDS = 7  # folders with a column of their own in the table: the largest
LARGEST_SHIFT, VIEW_SHIFT = 6, 14  # pixels: in training, in a view
CONTRAST, BRIGHTNESS = (0.6, 1.4), (-0.3, 0.3)  # of a view
PATCH = 32  # side of a view's grey square, pixels
TRANSLATION = re.compile(r"[A-Za-z_@.-]+\.utf8=")


@dataclass(frozen=True)
class CaptionedImages:
    """Images in the order of their paths. folders: the first folder of each path. told: the source, and what was left out."""

    pixels: np.ndarray  # uint8 [P, 96, 96, 3]
    captions: list[str]
    folders: list[str]
    mirrored: list[bool]  # whether a mirror image is an image of the same
    told: str

    @cached_property
    def texts(self) -> list[str]:
        """The distinct captions, [C]."""
        return sorted(set(self.captions))

    @cached_property
    def answer(self) -> np.ndarray:
        """Which of `texts` each image has, int64 [P]."""
        return np.unique(self.captions, return_inverse=True)[1]

    @cached_property
    def kinds(self) -> list[str]:
        """Names of the largest folders; the others go together."""
        return [*(name for name, _ in Counter(self.folders).most_common(KINDS)), "other"]

    @cached_property
    def kind(self) -> np.ndarray:
        """Which of `kinds` each image is, int64 [P]."""
        return np.array([self.kinds.index(name if name in self.kinds else "other") for name in self.folders])


def load_images(source: str) -> CaptionedImages:
    """Load the images at `source`.

    Raises:
        ValueError: nothing of the kind there.
    """
    path = Path(source)
    if path.is_file():
        return _unpack(path)
    if path.is_dir():
        return _folder(path, path.name)
    if source != "debian":
        raise ValueError(f"no pictures at {source!r}: give 'debian', a folder or a packed file")
    return _debian()


def pack_images(images: CaptionedImages, file: Path) -> None:
    """Write images and captions into one file, without loss."""
    entries = asdict(images)
    strips = to_webp(entries.pop("pixels"))
    said = np.frombuffer(json.dumps(entries).encode(), np.uint8)
    np.savez(file, said=said, **{f"pixels_{number}": strip for number, strip in enumerate(strips)})


def _unpack(file: Path) -> CaptionedImages:
    with np.load(file) as stored:
        said = json.loads(stored["said"].tobytes())
        strips = [stored[f"pixels_{number}"] for number in range(len(stored.files) - 1)]
    return CaptionedImages(from_webp(strips, len(said["captions"])), **said)


def _debian() -> CaptionedImages:
    with tempfile.TemporaryDirectory() as made:
        fetch = ["apt-get", "download", PACKAGE]
        if subprocess.run(fetch, cwd=made, capture_output=True).returncode:  # the lists may be old, or not there yet
            subprocess.run(["apt-get", "update"], check=True, capture_output=True)
            subprocess.run(fetch, cwd=made, check=True, capture_output=True)
        (file,) = Path(made).glob("*.deb")
        subprocess.run(["dpkg", "-x", file.name, "files"], cwd=made, check=True)
        return _folder(Path(made) / "files" / STAMPS, file.stem)


def _folder(folder: Path, name: str) -> CaptionedImages:
    tokenizer, left, found = open_tokenizer(), Counter[str](), []
    for file in sorted(folder.rglob("*.txt")):
        if not file.with_suffix(".png").is_file():
            left["without a PNG"] += 1
    for file in sorted(folder.rglob("*.png")):
        text, data = file.with_suffix(".txt"), file.with_suffix(".dat")
        caption = caption_of(text.read_text("utf-8", "replace")) if text.is_file() else ""
        if not caption:
            left["without a caption"] += 1
        elif len(tokenizer.encode(caption).ids) > LONGEST:
            left[f"with a caption of more than {LONGEST} tokens"] += 1
        elif (pixels := _fitted(file)).min() == 255:
            left["white all over"] += 1
        else:
            parts = file.relative_to(folder).parts
            mirrored = not (data.is_file() and "nomirror" in data.read_text("utf-8", "replace").split())
            found.append((pixels, caption, parts[0] if len(parts) > 1 else "", mirrored))
    if not found:
        raise ValueError(f"no pictures with captions in {folder}")
    fitted, *others = map(list, zip(*found))
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(left.items())) or "none"
    return CaptionedImages(np.stack(fitted), *others, told=f"{len(found)} pictures of {name}; left out: {counted}")


def caption_of(text: str) -> str:
    """The caption of a text file: its first line, spaces made single; nothing where that is a translation already."""
    line = " ".join(text.partition("\n")[0].removeprefix("\ufeff").split())
    return "" if TRANSLATION.match(line) else line


def _fitted(file: Path) -> np.ndarray:
    """uint8 [96, 96, 3], on white."""
    image = Image.open(file).convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(ImageOps.pad(opaque, (CANVAS, CANVAS), color="white"))


def split(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the known images and of those held out, int64: a permutation of the distinct captions, cut at KNOWN."""
    folded = [caption.casefold() for caption in captions]
    distinct = sorted(set(folded))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(distinct))
    place = dict(zip((distinct[number] for number in order), np.arange(len(distinct)) / len(distinct)))
    known = np.array([place[caption] for caption in folded]) < KNOWN
    return np.flatnonzero(known), np.flatnonzero(~known)


@dataclass(frozen=True)
class CaptionSamples(Asked):
    """Samples: an image and the request for its caption.

    Pixel (y, x) is the image's at (y, x) + shift, or (y, 95 - x) + shift where flip is set, and white beyond the image. In
    [-1, 1] it is multiplied by the contrast, the brightness is added, and the sum clipped. Then a grey square (0) of 32 x 32
    pixels is laid on, its upper left corner at `patch`.
    """

    image: np.ndarray  # int64 [R]
    flip: np.ndarray  # bool [R]
    shift: np.ndarray  # int64 [R, 2], pixels down and right
    light: np.ndarray  # float32 [R, 2], contrast and brightness
    patch: np.ndarray  # int64 [R, 2], row and column; at (96, 96) it is not in the image
    question: np.ndarray  # int64 [R], 0
    answer: np.ndarray  # int64 [R], index into the distinct captions

    @classmethod
    def plain(cls, image: np.ndarray, answer: np.ndarray) -> CaptionSamples:
        """Return samples of unchanged images."""
        count = len(image)
        light, nothing = np.tile(np.float32([1, 0]), (count, 1)), np.zeros((count, 2), np.int64)
        return cls(image, np.zeros(count, bool), nothing, light, nothing + CANVAS, nothing[:, 0], answer)


def draw(seed: int, image: np.ndarray, images: CaptionedImages, *, view: bool = False) -> CaptionSamples:
    """Rows of the images numbered `image` [R], from a seed: mirrored where they may be, every other time, and shifted by up
    to 6 pixels. view: seen as no row to train on is, shifted by up to 14, in another light and with a grey square over a part.
    """
    rng, count, most = np.random.default_rng(seed), len(image), VIEW_SHIFT if view else LARGEST_SHIFT
    flip = (rng.random(count) < 0.5) & np.array(images.mirrored)[image]
    shift = rng.integers(-most, most + 1, (count, 2))
    samples = replace(CaptionSamples.plain(image, images.answer[image]), flip=flip, shift=shift)
    if not view:
        return samples
    light = rng.uniform(*zip(CONTRAST, BRIGHTNESS), (count, 2)).astype(np.float32)
    return replace(samples, light=light, patch=rng.integers(0, CANVAS - PATCH + 1, (count, 2)))


class Easel(Album):
    """All images on the device, with a white border of one pixel: uint8 [P, 98, 98, 3]."""

    def __init__(self, pixels: np.ndarray, device: torch.device) -> None:
        self.pixels = torch.from_numpy(np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)).to(device)

    def compose(self, samples: Asked) -> Tensor:
        """Pixels of the rows, float32 [B, 3, 96, 96] in [-1, 1]."""
        assert isinstance(samples, CaptionSamples)
        device = self.pixels.device
        image, flip, shift, light, patch = (
            torch.from_numpy(part).to(device, non_blocking=True)
            for part in (samples.image, samples.flip, samples.shift, samples.light, samples.patch)
        )
        line = torch.arange(CANVAS, device=device)
        at = torch.stack([line.expand(len(samples), -1), torch.where(flip[:, None], CANVAS - 1 - line, line)], 1)
        ys, xs = (1 + at + shift[:, :, None]).clamp(0, CANVAS + 1).unbind(1)
        chosen = self.pixels[image[:, None, None], ys[:, :, None], xs[:, None, :]]
        contrast, brightness = light[:, :, None, None, None].unbind(1)
        lit = ((chosen.permute(0, 3, 1, 2).float() / 127.5 - 1) * contrast + brightness).clamp(-1, 1)
        down, right = ((line >= patch[:, :, None]) & (line < patch[:, :, None] + PATCH)).unbind(1)
        return lit.masked_fill(down[:, None, :, None] & right[:, None, None, :], 0.0)
