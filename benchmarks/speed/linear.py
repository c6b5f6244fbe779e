"""A linear layer with learned INT4 scales beside the plain layer: quantized at every call, and once for 16 micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.speed.timing import graphed, median_ms
from grace_plugin.quantizer.attach import attach

__all__ = ["linear"]

MICRO_BATCHES = 16


def _times(
    tokens: int, outputs: int, inputs: int, device: str, weight: torch.dtype, quantized: bool
) -> dict[str, float]:
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(tokens, inputs, device=device, dtype=compute, requires_grad=True)
    grad = torch.randn(tokens, outputs, device=device, dtype=compute)
    layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=weight)

    def pass_once() -> tuple[torch.Tensor, ...]:
        with torch.autocast(device, dtype=compute, enabled=weight != compute, cache_enabled=False):
            out = layer(x)
        return torch.autograd.grad(out, [x, *layer.parameters()], grad)

    attached = attach({"layer": layer}, group_size=128, cache=False) if quantized else None
    found = {"once_ms": median_ms(graphed(pass_once)), "once_with_host_ms": median_ms(pass_once)}
    if attached is not None:
        attached.detach()
        attached = attach({"layer": layer}, group_size=128)
        attached.defer()
    sums = [torch.zeros_like(parameter) for parameter in layer.parameters()]

    def accumulate() -> None:
        if attached is not None:
            attached.invalidate()
        for _ in range(MICRO_BATCHES):
            for total, part in zip(sums, pass_once()[1:], strict=True):
                total += part
        if attached is not None:
            for parameter, total in zip(layer.parameters(), sums, strict=True):
                parameter.grad = total
            attached.settle()
            for parameter in layer.parameters():
                parameter.grad = None

    found["of_16_ms"] = median_ms(graphed(accumulate), 10) / MICRO_BATCHES
    if attached is not None:
        attached.detach()
    return found


def linear(tokens: int, shapes: list[tuple[int, int]], device: str) -> list[dict[str, Any]]:
    """Per shape and weight dtype: milliseconds of the plain and of the quantized layer, forward and backward.

    A bfloat16 weight is compared with a bfloat16 layer, a float32 master with the same layer under autocast.
    """
    rows = []
    for outputs, inputs in shapes:
        for weight in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
            plain = _times(tokens, outputs, inputs, device, weight, False)
            ours = _times(tokens, outputs, inputs, device, weight, True)
            ratios = {name.replace("_ms", "_ratio"): ours[name] / plain[name] for name in plain}
            rows.append({"shape": [outputs, inputs], "weight": str(weight), "plain": plain, "ours": ours, **ratios})
    return rows
