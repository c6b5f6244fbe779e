"""Plain distillation, KL(teacher || student) * T^2, in the place of the decoupled divergence: for baselines and one ablation.

With gate_sharpness 0, no relation and a fixed beta it is textbook distillation: mean CE + beta * mean KL. Everything else of
GRACE (gate, relation, controller) works on it as on the decoupled one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from grace_plugin.objective import GraceObjective
from grace_plugin.objective.terms import visual_term
from grace_plugin.teacher import model_inputs
from grace_plugin.vlm import capture

__all__ = ["PlainObjective"]


class PlainObjective(GraceObjective):
    """GraceObjective with KL in place of `alpha * TCKD + beta * NCKD`; the recorded gdkd is the mean of KL * T^2."""

    def loss(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        item = self._window.pending.pop(0)
        with capture(self._text_model) as caught:
            model(**model_inputs(batch), use_cache=False, logits_to_keep=1)
        assert caught.final is not None and caught.penultimate is not None
        assert item.teacher is not None and item.gate is not None and self.teacher is not None
        counts, sums = self._window.opened()
        hidden = caught.final.flatten(0, 1).index_select(0, item.positions)
        logits = self.student.get_output_embeddings()(hidden)[:, : self.vocabulary].float()  # type: ignore[operator]
        weight, _ = self.teacher.head()
        taught = (item.teacher.final @ weight.T)[:, : self.vocabulary].float()
        hot = self.distill.temperature
        each = kl_div(
            log_softmax(logits / hot, -1), log_softmax(taught / hot, -1), reduction="none", log_target=True
        ).sum(-1)
        ce = cross_entropy(logits, item.targets, reduction="sum")
        gated = (item.gate * each).sum() * hot**2
        loss = ce / counts[0].clamp(min=1.0) + self.beta * gated / counts[1].clamp(min=torch.finfo(torch.float32).tiny)
        sums[:2] += torch.stack([ce, gated]).detach()
        if self.relational.enabled:
            loss = loss + visual_term(self._window, item, caught.penultimate, omega=self.omega)
        if not self._window.pending:
            self._window.close()
        return loss
