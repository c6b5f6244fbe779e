"""Language-model head, cross-entropy and distillation in one pass by chunk of positions.

Only supervised positions reach the head (a tenth of a usual image conversation), ``chunk`` at a time: logits of student and
teacher, both losses, and the gradient by the logits are formed for a chunk, multiplied back onto hidden state and weight at
once, and dropped. The forward pass thus already holds every gradient; the backward pass multiplies by the incoming one.

    loss = ce_weight * sum_i CE_i  +  kd_weight * sum_i gate_i * DKD_i

Memory is the logits of a chunk, whatever N is: with Triton one matrix [chunk, V] and half of one in the dtype of the hidden
state, in torch about six float32 matrices; and one gradient [V_s, d_s] when the student's head is trained. Matrix products
run in the dtype of the hidden state; everything between them runs in float32. Both sides are cut to the common vocabulary,
so padded rows carry no probability mass.

Legend: N supervised positions, V common vocabulary, V_s and V_t rows of each head, d_s and d_t hidden widths. Nats.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grace_plugin.losses import fused_head_triton
from grace_plugin.losses.distill import (
    check_temperature,
    confidence_gate,
    full_precision,
    gate_of_entropy,
    loss_dtype,
)
from grace_plugin.losses.entropy_triton import StreamingEntropy
from grace_plugin.losses.fused_head_chunks import (
    Gradients,
    Head,
    HeadSettings,
    TeacherSide,
    capped,
    cut,
    defers_target_rows,
    eager_chunks,
    fused_chunks,
    positions_per_chunk,
)
from grace_plugin.losses.math_triton import multiply_in_place


@dataclass(frozen=True)
class HeadOutput:
    """The loss of N positions, and its parts as detached sums on the same device (0-dimensional)."""

    loss: Tensor  # differentiable by hidden_s, weight_s, bias_s
    ce_sum: Tensor  # sum of CE, nats
    gated_dkd_sum: Tensor  # sum of gate * DKD, nats
    gated_tckd_sum: Tensor  # sum of gate * TCKD at T, without alpha and T^2
    gated_nckd_sum: Tensor  # sum of gate * NCKD at T, without beta_dkd and T^2
    gate_sum: Tensor  # sum of gates
    positions: int  # N


def _check_head(
    side: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary: int,
    chunk: int,
    cap: float | None = None,
) -> None:
    """Raise ValueError for a head that does not fit hidden states or vocabulary, or a bad cap; the message names ``side``."""
    if cap is not None and not (math.isfinite(cap) and cap > 0):
        raise ValueError(
            f"{side}: logits are capped at a positive finite number, got {cap}; None leaves them as they are"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, got {chunk}")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{side}: hidden states {tuple(hidden.shape)} do not fit a head of {tuple(weight.shape)}; "
            "give [positions, width] and [rows, width]"
        )
    if not 1 <= vocabulary <= weight.shape[0] or (bias is not None and bias.shape[0] < vocabulary):
        raise ValueError(
            f"{side}: a head of {weight.shape[0]} rows does not hold a common vocabulary of {vocabulary} ids; "
            "pass the number of ids both tokenizers share"
        )


def _check_rows(name: str, given: Tensor, hidden_s: Tensor) -> None:
    """Raise ValueError when ``given`` has not one row per student position."""
    if given.shape[0] != hidden_s.shape[0]:
        raise ValueError(f"{given.shape[0]} {name} for {hidden_s.shape[0]} student positions; give one per position")


@torch.no_grad()
def teacher_gates(
    hidden_t: Tensor,
    weight_t: Tensor,
    bias_t: Tensor | None,
    targets: Tensor | None = None,
    *,
    vocabulary: int,
    sharpness: float = 1.0,
    temperature: float = 2.0,
    chunk: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return gate and entropy of the teacher's positions from its final hidden states, by chunk, and its log-sum-exp.

    Args:
        hidden_t: [N, d_t], final (normed) hidden states at the supervised positions.
        weight_t: [V_t, d_t], V_t >= vocabulary.
        bias_t: [V_t] or None.
        targets: [N] int64; None leaves the log-sum-exp out.
        vocabulary: V, ids that both tokenizers share; further rows are cut.
        sharpness: exponent of the gate.
        temperature: of the divergences.
        chunk: positions whose logits exist at one time; None for :func:`positions_per_chunk`.
        softcap: c where the model's logits are c * tanh(logits / c); None for none.

    Returns:
        Gate [N], entropy [N] (nats), and the ``teacher_logsumexp`` that `distillation_head` takes: [2, N] float32 (the log of
        the sum of exp(z / temperature) over v != y, and the logit of y), or None where Triton does not run.

    Raises:
        ValueError: the head does not fit the hidden states or the vocabulary.
    """
    chunk = positions_per_chunk(vocabulary, hidden_t.element_size()) if chunk is None else chunk
    _check_head("teacher", hidden_t, weight_t, bias_t, vocabulary, chunk, softcap)
    dtype = loss_dtype(hidden_t)
    positions, found = hidden_t.shape[0], None
    gate = torch.empty(positions, dtype=dtype, device=hidden_t.device)
    entropy, teacher_logsumexp = torch.empty_like(gate), None
    if dtype == torch.float32 and fused_head_triton.usable(hidden_t.new_empty(0, vocabulary)):
        # entropies of blocks are summed up at the end, so that logits are read once
        found = StreamingEntropy(positions, vocabulary, hidden_t.device, softcap, targets, temperature)
    with full_precision(hidden_t):
        head = cut(hidden_t, weight_t, bias_t, vocabulary, softcap)
        for start in range(0, positions, chunk):
            rows = slice(start, start + chunk)
            logits = head.logits(hidden_t[rows])
            if found is not None:
                found.update(logits, start)
            else:
                gate[rows], entropy[rows] = confidence_gate(capped(logits.to(dtype), softcap), sharpness)
        if found is not None:
            nats, ids, teacher_logsumexp = found.finalize()
            gate, entropy = gate_of_entropy(nats, ids, sharpness)
    return gate, entropy, teacher_logsumexp


def _constant(factor: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of a loss as a 0-dimensional tensor on the device of ``like``; a number is written there by the device."""
    if isinstance(factor, Tensor):
        return factor.detach().to(device=like.device, dtype=dtype)
    return torch.full((), factor, dtype=dtype, device=like.device)


class _DistillationHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_s: Tensor,
        weight_s: Tensor,
        bias_s: Tensor | None,
        student: Head,
        teacher: TeacherSide | None,
        targets: Tensor,
        loss_weights: Tensor,
        settings: HeadSettings,
    ) -> tuple[Tensor, Tensor]:
        # gradients are formed in the forward pass, and only those that backward will be asked for
        needs = [settings.form_gradients and need for need in ctx.needs_input_grad[:3]]
        dtype = settings.weight_grad_dtype
        deferred = targets if defers_target_rows(hidden_s, weight_s, student.weight.shape[0], dtype) else None
        gradients = Gradients(hidden_s, weight_s, bias_s, needs, settings.dtype, dtype, deferred)
        fits = settings.dtype == torch.float32 and fused_head_triton.usable(
            hidden_s.new_empty(0, student.weight.shape[0])
        )
        run = fused_chunks if fits else eager_chunks
        ctx.in_place, ctx.used = fits, False
        sums = run(hidden_s, student, teacher, targets, loss_weights, settings, gradients if any(needs) else None)
        # gradients, not logits: logits of all positions are 2.3 GiB at 4,096 x 151,936 in float32
        ctx.save_for_backward(*gradients.all())
        # the parts are for logs and the controller; a gradient through them would count twice
        ctx.mark_non_differentiable(sums)
        return (loss_weights * sums[:2]).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.in_place:
            scaled = [None if grad is None else grad * grad_loss for grad in ctx.saved_tensors]
            return *scaled, None, None, None, None, None
        # what was saved is multiplied in place and given to autograd, so there is nothing left for a second backward
        if ctx.used:
            raise RuntimeError("the gradients of this loss were used by an earlier backward; compute the loss again")
        ctx.used = True
        for grad in ctx.saved_tensors:
            if grad is not None:
                multiply_in_place(grad, grad_loss)
        return *ctx.saved_tensors, None, None, None, None, None


def distillation_head(
    hidden_s: Tensor,
    weight_s: Tensor,
    bias_s: Tensor | None,
    hidden_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    targets: Tensor,
    gate: Tensor | None,
    *,
    vocabulary: int,
    ce_weight: Tensor | float,
    kd_weight: Tensor | float = 0.0,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta_dkd: float = 4.0,
    chunk: int | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    teacher_logsumexp: Tensor | None = None,
    softcaps: tuple[float | None, float | None] = (None, None),
) -> HeadOutput:
    """Return cross-entropy plus gated decoupled distillation of N positions, from hidden states, by chunk.

    The divisors (tokens and gates of the whole accumulation window over all ranks) are part of the two weights, so the sum
    over micro-batches does not depend on how the window was divided.

    Args:
        hidden_s: [N, d_s], the student's final (normed) hidden states, bfloat16 or float32.
        weight_s: [V_s, d_s]; its gradient is formed only when it requires one.
        bias_s: [V_s] or None.
        hidden_t: [N, d_t], or None for cross-entropy alone (then weight_t, bias_t, gate and kd_weight are not used).
        weight_t: [V_t, d_t].
        bias_t: [V_t] or None.
        targets: [N] int64 inside [0, vocabulary).
        gate: [N], from :func:`teacher_gates`.
        vocabulary: V, ids that both tokenizers share; further rows of either head are cut, for CE as well.
        ce_weight: weight of the CE sum, number or 0-dimensional tensor on the device (a constant: no gradient).
        kd_weight: weight of the gated DKD sum, for instance beta / sum of gates (a constant).
        temperature: T of both divergences.
        alpha: weight of TCKD.
        beta_dkd: weight of NCKD.
        chunk: positions whose logits exist at one time; None for :func:`positions_per_chunk`.
        weight_grad_dtype: what the gradient of the head is summed in over chunks, by default float32, which takes 4 bytes a
            weight in addition to the gradient. The dtype of a bfloat16 head saves them and rounds the sum once per chunk; where
            targets are few (`defers_target_rows`) what they add to their own rows, the most, comes last and is rounded once.
        teacher_logsumexp: of :func:`teacher_gates` for the same targets and temperature; the teacher's logits are then formed
            by slices of the vocabulary, and more positions fit into a chunk.
        softcaps: c of student and teacher whose logits are c * tanh(logits / c); None for none.

    Returns:
        :class:`HeadOutput`; N == 0 gives an exact zero through which backward still runs.

    Raises:
        ValueError: shapes that do not fit, a vocabulary a head does not hold, or a teacher without head or gate.
    """
    check_temperature(temperature)
    if chunk is None:
        positions = 0 if teacher_logsumexp is None or hidden_t is None else hidden_s.shape[0]
        chunk = positions_per_chunk(vocabulary, hidden_s.element_size(), positions)
    _check_head("student", hidden_s, weight_s, bias_s, vocabulary, chunk, softcaps[0])
    _check_rows("targets", targets, hidden_s)
    with full_precision(hidden_s):
        student = cut(hidden_s, weight_s, bias_s, vocabulary, softcaps[0])
        teacher = None
        dtype = loss_dtype(hidden_s, hidden_t)
        if hidden_t is not None:
            if weight_t is None or gate is None:
                raise ValueError("hidden_t is given without weight_t or gate; pass both, or hidden_t=None for CE alone")
            _check_head("teacher", hidden_t, weight_t, bias_t, vocabulary, chunk, softcaps[1])
            _check_rows("teacher hidden states", hidden_t, hidden_s)
            _check_rows("gates", gate, hidden_s)
            # a constant, whatever graph the caller has left on it
            head_t = cut(hidden_t, weight_t, bias_t, vocabulary, softcaps[1])
            teacher = TeacherSide(
                hidden_t.detach(), head_t, gate.detach().to(hidden_s.device, dtype), teacher_logsumexp
            )
        # on the device: the weights are quotients of counts that no host has read
        loss_weights = torch.stack([_constant(factor, hidden_s, dtype) for factor in (ce_weight, kd_weight)])
        settings = HeadSettings(temperature, alpha, beta_dkd, chunk, torch.is_grad_enabled(), dtype, weight_grad_dtype)
        loss, sums = _DistillationHead.apply(
            hidden_s, weight_s, bias_s, student, teacher, targets, loss_weights, settings
        )
    gate_sum = sums.new_zeros(()) if teacher is None else teacher.gate.sum()
    ce_sum, dkd_sum, tckd_sum, nckd_sum = sums.detach().unbind()
    return HeadOutput(loss, ce_sum, dkd_sum, tckd_sum, nckd_sum, gate_sum, hidden_s.shape[0])
