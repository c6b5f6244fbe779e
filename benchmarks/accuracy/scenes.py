"""Draw scenes of 2x2 or 3x3 photographs with a question about each, and compose their pixels on the device.

Five types: identity (what is in a cell), place (where the only one of its class is), count, comparison of two classes,
existence in a row or column. Answers are balanced by construction. A set of samples is a few small arrays made from a seed;
pixels are composed on the device from one uint8 tensor of photographs when a batch is made.

Legend: R samples, B batch, n photographs of a scene at most (9), P photographs, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.photos import CLASSES, SIZE, Photos

__all__ = ["CANVAS", "TYPES", "Album", "Asked", "Samples", "compose", "draw", "sentences"]

TYPES = ("identity", "place", "count", "comparison", "existence")
CANVAS, CELLS = 96, 9
NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLURALS = tuple("deer" if name == "deer" else name + "s" for name in CLASSES)
LARGEST_SHIFT = 2


class Asked:
    """Samples with a question and an answer: a dataclass of arrays [R, ...] that has these two fields."""

    question: np.ndarray  # int64 [R], index into the questions of a `data.Text`
    answer: np.ndarray  # int64 [R], index into its answers

    def __len__(self) -> int:
        return len(self.answer)

    def take(self, index: np.ndarray) -> Self:
        """Return the samples at `index`."""
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Samples(Asked):
    """A set of questions about scenes. photos, flip, shift: by cell, row-major in the scene's own grid."""

    type: np.ndarray  # int64 [R], index into TYPES
    grid: np.ndarray  # int64 [R], 2 or 3
    classes: np.ndarray  # int64 [R, 9], -1 beyond the grid
    photos: np.ndarray  # int64 [R, 9], index into the part's photographs
    flip: np.ndarray  # bool [R, 9]
    shift: np.ndarray  # int64 [R, 9, 2], pixels
    question: np.ndarray  # int64 [R], index into sentences()[0]
    answer: np.ndarray  # int64 [R], index into sentences()[1]


def sentences() -> tuple[list[str], list[str]]:
    """Return all questions and all answers."""
    questions = [f"What is in row {r}, column {c}?" for r in (1, 2, 3) for c in (1, 2, 3)]
    questions += [f"Where is the {name}?" for name in CLASSES]
    questions += [f"How many {name} are there?" for name in PLURALS]
    questions += [f"Are there more {a} or {b}?" for a in PLURALS for b in PLURALS]
    questions += [
        f"Is there a {name} in {line} {k}?" for name in CLASSES for line in ("row", "column") for k in (1, 2, 3)
    ]
    answers = [*CLASSES, *PLURALS, *NUMBERS, "neither", "yes", "no"]
    answers += [f"row {r}, column {c}" for r in (1, 2, 3) for c in (1, 2, 3)]
    return questions, answers


QUESTION_AT = dict(zip(TYPES, (0, 9, 19, 29, 129)))  # where each type's questions begin
NAME, PLURAL, NUMBER, NEITHER, YES, NO, PLACE = 0, 10, 20, 26, 27, 28, 29  # where each kind of answer begins


def draw(seed: int, count: int, photos: Photos, *, augment: bool, types: tuple[str, ...] = TYPES) -> Samples:
    """`count` samples from a seed, the types in turn. augment: photographs mirrored and shifted by up to 2 pixels at random."""
    rng = np.random.default_rng(seed)
    type_ = np.array([TYPES.index(t) for t in types])[np.arange(count) % len(types)]
    grid = rng.integers(2, 4, count)
    size = grid * grid
    order = rng.random((count, CELLS))
    order[np.arange(CELLS) >= size[:, None]] = 2.0
    rank = order.argsort(1).argsort(1)  # a random numbering of each scene's cells
    target = rng.integers(0, 10, count)
    other = (target + rng.integers(1, 10, count)) % 10
    classes = rng.integers(0, 10, (count, CELLS))
    rest = (target[:, None] + rng.integers(1, 10, (count, CELLS))) % 10  # never the target
    question, answer = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for name in types:
        at = np.flatnonzero(type_ == TYPES.index(name))
        seen = _TYPE[name](rng, grid[at], rank[at], target[at], other[at], classes[at], rest[at])
        classes[at], question[at], answer[at] = seen
    classes[np.arange(CELLS) >= size[:, None]] = -1
    by_class = [np.flatnonzero(photos[1] == label) for label in range(10)]
    lengths, starts = np.array([len(p) for p in by_class]), np.concatenate([[0], np.cumsum([len(p) for p in by_class])])
    if not lengths.all():
        raise ValueError(
            f"no photograph of {', '.join(CLASSES[n] for n in np.flatnonzero(lengths == 0))}; use more of them"
        )
    known = classes.clip(min=0)
    picked = np.concatenate(by_class)[starts[known] + (rng.random((count, CELLS)) * lengths[known]).astype(np.int64)]
    flip = rng.random((count, CELLS)) < (0.5 if augment else 0.0)
    most = LARGEST_SHIFT if augment else 0
    shift = rng.integers(-most, most + 1, (count, CELLS, 2))
    return Samples(type_, grid, classes, picked, flip, shift, question, answer)


def _identity(rng, grid, rank, target, other, classes, rest):  # type: ignore[no-untyped-def]
    cell = (rank == 0).argmax(1)
    row, column = cell // grid, cell % grid
    return classes, QUESTION_AT["identity"] + row * 3 + column, NAME + classes[np.arange(len(grid)), cell]


def _place(rng, grid, rank, target, other, classes, rest):  # type: ignore[no-untyped-def]
    cell = (rank == 0).argmax(1)
    found = np.where(rank == 0, target[:, None], rest)
    return found, QUESTION_AT["place"] + target, PLACE + cell // grid * 3 + cell % grid


def _count(rng, grid, rank, target, other, classes, rest):  # type: ignore[no-untyped-def]
    wanted = (rng.random(len(grid)) * np.where(grid == 2, 4, 6)).astype(np.int64)
    found = np.where(rank < wanted[:, None], target[:, None], rest)
    return found, QUESTION_AT["count"] + target, NUMBER + wanted


def _comparison(rng, grid, rank, target, other, classes, rest):  # type: ignore[no-untyped-def]
    """Target more, other more, or as many (1 to 2 each)."""
    outcome = rng.integers(0, 3, len(grid))
    low = (rng.random(len(grid)) * np.where(grid == 2, 2, 3)).astype(np.int64)
    more = low + 1 + ((grid == 3) & (rng.random(len(grid)) < 0.5))
    even = rng.integers(1, 3, len(grid))
    first = np.select([outcome == 0, outcome == 1], [more, low], even)
    second = np.select([outcome == 0, outcome == 1], [low, more], even)
    third = (other[:, None] + 1 + np.arange(10)[rng.integers(0, 9, rest.shape)]) % 10
    third = np.where(third == target[:, None], (target[:, None] + 1) % 10, third)
    third = np.where(third == other[:, None], (other[:, None] + 1) % 10, third)
    third = np.where(third == target[:, None], (target[:, None] + 1) % 10, third)
    found = np.where(rank < first[:, None], target[:, None], third)
    found = np.where((rank >= first[:, None]) & (rank < (first + second)[:, None]), other[:, None], found)
    answer = np.select([outcome == 0, outcome == 1], [PLURAL + target, PLURAL + other], NEITHER)
    return found, QUESTION_AT["comparison"] + target * 10 + other, answer


def _existence(rng, grid, rank, target, other, classes, rest):  # type: ignore[no-untyped-def]
    """Yes: one in the line; no: none in the line, but in three of four scenes one outside of it."""
    column, line = rng.integers(0, 2, len(grid)), (rng.random(len(grid)) * grid).astype(np.int64)
    cell = np.arange(CELLS)
    inside = np.where(column[:, None] == 1, cell % grid[:, None], cell // grid[:, None]) == line[:, None]
    inside &= cell < (grid * grid)[:, None]
    yes = rng.random(len(grid)) < 0.5
    chosen = np.where(yes[:, None], inside, ~inside & (cell < (grid * grid)[:, None]))
    first = np.where(chosen, rank, CELLS).argmin(1)
    put = yes | (rng.random(len(grid)) < 0.75)
    found = np.where((cell == first[:, None]) & put[:, None], target[:, None], rest)
    return found, QUESTION_AT["existence"] + target * 6 + column * 3 + line, np.where(yes, YES, NO)


_TYPE = {"identity": _identity, "place": _place, "count": _count, "comparison": _comparison, "existence": _existence}


class Album:
    """Photographs of one part on the device: uint8 [P, 32, 32, 3]. whole: scenes in whole 8-bit steps, as a PNG holds them."""

    def __init__(self, photos: Photos, device: torch.device, whole: bool = False) -> None:
        self.pixels, self.whole = torch.from_numpy(photos[0]).to(device), whole

    def compose(self, samples: Asked) -> Tensor:
        """Pixels of the rows, float32 [B, 3, 96, 96] in [-1, 1]."""
        assert isinstance(samples, Samples)
        return compose(self, samples)


def compose(album: Album, samples: Samples) -> Tensor:
    """Pixels of the rows' scenes, float32 [B, 3, 96, 96] in [-1, 1]; a 2x2 scene has its photographs enlarged to 48 pixels."""
    device = album.pixels.device
    photos, flip, shift, grid = (
        torch.from_numpy(np.ascontiguousarray(part)).to(device, non_blocking=True)
        for part in (samples.photos, samples.flip, samples.shift, samples.grid)
    )
    line = torch.arange(SIZE, device=device)
    ys = (line + shift[..., :1]).clamp(0, SIZE - 1)
    xs = torch.where(flip[..., None], SIZE - 1 - line, line) + shift[..., 1:]
    cells = album.pixels[photos[:, :, None, None], ys[:, :, :, None], xs.clamp(0, SIZE - 1)[:, :, None, :]]
    cells = cells.permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # [B, 9, 3, 32, 32]
    three = cells.unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, CANVAS, CANVAS)
    large = torch.nn.functional.interpolate(cells[:, :4].flatten(0, 1), size=CANVAS // 2, mode="bilinear")
    two = large.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, CANVAS, CANVAS)
    scenes = torch.where((grid == 2)[:, None, None, None], two, three)
    return ((scenes + 1) * 127.5).round() / 127.5 - 1 if album.whole else scenes
