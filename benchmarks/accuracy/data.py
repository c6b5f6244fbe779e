"""Make batches on the device, score held-out samples, and keep the teacher's states of the training set.

Legend: R samples, B batch, S sequence, A longest answer with its end of turn, d_t teacher width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.pair import PAD, VISUAL, sequences
from benchmarks.accuracy.scenes import Album, Asked, sentences
from grace_plugin.data import SAMPLE_KEY
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.teacher import ResidentTeacher, Teacher, TeacherStates, model_inputs
from grace_plugin.vlm import VisualTokens, capture

__all__ = ["KeptTeacher", "Text", "batch_of", "predicting", "score"]

Batch = dict[str, Any]


class Text:
    """Token ids and labels [Q * A, S] of every question with every answer (None: those of scenes), in host memory."""

    def __init__(self, told: tuple[Sequence[str], Sequence[str]] | None = None) -> None:
        asked, answered = told or sentences()
        self.ids, self.first, self.longest = sequences(asked, answered)
        after = torch.arange(self.ids.shape[1]) >= self.first[:, None]
        self.labels = torch.where(after & (self.ids != PAD), self.ids, IGNORE_INDEX)
        self.answers = len(answered)

    def index(self, samples: Asked) -> Tensor:
        """Return the index of each sample's text, int64 [R]."""
        return torch.from_numpy(samples.question * self.answers + samples.answer)


def batch_of(samples: Asked, text: Text, album: Album, keys: np.ndarray | None = None) -> tuple[Batch, Batch]:
    """Return the batch on the album's device and the same in host memory. keys: sample numbers for a `KeptTeacher`."""
    index, device = text.index(samples), album.pixels.device
    pixels = album.compose(samples)
    host: Batch = {"input_ids": text.ids[index], "labels": text.labels[index], "pixel_values": pixels}
    batch: Batch = {name: value.to(device, non_blocking=True) for name, value in host.items()}
    if keys is not None:
        batch[SAMPLE_KEY] = torch.from_numpy(keys).to(device)
    return batch, host


@torch.no_grad()
def score(model: Any, samples: Asked, text: Text, album: Album, batch_size: int = 1000) -> np.ndarray:
    """Return whether greedy decoding gives the whole answer, bool [R].

    The label's own tokens are the input: each question has one correct answer, so its tokens are generated exactly when each of
    them is the most probable.
    """
    right = torch.ones(len(samples), dtype=torch.bool)
    for number, token, hidden in predicting(model, samples, text, album, batch_size):
        right[number[model.lm_head(hidden).argmax(-1).cpu() != token]] = False
    return right.numpy()


@torch.no_grad()
def predicting(
    model: Any, samples: Asked, text: Text, album: Album, batch_size: int = 1000
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batch by batch, of each of N answer tokens: its row and id, int64 [N] on the host, and the final hidden state that
    predicts it, [N, d] on the device.
    """
    model.eval()
    dtype, device = next(model.parameters()).dtype, album.pixels.device
    for start in range(0, len(samples), batch_size):
        part = samples.take(np.arange(start, min(len(samples), start + batch_size)))
        batch, host = batch_of(part, text, album)
        labels = host["labels"][:, 1:]
        at = (labels != IGNORE_INDEX).nonzero()
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        with capture(
            model.model.language_model
        ) as caught:  # of the whole model: its first call makes compressed layers dense
            model(**model_inputs(batch), use_cache=False, logits_to_keep=1)
        yield start + at[:, 0], labels[at[:, 0], at[:, 1]], caught.final[at[:, 0].to(device), at[:, 1].to(device)]


class KeptTeacher(Teacher):
    """A teacher whose states of the training set were computed once: final [R, A, d_t] and visual [R, 36, d_t] on the device.

    The values are those of the teacher on the same samples; this saves running it again for every epoch and method.
    """

    def __init__(
        self, model: Any, samples: Asked, text: Text, album: Album, states: tuple[Tensor, Tensor] | None = None
    ) -> None:
        resident = ResidentTeacher(model)
        self.config, self.name_or_path = resident.config, resident.name_or_path
        self._head = resident.head()
        self.longest = text.longest
        self.first = (text.first[text.index(samples)] - 1).to(album.pixels.device)  # predicts an answer's first token
        self.final, self.visual = states or self._compute(resident, samples, text, album)

    @torch.no_grad()
    def _compute(
        self, resident: ResidentTeacher, samples: Asked, text: Text, album: Album, batch_size: int = 512
    ) -> tuple[Tensor, Tensor]:
        device, dtype = album.pixels.device, next(resident.model.parameters()).dtype
        width = self.config.text_config.hidden_size
        final = torch.zeros(len(samples) * self.longest, width, dtype=dtype, device=device)
        visual = torch.zeros(len(samples), VISUAL, width, dtype=dtype, device=device)
        steps = torch.arange(self.longest, device=device)
        image = torch.arange(2, 2 + VISUAL, device=device)
        for start in range(0, len(samples), batch_size):
            number = np.arange(start, min(len(samples), start + batch_size))
            batch, _ = batch_of(samples.take(number), text, album)
            batch["pixel_values"] = batch["pixel_values"].to(dtype)
            count, length = batch["input_ids"].shape
            line = torch.arange(count, device=device)[:, None] * length
            at = self.first[start : start + count, None] + steps
            seen = VisualTokens((line + image).flatten(), (VISUAL,) * count)
            states = resident.states(batch, (line + at.clamp(max=length - 1)).flatten(), seen)
            final[start * self.longest : (start + count) * self.longest] = states.final
            visual[start : start + count] = states.visual.unflatten(0, (count, VISUAL))
        return final, visual

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self._head

    def states(self, batch: Any, positions: Tensor, visual: VisualTokens, host: Any = None) -> TeacherStates:
        keys, length = batch[SAMPLE_KEY], batch["input_ids"].shape[1]
        row = keys[positions // length]
        final = self.final[row * self.longest + positions % length - self.first[row]]
        return TeacherStates(final, self.visual[keys].flatten(0, 1))
