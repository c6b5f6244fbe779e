"""Cross-entropy and gated decoupled distillation (GDKD), in one pass through both heads.

    sum CE / tokens  +  beta * sum g DKD / sum g        DKD = (alpha * TCKD + beta_dkd * NCKD) * T^2, g the confidence gate

Both read the student's logits, which exist for a chunk of positions at a time, so they are one term. Its weight is beta, which
the controller moves; cross-entropy has weight 1.

Legend: N supervised positions, d_s student width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace_plugin.losses import distillation_head, teacher_gates
from grace_plugin.objective.terms.base import Chart, LossTerm
from grace_plugin.objective.window import AccumulationWindow, MicroBatch, NamedSums
from grace_plugin.recipe import DistillRecipe
from grace_plugin.vlm import Capture

__all__ = ["HeadTerm"]


class HeadTerm(LossTerm):
    """Cross-entropy, and GDKD unless the recipe's `distill` block disables it."""

    name = "distill"
    recipe = DistillRecipe
    has_own_block = True
    counts = ("tokens", "gates")
    sums = ("ce", "gated_dkd", "gated_tckd", "gated_nckd")
    charts = (
        Chart("Cross-entropy", "nats a token", {"loss_ce": "CE"}),
        Chart(
            "Gated distillation",
            "nats a token",
            {"loss_gdkd": "GDKD", "ema": "its moving average (ema)"},
        ),
        Chart(
            "Parts of the distillation",
            "nats a token, gated, without their weights",
            {"loss_tckd": "TCKD", "loss_nckd": "NCKD"},
        ),
        Chart(
            "Weight of distillation",
            "beta; share of steps at a bound",
            {"beta": "beta", "share_at_bound": "share at bound"},
        ),
        Chart(
            "Gates",
            "quantiles over the step's tokens",
            {"gate_q05": "5 %", "gate_q50": "median", "gate_q95": "95 %"},
        ),
    )

    def __init__(self, config: DistillRecipe) -> None:
        super().__init__(config)
        self.needs_teacher = config.enabled
        self._gates: list[Tensor] = []

    def begin_step(self) -> None:
        """Forget the gates of the step before."""
        self._gates = []

    def prepare(self, micro_batch: MicroBatch, counts: NamedSums) -> None:
        """Count supervised tokens and gates; keep the gates [N] and the teacher's log-sum-exp [2, N]."""
        counts.add(tokens=micro_batch.positions.numel())
        teacher, asked = self.context.teacher, self.config
        if not asked.enabled or teacher is None or micro_batch.teacher is None:
            return
        weight, bias = teacher.head()
        gate, _, logsumexp = teacher_gates(
            micro_batch.teacher.final,
            weight,
            bias,
            micro_batch.targets,
            vocabulary=self.context.vocabulary,
            sharpness=asked.gate_sharpness,
            temperature=asked.temperature,
            chunk=asked.chunk,
            softcap=teacher.softcap,
        )
        counts.add(gates=gate.sum())
        self._gates.append(gate)
        micro_batch.prepared[self.name] = (gate, logsumexp)

    def weight(self, step: int) -> float:
        """Return the weight of distillation without a controller, 0: the objective gives it the controller's beta."""
        return 0.0

    def loss(self, micro_batch: MicroBatch, states: Capture, window: AccumulationWindow, weight: float) -> Tensor:
        """Return the micro-batch's share in nats, from the supervised positions alone."""
        assert states.final is not None
        hidden = states.final.flatten(0, 1).index_select(0, micro_batch.positions)
        device = hidden.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        head: Any = self.context.head
        out = distillation_head(
            hidden,
            head.weight,
            getattr(head, "bias", None),
            targets=micro_batch.targets,
            vocabulary=self.context.vocabulary,
            ce_weight=1.0 / window.counts["tokens"].clamp(min=1.0),
            # a window without a gate has no position either, so its sum is an exact 0 whatever it is divided by
            kd_weight=weight / window.counts["gates"].clamp(min=torch.finfo(torch.float32).tiny),
            temperature=self.config.temperature,
            alpha=self.config.alpha,
            beta_dkd=self.config.beta,
            chunk=self.config.chunk,
            # a bfloat16 head's gradient is summed in bfloat16 and the rows of targets, which get most of it, in float32: a
            # float32 matrix of the head's size would not fit next to it
            weight_grad_dtype=torch.bfloat16 if head.weight.dtype == torch.bfloat16 else None,
            **self._teacher_arguments(micro_batch),
        )
        window.sums.add(
            ce=out.ce_sum, gated_dkd=out.gated_dkd_sum, gated_tckd=out.gated_tckd_sum, gated_nckd=out.gated_nckd_sum
        )
        return out.loss

    def _teacher_arguments(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """Arguments of `distillation_head` that depend on the teacher; without one, cross-entropy is all that remains."""
        teacher = self.context.teacher
        gate, logsumexp = micro_batch.prepared.get(self.name, (None, None))
        softcap = self.context.family.softcap(self.context.student.config)
        if gate is None or teacher is None or micro_batch.teacher is None:
            return {"hidden_t": None, "weight_t": None, "bias_t": None, "gate": None, "softcaps": (softcap, None)}
        weight, bias = teacher.head()
        return {
            "hidden_t": micro_batch.teacher.final,
            "weight_t": weight,
            "bias_t": bias,
            "gate": gate,
            "teacher_logsumexp": logsumexp,
            "softcaps": (softcap, teacher.softcap),
        }

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return means per token and, for the gated sums, per gate."""
        per_token = 1.0 / max(totals["tokens"], 1.0)
        per_gate = 1.0 / totals["gates"] if totals["gates"] > 0 else 0.0
        return {
            "loss_ce": totals["ce"] * per_token,
            "loss_gdkd": totals["gated_dkd"] * per_gate,
            "loss_tckd": totals["gated_tckd"] * per_gate,
            "loss_nckd": totals["gated_nckd"] * per_gate,
            "supervised_tokens": int(totals["tokens"]),
            "gate_mean": totals["gates"] * per_token,
        }

    def logs(self, step: int) -> dict[str, float]:
        """Return the 5th, 50th and 95th percentile of this rank's gates in the latest step."""
        gates = torch.cat(self._gates) if self._gates else torch.empty(0)
        if gates.numel() == 0:
            return {}
        levels = torch.tensor([0.05, 0.5, 0.95], device=gates.device, dtype=gates.dtype)
        return dict(zip(("gate_q05", "gate_q50", "gate_q95"), torch.quantile(gates, levels).tolist(), strict=True))
