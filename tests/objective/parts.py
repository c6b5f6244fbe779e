"""A student, a bigger teacher and the objective between them, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grace_plugin.data import ConversationCollator
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer import QuantFormat, attach
from grace_plugin.upstream import match_named_modules
from grace_plugin.vlm import family_of
from tests.tiny import build


class Set:
    """A student, a bigger teacher and an objective between them."""

    def __init__(self, family: str = "llava", *, steps: int = 100, quantized: bool = False, **blocks: Any) -> None:
        self.student, self.processor = build(family, seed=0)
        self.teacher, _ = build(family, seed=1, hidden=512, layers=4, vocab_rows=400)
        self.size = len(self.processor.tokenizer)
        self.collate = ConversationCollator(self.processor)
        self.grace = GraceObjective(**blocks)
        self.attached = []
        if quantized:
            linears = dict(match_named_modules(self.student, ["Linear"], family_of(self.student).quantization_ignore()))
            self.attached = [attach(linears, QuantFormat(4, 128))]
        self.grace.prepare(self.student, self.teacher, vocabulary=self.size, total_steps=steps, attached=self.attached)

    def step(self, *batches: dict[str, Tensor], skipped: bool = False) -> tuple[Tensor, Any]:
        """One optimizer step without an optimizer: the window's loss, differentiable, and its record."""
        self.grace.begin_step(batches)
        loss = torch.stack([self.grace.compute_loss(self.student, batch) for batch in batches]).sum()
        record = self.grace.reduce_metrics()
        self.grace.end_step(skipped=skipped)
        return loss, record

    def gradients(self, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
        loss, _ = self.step(*batches)
        self.student.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}
