"""Train on the second data set: the same models, methods, search and loops on captions of known images in unseen views.

The pair is the scene study's: teacher and student start from its trained members, the tower stays frozen, and both learn the
known images' captions by cross-entropy before any method does. A question is a known image in a view that training does not
show (`captions.draw`), and right as in the scene study: greedy decoding gives the whole caption. Questions lie image by
image, as many for each, which the record says (`cluster`).

Beside it stands what is known of other images (`held_out`): how often a held-out image's caption has a higher mean
log-probability per token (end of turn included) than 15 captions of other held-out images, and the nats per token of its own.

Legend: P images, C distinct captions, R samples.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, log_softmax

from benchmarks.accuracy.captions import PROMPT, CaptionedImages, CaptionSamples, Easel, draw, load_images, split
from benchmarks.accuracy.data import Text, predicting, score
from benchmarks.accuracy.rows import Store, scored
from benchmarks.accuracy.scenes import Album
from benchmarks.accuracy.study import SIZES, Row, Size
from benchmarks.accuracy.train import order_of
from benchmarks.accuracy.work import TEST_SEED, TRAIN_SEED, VALIDATION_SEED, Work

__all__ = ["CAPTION_SIZES", "TOLD", "CaptionWork", "choice_accuracy", "likelihood"]

OTHERS = 15
TOLD = (
    "Captions of known pictures in views that training does not show (shifted further, in another light, a part covered): "
    "right where greedy decoding gives the whole caption. Held-out choice is about pictures whose captions were not trained "
    "on: how often, percent, a picture's own caption is more probable per token than each of "
    f"{OTHERS} captions of others of them ({100 / (OTHERS + 1):.2f} by chance)."
)

#: test_rows and validation_rows are questions, at least: each image has as many
CAPTION_SIZES: dict[str, Size] = {
    "gpu": replace(
        SIZES["gpu"],
        photos={},
        tower_steps=0,
        teacher_steps=400,
        student_steps=150,
        steps=150,
        seeds=3,
        test_samples=5000,
        validation_samples=2500,
        rates=(2e-4, 6e-4, 1.8e-3, 5.4e-3),
        weights=2,
    ),
    "cpu": replace(SIZES["cpu"], photos={}, tower_steps=0, teacher_steps=40, student_steps=30),
    "tiny": replace(
        SIZES["tiny"],
        photos={},
        tower_steps=0,
        rates=(1e-3,),
        weights=0,
        seeds=1,
        steps=3,
        teacher_steps=2,
        student_steps=2,
    ),
}


def choice_accuracy(mean: np.ndarray, own: np.ndarray, unlike: np.ndarray, others: int) -> float:
    """How often the own caption beats `others` captions drawn without replacement from those unlike it: expected, not drawn.

    mean: log-probability per token of each image's captions, [P, C]; own: column of its own, int64 [P]; unlike: bool [P, C].
    """
    rivals = unlike.sum(1)[:, None]
    better = ((mean >= np.take_along_axis(mean, own[:, None], 1)) & unlike).sum(1)[:, None]  # a draw is lost
    drawn = np.arange(others)
    return float(((rivals - better - drawn).clip(0) / (rivals - drawn)).prod(1).mean())


@torch.no_grad()
def likelihood(model: Any, samples: CaptionSamples, text: Text, album: Album) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each row's caption in nats, float64 [R], and its tokens, int64 [R]; end of turn included."""
    total, tokens = torch.zeros(len(samples), dtype=torch.float64), torch.zeros(len(samples), dtype=torch.int64)
    weight = model.lm_head.weight.float()
    for number, token, hidden in predicting(model, samples, text, album):
        each = log_softmax(linear(hidden.float(), weight), -1).gather(1, token.to(hidden.device)[:, None])[:, 0]
        total.index_add_(0, number, each.double().cpu())
        tokens.index_add_(0, number, torch.ones_like(number))
    return total.numpy(), tokens.numpy()


class CaptionWork(Work):
    """State that a process keeps between rows. folder: below the scene study's, which has its models; source: of the images."""

    naming_weight = 0.0

    def __init__(self, size: Size, store: Store, folder: Path, source: str) -> None:
        super().__init__(size, store, folder, source)
        self.images: CaptionedImages = load_images(source)
        self.known, self.held_out = split(self.images.captions)
        self.size = replace(size, photos=dict.fromkeys(("teacher", "student"), len(self.known)))

    @cached_property
    def albums(self) -> dict[str, Album]:
        easel = Easel(self.images.pixels, self.device)
        return dict.fromkeys(("teacher", "student", "validation", "test"), easel)

    @cached_property
    def text(self) -> Text:
        return Text(([PROMPT], self.images.texts))

    @cached_property
    def samples(self) -> dict[str, Any]:
        asked = {
            "validation": (VALIDATION_SEED, self.size.validation_samples),
            "test": (TEST_SEED, self.size.test_samples),
        }
        views = {
            part: draw(seed, self.known.repeat(-(-count // len(self.known))), self.images, view=True)
            for part, (seed, count) in asked.items()
        }
        return {"student": self.drawn(TRAIN_SEED, self.size.samples, "student"), **views}

    def drawn(self, seed: int, count: int, part: str) -> CaptionSamples:
        """Shuffled epochs of the known images; the teacher's are drawn again at every step."""
        return draw(seed, self.known[order_of(seed, len(self.known), 1, count)[0]], self.images)

    def beginning(self, row: Row) -> Any:
        """Load the scene study's model of that name."""
        model = self._open(self.folder.parent / row.name.replace("/", "-")).float()
        model.model.vision_tower.requires_grad_(False)
        return model

    def _pair(self, row: Row) -> dict[str, Any]:
        return super()._pair(row) | {"pictures": self.images.told}

    def score(self, model: Any, part: str) -> dict[str, Any]:
        model, samples = self.computing(model), self.samples[part]
        right = score(model, samples, self.text, self.albums[part])
        said = {"part": part, **scored(right, self.images.kind[samples.image], self.images.kinds)}
        said["cluster"] = len(samples) // len(self.known)
        return said if part == "validation" else said | {"held_out": self.choose(model)}

    def choose(self, model: Any) -> dict[str, float]:
        """Score held-out images: each is run with every held-out caption, from which the choices follow."""
        captions, own = np.unique(self.images.answer[self.held_out], return_inverse=True)
        samples = CaptionSamples.plain(self.held_out.repeat(len(captions)), np.tile(captions, len(self.held_out)))
        total, tokens = (a.reshape(len(own), -1) for a in likelihood(model, samples, self.text, self.albums["test"]))
        folded = np.array([self.images.texts[number].casefold() for number in captions])
        unlike = folded != folded[own][:, None]
        others, at = min(OTHERS, unlike.sum(1).min()), (np.arange(len(own)), own)
        accuracy = choice_accuracy(total / tokens, own, unlike, others)
        return {"accuracy": accuracy, "nats": float(-total[at].sum() / tokens[at].sum()), "choices": int(others) + 1}
