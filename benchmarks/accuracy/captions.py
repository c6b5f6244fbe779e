"""The second data set: pictures with a line of English each, cut into parts, augmented, and put on the device.

Sources: `debian` (the package tuxpaint-stamps-default, fetched by apt-get; GPL-2, not redistributed here), a folder, or a file
that `pack_pictures` wrote. A folder has, anywhere below it, PNG pictures, each beside a text file of the same name whose first
line is the caption, as Tux Paint's stamps are (further lines are translations); a line `nomirror` in a .dat file beside it says
that a mirror image would be wrong. A picture is put on white and fitted into 96 x 96 pixels.

Pictures that share a caption, whatever its case, are in one part, so no held-out caption was trained on.

Legend: P pictures, R rows, B batch.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.accuracy.pair import open_tokenizer
from benchmarks.accuracy.photos import from_webp, to_webp
from benchmarks.accuracy.scenes import CANVAS, Album, Asked
from benchmarks.accuracy.train import order_of

__all__ = [
    "PROMPT", "CaptionRows", "Easel", "Pictures", "caption_of", "draw_captions", "load_pictures", "pack_pictures", "split",
]  # fmt: skip

PROMPT = "Describe the picture."
PACKAGE, STAMPS = "tuxpaint-stamps-default", Path("usr/share/tuxpaint/stamps")
LONGEST = 24  # tokens of a caption
SPLIT_SEED = 20260123
PARTS = {"student": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}  # shares of the distinct captions
LARGEST_SHIFT = 6
TRANSLATION = re.compile(r"[A-Za-z_@.-]+\.utf8=")


@dataclass(frozen=True)
class Pictures:
    """Pictures in the order of their paths. folders: the first folder of each path. told: where from, and what was left out."""

    pixels: np.ndarray  # uint8 [P, 96, 96, 3]
    captions: list[str]
    folders: list[str]
    mirrored: list[bool]  # whether a mirror image is a picture of the same
    told: str


def load_pictures(source: str) -> Pictures:
    """The pictures at `source`.

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


def pack_pictures(pictures: Pictures, file: Path) -> None:
    """Write pictures and captions into one file, without loss."""
    entries = asdict(pictures)
    strips = to_webp(entries.pop("pixels"))
    said = np.frombuffer(json.dumps(entries).encode(), np.uint8)
    np.savez(file, said=said, **{f"pixels_{number}": strip for number, strip in enumerate(strips)})


def _unpack(file: Path) -> Pictures:
    with np.load(file) as stored:
        said = json.loads(stored["said"].tobytes())
        strips = [stored[f"pixels_{number}"] for number in range(len(stored.files) - 1)]
    return Pictures(from_webp(strips, len(said["captions"])), **said)


def _debian() -> Pictures:
    with tempfile.TemporaryDirectory() as made:
        fetch = ["apt-get", "download", PACKAGE]
        if subprocess.run(fetch, cwd=made, capture_output=True).returncode:  # the lists may be old, or not there yet
            subprocess.run(["apt-get", "update"], check=True, capture_output=True)
            subprocess.run(fetch, cwd=made, check=True, capture_output=True)
        (file,) = Path(made).glob("*.deb")
        subprocess.run(["dpkg", "-x", file.name, "files"], cwd=made, check=True)
        return _folder(Path(made) / "files" / STAMPS, file.stem)


def _folder(folder: Path, name: str) -> Pictures:
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
    return Pictures(np.stack(fitted), *others, told=f"{len(found)} pictures of {name}; left out: {counted}")


def caption_of(text: str) -> str:
    """The caption of a text file: its first line, spaces made single; nothing where that is a translation already."""
    line = " ".join(text.partition("\n")[0].removeprefix("\ufeff").split())
    return "" if TRANSLATION.match(line) else line


def _fitted(file: Path) -> np.ndarray:
    """uint8 [96, 96, 3], on white."""
    picture = Image.open(file).convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(ImageOps.pad(opaque, (CANVAS, CANVAS), color="white"))


def split(captions: list[str]) -> dict[str, np.ndarray]:
    """Numbers of each part's pictures, int64: a permutation of SPLIT_SEED of the distinct captions, cut into PARTS."""
    folded = [caption.casefold() for caption in captions]
    distinct = sorted(set(folded))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(distinct))
    place = dict(zip((distinct[number] for number in order), np.arange(len(distinct)) / len(distinct)))
    share = np.array([place[caption] for caption in folded])
    return {part: np.flatnonzero((low <= share) & (share < high)) for part, (low, high) in PARTS.items()}


@dataclass(frozen=True)
class CaptionRows(Asked):
    """Pictures, each asked for its caption. answer: index into the distinct captions."""

    picture: np.ndarray  # int64 [R]
    flip: np.ndarray  # bool [R]
    shift: np.ndarray  # int64 [R, 2], pixels
    question: np.ndarray  # int64 [R], 0
    answer: np.ndarray  # int64 [R]

    @classmethod
    def plain(cls, picture: np.ndarray, answer: np.ndarray) -> CaptionRows:
        """Pictures as they are."""
        count = len(picture)
        return cls(picture, np.zeros(count, bool), np.zeros((count, 2), np.int64), np.zeros(count, np.int64), answer)


def draw_captions(seed: int, count: int, chosen: np.ndarray, answer: np.ndarray, mirrored: np.ndarray) -> CaptionRows:
    """`count` rows from a seed: shuffled epochs of the pictures `chosen`, mirrored where they may be (every other time) and
    shifted by up to 6 pixels. answer int64 [P] and mirrored bool [P]: of all pictures.
    """
    picture = chosen[order_of(seed, len(chosen), 1, count)[0]]
    rng = np.random.default_rng(seed)
    flip = (rng.random(count) < 0.5) & mirrored[picture]
    shift = rng.integers(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (count, 2))
    return CaptionRows(picture, flip, shift, np.zeros(count, np.int64), answer[picture])


class Easel(Album):
    """All pictures on the device, with a white border: uint8 [P, 108, 108, 3]."""

    def __init__(self, pixels: np.ndarray, device: torch.device) -> None:
        border = ((0, 0), (LARGEST_SHIFT, LARGEST_SHIFT), (LARGEST_SHIFT, LARGEST_SHIFT), (0, 0))
        self.pixels = torch.from_numpy(np.pad(pixels, border, constant_values=255)).to(device)

    def compose(self, rows: Asked) -> Tensor:
        """Pixels of the rows, float32 [B, 3, 96, 96] in [-1, 1]."""
        assert isinstance(rows, CaptionRows)
        device = self.pixels.device
        picture, flip, shift = (
            torch.from_numpy(part).to(device, non_blocking=True) for part in (rows.picture, rows.flip, rows.shift)
        )
        line = torch.arange(CANVAS, device=device)
        ys = LARGEST_SHIFT + line + shift[:, :1]
        xs = LARGEST_SHIFT + torch.where(flip[:, None], CANVAS - 1 - line, line) + shift[:, 1:]
        chosen = self.pixels[picture[:, None, None], ys[:, :, None], xs[:, None, :]]
        return chosen.permute(0, 3, 1, 2).float() / 127.5 - 1
