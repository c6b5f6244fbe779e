"""Compute the relational loss on other layers and tokens than the penultimate layer's visual tokens.

A place is a pair of decoder layers (student's, teacher's) and a kind of token. The term is the mean over places of one kind,
summed over kinds, with the recipe's weight; a row's text is its question and answer. Everything else is GRACE.

Legend: R samples, L layers, S sequence, d_t teacher width, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.data import Text, batch_of
from benchmarks.accuracy.pair import IMAGE, PAD
from benchmarks.accuracy.scenes import Album, Samples
from grace_plugin.data import SAMPLE_KEY
from grace_plugin.losses import relational_loss
from grace_plugin.objective import GraceObjective
from grace_plugin.objective.terms import VisualRelationTerm
from grace_plugin.objective.window import AccumulationWindow, MicroBatch
from grace_plugin.teacher import model_inputs
from grace_plugin.vlm import Capture

__all__ = ["RelationObjective", "deep_states"]


@contextmanager
def outputs(decoder: Any, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Capture the outputs [B, S, d] of some decoder layers in the forward pass inside."""
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.__setitem__(
            number, output[0] if isinstance(output, tuple) else output
        )

    handles = [decoder.layers[number].register_forward_hook(keep(number)) for number in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def deep_states(
    teacher: Any, layers: tuple[int, ...], samples: Samples, text: Text, album: Album, batch_size: int = 512
) -> Tensor:
    """The teacher's states after some layers at every position of the training rows, [R, L, S, d_t] in its dtype."""
    found, dtype = [], next(teacher.parameters()).dtype
    teacher.eval()
    for start in range(0, len(samples), batch_size):
        batch, _ = batch_of(samples.take(np.arange(start, min(len(samples), start + batch_size))), text, album)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        with outputs(teacher.model.language_model, layers) as seen:
            teacher(**model_inputs(batch), use_cache=False, logits_to_keep=1)
        found.append(torch.stack([seen[number] for number in layers], 1))
    return torch.cat(found)


class PlacesTerm(VisualRelationTerm):
    """The relational term at the places of a `RelationObjective`, which also gives it the student's layers and the batch."""

    objective: RelationObjective
    seen: Mapping[int, Tensor]
    batch: Mapping[str, Any]

    def loss(self, micro_batch: MicroBatch, states: Capture, window: AccumulationWindow, weight: float) -> Tensor:
        """Return the micro-batch's share."""
        taught = self.objective.states[self.batch[SAMPLE_KEY]]
        loss = taught.new_zeros((), dtype=torch.float32)
        for kind in self.objective.kinds:
            index, sizes = tokens_of(self.batch["input_ids"], kind)
            for number, (layer, _) in enumerate(self.objective.layers):
                theirs = taught[:, number].flatten(0, 1).index_select(0, index)
                out = relational_loss(self.seen[layer].flatten(0, 1).index_select(0, index), theirs, sizes)
                share = out.loss_sum / len(self.objective.layers)
                window.sums.add(visual_distance=share)
                loss = loss + weight * share / window.counts["countable_images"].clamp(min=1.0)
        return loss


class RelationObjective(GraceObjective):
    """GraceObjective whose relational loss is on `layers` (student's, teacher's) and on the tokens `kinds` ("visual", "text").

    states: of the teacher after its layers, as `deep_states` gives them, for rows numbered as in the batch's sample keys.
    """

    layers: tuple[tuple[int, int], ...]
    kinds: tuple[str, ...]
    states: Tensor

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        self.places = PlacesTerm(self.relational)
        self.places.objective = self
        self.terms = (self.terms[0], self.places)

    def compute_loss(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        """GraceObjective's, with the outputs of the student's layers for the term."""
        text_model = self.context.family.text_model(self.student)
        with outputs(text_model, tuple(layer for layer, _ in self.layers)) as seen:
            self.places.seen, self.places.batch = seen, batch
            return super().compute_loss(model, batch)


def tokens_of(ids: Tensor, kind: str) -> tuple[Tensor, tuple[int, ...]]:
    """Flat positions [M] of a kind of token in ids [B, S], and how many each row has; text is what follows the image."""
    image = ids == IMAGE
    chosen = image if kind == "visual" else (image.cumsum(1) > 0) & ~image & (ids != PAD)
    return chosen.flatten().nonzero().squeeze(1), tuple(chosen.sum(1).tolist())
