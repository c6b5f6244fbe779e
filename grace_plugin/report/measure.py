"""Both models over the rows, batch by batch: sums by layer, one record by row, token by token only for the worst rows.

Kept at any time: one batch, B's decoder outputs of it, and one record of a few numbers for each row. Logits exist by chunk.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data import ConversationCollator
from grace_plugin.report.answers import answer_start
from grace_plugin.report.layers import LayerErrors
from grace_plugin.report.tokens import Tokens, compare_tokens, head_of
from grace_plugin.teacher.base import model_inputs, supervised_positions
from grace_plugin.vlm import Family, capture

__all__ = ["Measure", "RowDamage"]


@dataclass
class RowDamage:
    """What was found of one row, summed over its supervised tokens; kl in nats, kl_blind of the same tokens without pictures.

    start: tokens before its last answer. answers: what A and B say, where the row says what it accepts.
    """

    number: int
    tokens: int
    pictures: bool
    kl: float
    agree: int
    right_a: int
    right_b: int
    nll_a: float
    nll_b: float
    start: int
    kl_blind: float | None = None
    group: str = ""
    answers: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """KL per supervised token."""
        return self.kl / self.tokens


class Measure:
    """Runs B and A on batches of rows.

    Args:
        models: A and B, on one device.
        names: B's quantized linears.
        worst: rows whose tokens are kept.
    """

    def __init__(
        self, models: tuple[Any, Any], family: Family, vocabulary: int, names: list[str], collator: ConversationCollator,
        worst: int,
    ) -> None:  # fmt: skip
        self.models, self.family, self.collator, self.worst = models, family, collator, worst
        self.decoders = tuple(family.text_model(model) for model in models)
        self.heads = tuple(head_of(model, vocabulary) for model in models)
        self.layers = LayerErrors(*models, self.decoders, names)  # type: ignore[arg-type]
        self.records: dict[int, RowDamage] = {}
        self._heap: list[tuple[float, int, dict[str, list[Any]]]] = []

    @torch.no_grad()
    def _pass(self, batch: Mapping[str, Any], look: bool) -> tuple[Tokens, Tensor, Tensor]:
        """Both models on a batch: its supervised tokens, their rows and their ids, on the host."""
        device = self.models[0].device
        positions = supervised_positions(batch["labels"])
        targets = batch["labels"].flatten()[positions + 1]
        inputs = {key: value.to(device) for key, value in model_inputs(batch).items()}
        if look:
            visual = self.family.visual_tokens(self.models[0].config, batch).index
            self.layers.look_at(inputs["attention_mask"], visual.to(device))
        states = []
        for side, running in ((1, self.layers.running_b), (0, self.layers.running_a)):
            with capture(self.decoders[side]) as caught:
                if look:
                    with running():
                        self.models[side](**inputs, use_cache=False, logits_to_keep=1)
                else:
                    self.models[side](**inputs, use_cache=False, logits_to_keep=1)
            assert caught.final is not None
            states.append(caught.final.flatten(0, 1).index_select(0, positions.to(device)))
        found = compare_tokens(states[1], self.heads[0], states[0], self.heads[1], targets.to(device))
        return found, positions // batch["labels"].shape[1], targets

    def batch(self, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]], pictured: set[int]) -> None:
        """Measure rows with all they hold."""
        batch = self.collator(rows)
        tokens, owner, targets = self._pass(batch, look=True)
        for place, number in enumerate(numbers):
            own = Tokens(*(part[owner == place] for part in tokens))
            label = targets[owner == place]
            record = RowDamage(
                number, len(label), number in pictured, float(own.kl.sum()), int((own.top_a == own.top_b).sum()),
                int((own.top_a == label).sum()), int((own.top_b == label).sum()), float(own.nll_a.sum()),
                float(own.nll_b.sum()), answer_start(batch["labels"][place]),
            )  # fmt: skip
            self.records[number] = record
            parts = {"kl": own.kl, "label": label, "top_a": own.top_a, "top_b": own.top_b}
            heapq.heappush(self._heap, (record.mean, -number, {key: part.tolist() for key, part in parts.items()}))
            if len(self._heap) > self.worst:
                heapq.heappop(self._heap)

    def blind(self, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
        """Measure the same rows without their pictures; after `batch`."""
        tokens, owner, _ = self._pass(self.collator(rows), look=False)
        for place, number in enumerate(numbers):
            self.records[number].kl_blind = float(tokens.kl[owner == place].sum())

    def worst_rows(self) -> list[tuple[int, dict[str, list[Any]]]]:
        """Row numbers of the largest KL per token, largest first, with their tokens."""
        return [
            (-negative, tokens) for _, negative, tokens in sorted(self._heap, key=lambda one: one[:2], reverse=True)
        ]


def over(
    numbers: Sequence[int], batch_size: int, run: Callable[[list[int]], None], progress: Callable[[int], None]
) -> None:
    """Call `run` with batches of `numbers` in their order."""
    for first in range(0, len(numbers), batch_size):
        part = list(numbers[first : first + batch_size])
        run(part)
        progress(len(part))
