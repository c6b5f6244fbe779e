"""Draw questions about grids of emoji: an endless stream for training, a fixed set for the test.

A composition is the content of a grid (which kind stands where). One in eight of all compositions, by a hash of the
grid, is held out: no training sample ever shows one of them, whatever its seed, and every held-out sample shows one. That
says little about generalization to new compositions, because two random draws hardly ever coincide. Together with
`disjoint.count_compositions` it rules out that a test question is about a grid of the training. A sample depends on
(seed, index) alone, so a dataset can be read in any order and by any number of workers; nothing is stored.

Seeds: the demo's training samples (TRAINING_SEED), its test (TEST_SEED), the training of the bundled models (`build.Plan`)
and the progress shown by `build` (HELDOUT_SEED) use different streams. The same seed would give the same first scenes.

A sample is a conversation with images, as in TRL:
    {"id", "type", "messages": [user: image + text, assistant: text], "images": [PIL.Image 96 x 96], "accept": [right answers]}
Drawing one takes about 0.2 ms.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .images import BACKGROUNDS, GRID, NAMES, SHIFTS, compose
from .questions import MIXTURE, ask

HELDOUT_SHARE = 8  # one composition in this many is held out
HELDOUT_SEED = 20_260_122  # used by `build` to show progress; not a question of the test
TEST_SEED = 20_261_130
TRAINING_SEED = 20_261_201
FEWEST_KINDS, MOST_KINDS = 4, 8


@dataclass(frozen=True)
class Scene:
    """One grid: kinds uint8 [G, G], shifts of the emoji uint8 [G, G], index of the background."""

    cells: np.ndarray
    shifts: np.ndarray
    background: int

    def image(self) -> Image.Image:
        """Return the scene as an RGB image of SIZE x SIZE pixels."""
        return Image.fromarray(compose(self.cells[None], self.shifts[None], np.array([self.background]))[0])


def is_heldout(cells: np.ndarray) -> bool:
    """Return whether a composition is held out: CRC-32 of its kinds, row by row, modulo HELDOUT_SHARE is 0."""
    return zlib.crc32(np.ascontiguousarray(cells, np.uint8).tobytes()) % HELDOUT_SHARE == 0


def draw_scene(rng: np.random.Generator, heldout: bool = False) -> Scene:
    """Draw a scene of 4 to 8 different kinds, from the held-out compositions or from the others."""
    while True:
        kinds = rng.permutation(len(NAMES))[: rng.integers(FEWEST_KINDS, MOST_KINDS + 1)]
        cells = kinds[rng.integers(len(kinds), size=(GRID, GRID))].astype(np.uint8)
        if is_heldout(cells) == heldout:
            shifts = rng.integers(SHIFTS, size=(GRID, GRID), dtype=np.uint8)
            return Scene(cells, shifts, int(rng.integers(len(BACKGROUNDS))))


def make_sample(seed: int, index: int, heldout: bool = False, types: Sequence[str] = MIXTURE) -> dict[str, Any]:
    """Return sample `index` of the stream `seed`; the module's docstring has its fields."""
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


class SceneSamples(Sequence[dict[str, Any]]):
    """A map-style torch Dataset of the first `count` samples of the stream `seed`, made when they are read."""

    def __init__(self, seed: int, count: int, heldout: bool = False, types: Sequence[str] = MIXTURE):
        self.seed, self.length, self.heldout, self.types = seed, count, heldout, tuple(types)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return make_sample(self.seed, index % self.length, self.heldout, self.types)


def training_samples(seed: int, count: int) -> SceneSamples:
    """Return `count` training samples; other seeds give other samples, and none shows a held-out composition."""
    return SceneSamples(seed, count)


def heldout_samples(count: int = 6000) -> SceneSamples:
    """Return the first `count` samples of the test, the same in every run."""
    return SceneSamples(TEST_SEED, count, heldout=True)
