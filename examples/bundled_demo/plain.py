"""Use plain KL(teacher || student) * T^2 instead of the decoupled divergence, for baselines and one ablation.

With gate_sharpness 0, no relational loss and a fixed beta it is standard distillation: mean CE + beta * mean KL. The gate, the
relational loss and the controller work on it as on the decoupled divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from grace_plugin.objective import GraceObjective
from grace_plugin.objective.terms import HeadTerm
from grace_plugin.objective.window import AccumulationWindow, MicroBatch
from grace_plugin.vlm import Capture

__all__ = ["PlainObjective"]


class PlainHeadTerm(HeadTerm):
    """Cross-entropy and gated KL * T^2 of the full logits."""

    def loss(self, micro_batch: MicroBatch, states: Capture, window: AccumulationWindow, weight: float) -> Tensor:
        """Return the micro-batch's share in nats."""
        assert states.final is not None and micro_batch.teacher is not None and self.context.teacher is not None
        hidden = states.final.flatten(0, 1).index_select(0, micro_batch.positions)
        logits = self.context.head(hidden)[:, : self.context.vocabulary].float()
        head, _ = self.context.teacher.head()
        taught = (micro_batch.teacher.final @ head.T)[:, : self.context.vocabulary].float()
        hot = self.config.temperature
        each = kl_div(
            log_softmax(logits / hot, -1), log_softmax(taught / hot, -1), reduction="none", log_target=True
        ).sum(-1)
        gate, _ = micro_batch.prepared[self.name]
        ce, gated = cross_entropy(logits, micro_batch.targets, reduction="sum"), (gate * each).sum() * hot**2
        window.sums.add(ce=ce, gated_dkd=gated)
        tokens, gates = window.counts["tokens"], window.counts["gates"]
        return ce / tokens.clamp(min=1.0) + weight * gated / gates.clamp(min=torch.finfo(torch.float32).tiny)


class PlainObjective(GraceObjective):
    """GraceObjective with KL in place of `alpha * TCKD + beta * NCKD`; the recorded gdkd is the mean of KL * T^2."""

    head_term = PlainHeadTerm
