"""Questions about grids of real emoji: an endless stream for training, a fixed set that is held out.

A composition is the content of a grid (which kind stands where). One in eight of all compositions, by a hash of the
grid, is held out: no training row ever shows one of them, whatever its seed, and every held-out row shows one. That says
little about what a model can do with new compositions: there are so many that two random draws hardly ever share one, held
out or not. With `apart.count_shown` it rules out that a test question is about a grid that was trained on. A row depends on
(seed, index) alone, so a dataset can be read in any order and by any number of workers; nothing is stored.

Seeds. The method's samples (TRAINING_SEED), the test (TEST_SEED), the bundled pair's own training (`build.Plan`) and its
builder's progress (HELDOUT_SEED) are streams of their own. The same seed would give the same first scenes.

A row is what TRL calls a conversation with images:
    {"id", "type", "messages": [user: image + text, assistant: text], "images": [PIL.Image 96 x 96], "accept": [right answers]}
Costs about 0.2 ms.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .pictures import BACKGROUNDS, GRID, NAMES, SHIFTS, compose
from .questions import MIXTURE, ask

HELDOUT_SHARE = 8  # one composition in this many is held out
HELDOUT_SEED = 20_260_122  # what `build` watched while it trained the pair; no question of the test
TEST_SEED = 20_261_130
TRAINING_SEED = 20_261_201
FEWEST_KINDS, MOST_KINDS = 4, 8


@dataclass(frozen=True)
class Scene:
    """One grid: kinds uint8 [G, G], shifts of the pictures uint8 [G, G], index of the background."""

    cells: np.ndarray
    shifts: np.ndarray
    background: int

    def image(self) -> Image.Image:
        """The scene as an RGB image of SIZE x SIZE pixels."""
        return Image.fromarray(compose(self.cells[None], self.shifts[None], np.array([self.background]))[0])


def is_heldout(cells: np.ndarray) -> bool:
    """Whether a composition belongs to the held-out share: CRC-32 of its kinds, row by row, modulo HELDOUT_SHARE is 0."""
    return zlib.crc32(np.ascontiguousarray(cells, np.uint8).tobytes()) % HELDOUT_SHARE == 0


def draw_scene(rng: np.random.Generator, heldout: bool = False) -> Scene:
    """A scene of 4 to 8 different kinds whose composition lies on the wanted side of the split."""
    while True:
        kinds = rng.permutation(len(NAMES))[: rng.integers(FEWEST_KINDS, MOST_KINDS + 1)]
        cells = kinds[rng.integers(len(kinds), size=(GRID, GRID))].astype(np.uint8)
        if is_heldout(cells) == heldout:
            shifts = rng.integers(SHIFTS, size=(GRID, GRID), dtype=np.uint8)
            return Scene(cells, shifts, int(rng.integers(len(BACKGROUNDS))))


def make_row(seed: int, index: int, heldout: bool = False, types: Sequence[str] = MIXTURE) -> dict[str, Any]:
    """The row number `index` of the stream `seed`; see the module for its fields."""
    rng = np.random.default_rng((seed, index))
    scene = draw_scene(rng, heldout)
    question = ask(scene.cells.ravel().tolist(), rng, types)
    label = question.accept[int(rng.integers(len(question.accept)))]
    return {
        "id": f"{'heldout' if heldout else 'train'}-{seed}-{index}",
        "type": question.type,
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
            {"role": "assistant", "content": [{"type": "text", "text": label}]},
        ],
        "images": [scene.image()],
        "accept": list(question.accept),
    }


class SceneRows(Sequence[dict[str, Any]]):
    """Rows composed when they are read; works as a map-style torch Dataset. `count` rows of the stream `seed`."""

    def __init__(self, seed: int, count: int, heldout: bool = False, types: Sequence[str] = MIXTURE):
        self.seed, self.length, self.heldout, self.types = seed, count, heldout, tuple(types)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")
        return make_row(self.seed, index % self.length, self.heldout, self.types)


def training_rows(seed: int, count: int) -> SceneRows:
    """`count` training rows; rows of different seeds are different draws, and none shows a held-out composition."""
    return SceneRows(seed, count)


def heldout_rows(count: int = 6000) -> SceneRows:
    """The first `count` rows of the test, the same in every run."""
    return SceneRows(TEST_SEED, count, heldout=True)
