"""Fake quantization with learned group scales: the shipped weight in the forward pass, a gradient in the backward one.

What it does (LSQ with scales in the log domain). With s = exp(theta) rounded to the stored dtype and v = w / s,

    codes     q = clip(round(v), q_min, q_max)                    round half to even, division in float32
    forward   w^ = q * s                                          product rounded to the stored dtype
    backward  dL/dw     = dL/dw^ where the clip does not act, 0 where it does
              dL/ds     = sum over the group of dL/dw^ * (q - v) where it does not act, dL/dw^ * q where it does
              dL/dtheta = s * dL/ds

"The clip acts" means round(v) lies outside [q_min, q_max]. The forward value is, bit for bit, what compressed-tensors
unpacks from the saved codes and scales.

What it refuses. Formats whose codes do not survive being saved (``check_format``), scales that do not fit the weight,
and a compute dtype (the weight's, or autocast's) that cannot hold the stored dtype's numbers.

What it costs. Nothing of the weight's size is kept for backward but the weight itself: codes are computed again, in
blocks of rows, or in one kernel where Triton runs. One quantization per call unless a :class:`WeightCache` is given: then
once per optimizer step. The backward is linear in dL/dw^ while weight and scale stand still, so it too can wait for the sum
over micro-batches: with ``defer`` the weight's gradient is dL/dw^ itself until `grouped.finalize_deferred_grads` is called,
once per step.

Legend: weight [out, in]; log_scale theta [out, groups]; a group is in / groups neighbours of a row.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from grace_plugin.quantizer import fake_quant_triton
from grace_plugin.quantizer.cache import WeightCache
from grace_plugin.quantizer.kept import Kept
from grace_plugin.quantizer.scales import (
    check_fit,
    check_format,
    check_shapes,
    code_range,
    compute_dtype,
    forward_dtype,
    holds,
    row_blocks,
    stored_scale,
)


def _unrounded(weight: Tensor, scale: Tensor) -> Tensor:
    """v = w / s [rows, groups, group_size]: the one division that forward, backward and export share."""
    return weight.to(compute_dtype(weight)).unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(2)


@torch.no_grad()
def codes(weight: Tensor, log_scale: Tensor, *, num_bits: int, stored_dtype: torch.dtype) -> Tensor:
    """The integers the checkpoint holds: int8 [out, in], in [-2^(b-1), 2^(b-1) - 1].

    Args:
        weight: [out, in], any floating type.
        log_scale: theta [out, groups].
        num_bits: 2..8.
        stored_dtype: dtype of the checkpoint's scales.

    Raises:
        ValueError: a format that cannot be saved, or scales that do not fit.
    """
    check_format(num_bits, stored_dtype)
    check_shapes(weight, log_scale)
    smallest, largest = code_range(num_bits)
    scale = stored_scale(log_scale, stored_dtype)
    found = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_blocks(*weight.shape):
        found[rows] = _unrounded(weight[rows], scale[rows]).round_().clamp_(smallest, largest).flatten(1)
    return found


@torch.no_grad()
def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """code * scale rounded to the scale's dtype [out, in]: compressed-tensors' own product.

    Args:
        codes: int8 [out, in].
        scale: [out, groups] in the stored dtype.

    Raises:
        ValueError: scales that do not fit.
    """
    check_shapes(codes, scale)
    return (codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)).flatten(1)


@torch.no_grad()
def clipped(weight: Tensor, log_scale: Tensor, *, num_bits: int, stored_dtype: torch.dtype) -> Tensor:
    """How many weights the clip acts on: 0-dimensional int64 on the weight's device."""
    smallest, largest = code_range(num_bits)
    scale = stored_scale(log_scale, stored_dtype)
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    for rows in row_blocks(*weight.shape):
        rounded = _unrounded(weight[rows], scale[rows]).round_()
        count += ((rounded < smallest) | (rounded > largest)).sum()
    return count


def gradients(
    weight: Tensor, scale: Tensor, grad_out: Tensor, num_bits: int, needs: tuple[bool, bool], into: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and log_scale, each where it is needed; the weight's may be written over ``grad_out``."""
    grad_weight = into if into is not None or not needs[0] else torch.empty_like(weight)
    grad_log_scale = torch.empty(scale.shape, dtype=compute_dtype(weight), device=scale.device) if needs[1] else None
    if fake_quant_triton.usable(weight, scale.dtype):
        grad_out = grad_out.contiguous()
        fake_quant_triton.backward(weight, scale, grad_out, code_range(num_bits), grad_weight, grad_log_scale)
    else:
        _backward_in_torch(weight, scale, grad_out, code_range(num_bits), grad_weight, grad_log_scale)
    return grad_weight, grad_log_scale


def _backward_in_torch(
    weight: Tensor,
    scale: Tensor,
    grad_out: Tensor,
    limits: tuple[int, int],
    grad_weight: Tensor | None,
    grad_log_scale: Tensor | None,
) -> None:
    """Fill the gradients that are not None, in blocks of rows; ``grad_weight`` may be ``grad_out``."""
    smallest, largest = limits
    for rows in row_blocks(*weight.shape):
        unrounded = _unrounded(weight[rows], scale[rows])
        rounded = unrounded.round()
        inside = (rounded >= smallest) & (rounded <= largest)
        grad = grad_out[rows].unflatten(1, (scale.shape[1], -1))
        if grad_log_scale is not None:
            step = rounded.clamp_(smallest, largest).sub_(torch.where(inside, unrounded, 0.0))
            grad_log_scale[rows] = (grad * step).sum(dim=2) * scale[rows]
        if grad_weight is not None:
            grad_weight[rows] = torch.where(inside, grad, 0.0).flatten(1)


def quantized(
    weight: Tensor, log_scale: Tensor, num_bits: int, stored_dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """w^ [out, in] in ``out_dtype`` and the stored scales [out, groups]."""
    if fake_quant_triton.usable(weight, stored_dtype):
        return fake_quant_triton.forward(weight, log_scale, stored_dtype, code_range(num_bits), out_dtype)
    scale = stored_scale(log_scale, stored_dtype)
    found = codes(weight, log_scale, num_bits=num_bits, stored_dtype=stored_dtype)
    return dequantize(found, scale).to(out_dtype), scale


class FakeQuantSpec(NamedTuple):
    """What a weight is quantized to, in what dtype, and how its value and gradients come about."""

    num_bits: int
    stored_dtype: torch.dtype
    out_dtype: torch.dtype
    cache: WeightCache | None
    defer: bool

    def value(self, weight: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """w^ [out, in] and the stored scales [out, groups], from the cache when there is one."""

        def compute() -> tuple[Tensor, Tensor]:
            return quantized(weight, log_scale, self.num_bits, self.stored_dtype, self.out_dtype)

        return compute() if self.cache is None else self.cache.get(weight, log_scale, self.out_dtype, compute)

    def gradients(
        self, weight: Tensor, log_scale: Tensor, scale: Tensor, grad_value: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and log_scale from dL/dw^; deferred, what `finalize_deferred_grads` makes them of."""
        if self.defer:
            # DDP waits for a gradient of every parameter; elsewhere `finalize_deferred_grads` makes the scale's from nothing
            shared = dist.is_available() and dist.is_initialized()
            return grad_value, torch.zeros_like(log_scale) if shared else None
        return gradients(weight, scale, grad_value, self.num_bits, needs)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor, how: FakeQuantSpec) -> Tensor:
        value, scale = how.value(weight, log_scale)
        ctx.kept, ctx.how = Kept(weight, log_scale, scale), how
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.how.gradients(*ctx.kept.tensors(), grad_out, ctx.needs_input_grad[:2]), None)


def fake_quantize(
    weight: Tensor,
    log_scale: Tensor,
    *,
    group_size: int | None,
    num_bits: int,
    stored_dtype: torch.dtype,
    cache: WeightCache | None = None,
    defer: bool = False,
) -> Tensor:
    """w^ [out, in]: the weight as the checkpoint will hold it, differentiable by weight and log_scale.

    Args:
        weight: [out, in], float32 or bfloat16 (float64 in tests).
        log_scale: theta [out, in / group_size], float32.
        group_size: weights that share a scale; None or -1 for one scale per row.
        num_bits: 2..8.
        stored_dtype: dtype of the checkpoint's scales.
        cache: reuse of the value while neither weight nor scale has changed.
        defer: give the weight dL/dw^ as its gradient and the scale none (zeros under DDP), until
            `grouped.finalize_deferred_grads` is called on
            both; they must be leaves that both want a gradient.

    Returns:
        w^ in the compute dtype (autocast's when on, else the weight's); equal to ``dequantize(codes(...), ...)``.

    Raises:
        ValueError: a format that cannot be saved, scales that do not fit, or a compute dtype that would round w^.
    """
    how = checked(weight, log_scale, group_size, num_bits, stored_dtype, cache, defer)
    value: Tensor = _FakeQuantize.apply(weight, log_scale, how)
    return value


def checked(
    weight: Tensor,
    log_scale: Tensor,
    group_size: int | None,
    num_bits: int,
    stored_dtype: torch.dtype,
    cache: WeightCache | None,
    defer: bool,
) -> FakeQuantSpec:
    """The arguments of :func:`fake_quantize`, looked at."""
    check_fit(weight, log_scale, group_size, num_bits, stored_dtype)
    out_dtype = forward_dtype(weight)
    if not holds(out_dtype, stored_dtype):
        raise ValueError(
            f"the layer computes in {out_dtype}, which cannot hold weights stored as {stored_dtype}: training would "
            f"not see what is shipped; train in {stored_dtype} or float32, or store as {out_dtype}"
        )
    return FakeQuantSpec(num_bits, stored_dtype, out_dtype, cache, defer)
