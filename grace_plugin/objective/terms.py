"""The terms of one micro-batch: heads with cross-entropy and distillation, and the relation of visual tokens.

Both divide by the window's divisors and add what they saw to the window's sums; nothing is synchronised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grace_plugin.losses.head import distillation_head
from grace_plugin.losses.relational import relational_loss
from grace_plugin.objective.window import AccumulationWindow, MicroBatch
from grace_plugin.recipe import DistillRecipe
from grace_plugin.teacher import Teacher

__all__ = ["check_gradient", "head_term", "visual_term"]

NO_GRADIENT = (
    "the decoder's hidden states carry no gradient; leave some of the decoder trainable (training.freeze), and use "
    "non-reentrant activation checkpointing (gradient_checkpointing_kwargs={'use_reentrant': False})"
)


def check_gradient(states: Sequence[Tensor]) -> None:
    """RuntimeError when a loss that is to be differentiated reads hidden states without a gradient."""
    if torch.is_grad_enabled() and not all(state.requires_grad for state in states):
        raise RuntimeError(NO_GRADIENT)


def head_term(
    window: AccumulationWindow,
    item: MicroBatch,
    final: Tensor,
    head: Any,
    teacher: Teacher | None,
    *,
    asked: DistillRecipe,
    vocabulary: int,
    beta: float,
    softcap: float | None = None,
) -> Tensor:
    """sum CE / N + beta * sum g DKD / sum g of a micro-batch, in nats.

    The gradient of a head that trains in bfloat16 is summed in bfloat16, what targets add to their own rows in float32 at the
    end: no second matrix of the head's size is held. A float32 head's is summed in float32.

    Args:
        final: the student's normed hidden states [B, S, d_s]; only supervised positions reach the head.
        head: the student's output embedding.
        teacher: None for cross-entropy alone.
        softcap: of the student's logits.
    """
    counts, sums = window.opened()
    hidden = final.flatten(0, 1).index_select(0, item.positions)
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    weight_t, bias_t, hidden_t, softcap_t = None, None, None, None
    if item.gate is not None and item.teacher is not None and teacher is not None:
        (weight_t, bias_t), hidden_t, softcap_t = teacher.head(), item.teacher.final, teacher.softcap
    tiny = torch.finfo(torch.float32).tiny  # a window without a gate has no position either: the sum is an exact 0
    out = distillation_head(
        hidden, head.weight, getattr(head, "bias", None), hidden_t, weight_t, bias_t, item.targets, item.gate,
        vocabulary=vocabulary, ce_scale=1.0 / counts[0].clamp(min=1.0), kd_scale=beta / counts[1].clamp(min=tiny),
        temperature=asked.temperature, alpha=asked.alpha, beta_dkd=asked.beta, chunk=asked.chunk,
        known=item.known, softcaps=(softcap, softcap_t),
        weight_grad_dtype=torch.bfloat16 if head.weight.dtype == torch.bfloat16 else None,
    )  # fmt: skip
    sums[:4] += torch.stack([out.ce_sum, out.gated_dkd_sum, out.gated_tckd_sum, out.gated_nckd_sum])
    return out.loss


def visual_term(window: AccumulationWindow, item: MicroBatch, penultimate: Tensor, *, omega: float) -> Tensor:
    """omega * sum (1 - CKA) / I of a micro-batch; an exact, differentiable zero without images.

    Args:
        penultimate: the student's output of decoder layer L-2, [B, S, d_s].
    """
    counts, sums = window.opened()
    if item.teacher is None:
        return penultimate.new_zeros((), dtype=torch.float32)
    hidden = penultimate.flatten(0, 1).index_select(0, item.visual.index)
    out = relational_loss(hidden, item.teacher.visual, item.visual.sizes)
    sums[4] += out.loss_sum.detach()
    sums[5] += out.skipped
    return omega * out.loss_sum / counts[2].clamp(min=1.0)
