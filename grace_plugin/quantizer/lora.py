"""Low-rank adaptation under fake quantization: weight and update are added first, and their sum is quantized.

LoRA (arXiv 2106.09685). A layer's weight W is frozen, A [rank, in] and B [out, rank] train:

    w = W + alpha / rank * (B A)          in float32, by blocks of rows
    forward   the fake-quantized w, as `quantizer.fake_quant` defines it
    backward  dL/dB = alpha / rank * dL/dw A^T     dL/dA = alpha / rank * B^T dL/dw     dL/dtheta as there

`merged` is the sum that the forward pass quantizes, so codes taken from it at the end are those of a forward pass. A starts
uniform within 1 / sqrt(in), B at zero: the first forward pass is that of W alone. Nothing of the weight's size is kept for
backward but the weight itself: the sum is formed again, at the price of one more quantization.

Legend: weight [out, in]; lora_a [rank, in] and lora_b [out, rank], float32; theta [out, groups].
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grace_plugin.quantizer.fake_quant import (
    FakeQuantSpec,
    SavedWeights,
    WeightCache,
    gradients,
    make_spec,
    quantized,
)
from grace_plugin.quantizer.format import QuantFormat
from grace_plugin.quantizer.scales import compute_dtype, row_blocks, stored_scale

LORA_A, LORA_B = "lora_A", "lora_B"
"""Names of the two factors on a layer."""

LARGEST_WHOLE = 1 << 26
"""Weights of a layer that is summed in one piece on a GPU: 256 MiB of float32."""


def start_lora(linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
    """Register the factors on a layer; drawn on the host, so they do not depend on the device."""
    bound = linear.in_features**-0.5
    # PEFT's start: A uniform within 1 / sqrt(in), B zero, so that the first forward is that of the loaded weight
    lora_a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
    device = linear.weight.device
    linear.register_parameter(LORA_A, nn.Parameter(lora_a.to(device)))
    linear.register_parameter(LORA_B, nn.Parameter(torch.zeros(linear.out_features, rank, device=device)))


def factors(linear: nn.Linear) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of a layer that carries them."""
    return linear.get_parameter(LORA_A), linear.get_parameter(LORA_B)


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device)  # not on meta, where torch.autocast raises
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def _sum(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """w of some rows: the one addition that forward, backward and export share."""
    dtype = compute_dtype(weight)
    # autocast would form the sum in bfloat16, and codes at export would be others than those of training
    with _no_autocast(weight.device.type):
        return torch.addmm(weight.to(dtype), lora_b.to(dtype), lora_a.to(dtype), alpha=scaling)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows that are worked on at one time: all of a layer on a GPU, where each block costs ten launches."""
    if weight.is_cuda and weight.numel() <= LARGEST_WHOLE:
        yield slice(None)
    else:
        yield from row_blocks(*weight.shape)


@torch.no_grad()
def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float) -> Tensor:
    """Return W + scaling * B A [out, in] in float32 (float64 for a float64 weight), the bits that the forward quantizes."""
    found = torch.empty(weight.shape, dtype=compute_dtype(weight), device=weight.device)
    for rows in _blocks(weight):  # the forward pass's blocks: how a product rounds may depend on its shape
        found[rows] = _sum(weight[rows], lora_a, lora_b[rows], scaling)
    return found


class _FakeQuantizeMerged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        log_scale: Tensor,
        scaling: float,
        spec: FakeQuantSpec,
    ) -> Tensor:
        def compute() -> tuple[Tensor, Tensor]:
            value = torch.empty(weight.shape, dtype=spec.out_dtype, device=weight.device)
            for rows in _blocks(weight):
                total = _sum(weight[rows], lora_a, lora_b[rows], scaling)
                value[rows], _ = quantized(total, log_scale[rows], spec.fmt, spec.out_dtype)
            return value, stored_scale(log_scale, spec.fmt.stored_dtype)

        ctx.saved_weights = SavedWeights(weight, lora_a, lora_b, log_scale)
        ctx.settings = (scaling, spec.fmt)
        if spec.cache is None:
            return compute()[0]
        return spec.cache.get(weight, log_scale, spec.out_dtype, compute, lora_a, lora_b)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weight, lora_a, lora_b, log_scale = ctx.saved_weights.tensors()
        scaling, fmt = ctx.settings
        dtype = compute_dtype(weight)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = torch.zeros_like(lora_a, dtype=dtype), torch.empty_like(lora_b)
        grad_log_scale = torch.empty_like(log_scale)
        with _no_autocast(weight.device.type):
            # formed again, not saved: the sum has the size of the weight, in float32
            for rows in _blocks(weight):
                total = _sum(weight[rows], lora_a, lora_b[rows], scaling)
                scale = stored_scale(log_scale[rows], fmt.stored_dtype)
                grad, of_scale = gradients(total, scale, grad_out[rows].to(dtype), fmt, (True, True))
                assert grad is not None and of_scale is not None
                grad_log_scale[rows] = of_scale
                grad_b[rows] = (scaling * (grad @ lora_a.to(dtype).T)).to(grad_b.dtype)
                grad_a.addmm_(lora_b[rows].to(dtype).T, grad, alpha=scaling)
                if grad_weight is not None:
                    grad_weight[rows] = grad.to(weight.dtype)
        return grad_weight, grad_a.to(lora_a.dtype), grad_b, grad_log_scale, None, None


def fake_quantize_merged(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    log_scale: Tensor,
    fmt: QuantFormat,
    *,
    scaling: float,
    cache: WeightCache | None = None,
) -> Tensor:
    """Return w^ [out, in] of W + scaling * B A: :func:`fake_quantize` of the sum, differentiable by all four tensors.

    Args:
        weight: W [out, in], in the dtype it was loaded in.
        lora_a: A [rank, in], float32.
        lora_b: B [out, rank], float32.
        log_scale: theta [out, groups], float32.
        fmt: the format.
        scaling: alpha / rank.
        cache: as in :func:`fake_quantize`.

    Returns:
        w^ in the compute dtype (autocast's when on, else the weight's).

    Raises:
        ValueError: as :func:`fake_quantize`.
    """
    spec = make_spec(weight, log_scale, fmt, cache)
    value: Tensor = _FakeQuantizeMerged.apply(weight, lora_a, lora_b, log_scale, scaling, spec)
    return value
