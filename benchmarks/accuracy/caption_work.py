"""Rows of the second data set: the same pair, methods, search and loops on captions, scored by forced choice.

The pair is the scene study's: teacher and student start from its trained members, the tower stays frozen, and both learn the
training pictures' captions by cross-entropy before any method does. Held-out captions were never trained on.

A question is a held-out picture, its caption and 15 captions of other held-out pictures, drawn from a seed; it is right if the
picture's own caption has the highest mean log-probability per token (end of turn included). Every picture is run with every
caption of its part once, and all questions are read from that matrix. Questions lie picture by picture, as many for each, which
the record says (`cluster`), so that intervals draw pictures.

Legend: P held-out pictures, C distinct captions of theirs, Q questions, R = P * C rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, log_softmax

from benchmarks.accuracy.captions import PROMPT, CaptionRows, Easel, Pictures, draw_captions, load_pictures, split
from benchmarks.accuracy.data import Text, predicting
from benchmarks.accuracy.rows import Store, scored
from benchmarks.accuracy.scenes import Album
from benchmarks.accuracy.study import SIZES, Row, Size
from benchmarks.accuracy.work import TEST_SEED, TRAIN_SEED, VALIDATION_SEED, Work

__all__ = ["CAPTION_SIZES", "TOLD", "CaptionWork", "Choice", "likelihood"]

OTHERS = 15
KINDS = 7  # folders with a column of their own in the table: the largest
TOLD = (
    "Captions of held-out pictures: right where a picture's own caption has a higher mean log-probability per token than each "
    f"of {OTHERS} captions of other held-out pictures ({100 / (OTHERS + 1):.2f} % by chance). No held-out caption was trained "
    "on. Intervals draw pictures with all their questions; that captions to choose from are shared is not in them."
)

#: test_rows and validation_rows are questions, at least; the pictures are all there are
CAPTION_SIZES: dict[str, Size] = {
    "gpu": replace(
        SIZES["gpu"], photos={}, tower_steps=0, teacher_steps=800, student_steps=600, steps=600, seeds=3,
        test_rows=5000, validation_rows=2500, rates=(2e-4, 6e-4, 1.8e-3, 5.4e-3), weights=2,
    ),
    "cpu": replace(SIZES["cpu"], photos={}, tower_steps=0, teacher_steps=40, student_steps=30),
    "tiny": replace(
        SIZES["tiny"], photos={}, tower_steps=0, rates=(1e-3,), weights=0, seeds=1, steps=3, teacher_steps=2, student_steps=2
    ),
}  # fmt: skip


class Choice:
    """The questions of a part. pictures int64 [P]; captions int64 [C], index into the distinct captions; others int64
    [P, Q / P, 15], column of each caption to choose from beside the own one, whose column is own, int64 [P].

    Raises:
        ValueError: all pictures share one caption.
    """

    def __init__(self, seed: int, questions: int, pictures: np.ndarray, answer: np.ndarray, texts: list[str]) -> None:
        self.pictures, (self.captions, self.own) = pictures, np.unique(answer[pictures], return_inverse=True)
        self.each = -(-questions // len(pictures))
        folded = np.array([texts[number].casefold() for number in self.captions])
        unlike = [np.flatnonzero(folded != folded[column]) for column in self.own]
        if not all(map(len, unlike)):
            raise ValueError(f"nothing to choose from: {len(pictures)} pictures share a caption; use more pictures")
        count, rng = min(OTHERS, *map(len, unlike)), np.random.default_rng(seed)
        drawn = [[rng.choice(columns, count, replace=False) for _ in range(self.each)] for columns in unlike]
        self.others = np.array(drawn)

    def rows(self) -> CaptionRows:
        """Every picture with every caption, picture by picture."""
        return CaptionRows.plain(
            np.repeat(self.pictures, len(self.captions)), np.tile(self.captions, len(self.pictures))
        )

    def right(self, mean: np.ndarray) -> np.ndarray:
        """bool [Q] from the mean log-probability of each picture's captions [P, C]; a draw with another caption is wrong."""
        own = np.take_along_axis(mean, self.own[:, None], 1)
        best = np.take_along_axis(mean[:, None], self.others, 2).max(2)
        return (own > best).flatten()


@torch.no_grad()
def likelihood(model: Any, rows: CaptionRows, text: Text, album: Album) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each row's caption in nats, float64 [R], and its tokens, int64 [R]; end of turn included."""
    total, tokens = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)
    weight = model.lm_head.weight.float()
    for number, token, hidden in predicting(model, rows, text, album):
        each = log_softmax(linear(hidden.float(), weight), -1).gather(1, token.to(hidden.device)[:, None])[:, 0]
        total.index_add_(0, number, each.double().cpu())
        tokens.index_add_(0, number, torch.ones_like(number))
    return total.numpy(), tokens.numpy()


class CaptionWork(Work):
    """What a process keeps between rows. folder: below the scene study's, which holds its pair; source: of the pictures."""

    naming_weight = 0.0

    def __init__(self, size: Size, store: Store, folder: Path, source: str) -> None:
        super().__init__(size, store, folder, source)
        self.size = replace(size, photos={part: len(pictures) for part, pictures in self.photos.items()})

    @cached_property
    def pictures(self) -> Pictures:
        """All pictures."""
        return load_pictures(self.source)

    @cached_property
    def texts(self) -> list[str]:
        """The distinct captions."""
        return sorted(set(self.pictures.captions))

    @cached_property
    def answer(self) -> np.ndarray:
        """Which of `texts` each picture has, int64 [all pictures]."""
        number = {text: number for number, text in enumerate(self.texts)}
        return np.array([number[caption] for caption in self.pictures.captions])

    @cached_property
    def photos(self) -> dict[str, np.ndarray]:  # type: ignore[override]
        """Numbers of each part's pictures; the teacher has the student's, augmented anew at every step."""
        parts = split(self.pictures.captions)
        return {"teacher": parts["student"], **parts}

    @cached_property
    def albums(self) -> dict[str, Album]:
        return dict.fromkeys(self.photos, Easel(self.pictures.pixels, self.device))

    @cached_property
    def text(self) -> Text:
        return Text(([PROMPT], self.texts))

    @cached_property
    def rows(self) -> dict[str, Any]:
        return {"student": self.drawn(TRAIN_SEED, self.size.rows, "student")}

    @cached_property
    def choices(self) -> dict[str, Choice]:
        """The questions of the held-out parts."""
        asked = {
            "validation": (VALIDATION_SEED, self.size.validation_rows),
            "test": (TEST_SEED, self.size.test_rows),
        }
        return {part: Choice(*how, self.photos[part], self.answer, self.texts) for part, how in asked.items()}

    @cached_property
    def kinds(self) -> list[str]:
        """Names of the largest folders; the others go together."""
        return [name for name, _ in Counter(self.pictures.folders).most_common(KINDS)]

    def drawn(self, seed: int, count: int, part: str) -> CaptionRows:
        return draw_captions(seed, count, self.photos[part], self.answer, np.array(self.pictures.mirrored))

    def beginning(self, row: Row) -> Any:
        """The scene study's member of that name."""
        model = self._open(self.folder.parent / row.name.replace("/", "-")).float()
        model.model.vision_tower.requires_grad_(False)
        return model

    def _pair(self, row: Row) -> dict[str, Any]:
        return super()._pair(row) | {"pictures": self.pictures.told}

    def score(self, model: Any, part: str) -> dict[str, Any]:
        """Entries of a record for the part's questions, and nats per token of its pictures' own captions."""
        choice = self.choices[part]
        total, tokens = likelihood(self.computing(model), choice.rows(), self.text, self.albums[part])
        shape = (len(choice.pictures), len(choice.captions))
        total, tokens = total.reshape(shape), tokens.reshape(shape)
        own = np.arange(shape[0]), choice.own
        folders = (self.pictures.folders[picture] for picture in choice.pictures)
        kinds = [self.kinds.index(name) if name in self.kinds else len(self.kinds) for name in folders]
        said = scored(choice.right(total / tokens), np.repeat(kinds, choice.each), [*self.kinds, "other"])
        nats = float(-total[own].sum() / tokens[own].sum())
        return {"part": part, **said, "nats": nats, "cluster": choice.each, "choices": choice.others.shape[2] + 1}
