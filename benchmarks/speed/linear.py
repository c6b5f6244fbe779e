"""A linear layer with learned INT4 scales next to the plain layer: quantized at every call, and once for 16 micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.speed.timing import graphed, paired_ms
from grace_plugin.quantizer import QuantFormat, StepCounter, WeightCache, attach, fake_quantize, start_scales
from grace_plugin.quantizer.grouped import Layer, fill, finalize_all_deferred_grads, finalize_deferred_grads

__all__ = ["layers", "linear"]

MICRO_BATCHES = 16
DECODER = [(2048, 2048), (1024, 2048), (1024, 2048), (2048, 2048), (6144, 2048), (6144, 2048), (2048, 6144)]
"""Linears of a layer of Qwen3-VL-2B's decoder, which has 28."""


class _Case:
    """A linear layer, plain or quantized, and its two works; call `close` in the end."""

    def __init__(
        self, tokens: int, outputs: int, inputs: int, device: str, weight: torch.dtype, quantized: bool
    ) -> None:
        self.device, self.compute = device, torch.bfloat16 if device == "cuda" else torch.float32
        self.x = torch.randn(tokens, inputs, device=device, dtype=self.compute, requires_grad=True)
        self.grad = torch.randn(tokens, outputs, device=device, dtype=self.compute)
        self.layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=weight)
        self.attached = attach({"layer": self.layer}, QuantFormat(), cache=False) if quantized else None
        self.sums = [torch.zeros_like(parameter) for parameter in self.layer.parameters()]

    def once(self) -> tuple[torch.Tensor | None, ...]:
        """Forward and backward of one micro-batch; a scale whose gradient is deferred has none."""
        mixed = self.layer.weight.dtype != self.compute
        with torch.autocast(self.device, dtype=self.compute, enabled=mixed, cache_enabled=False):
            out = self.layer(self.x)
        return torch.autograd.grad(out, [self.x, *self.layer.parameters()], self.grad, allow_unused=True)

    def keep(self) -> None:
        """From now on a weight is quantized once for all micro-batches."""
        if self.attached is not None:
            self.attached.detach()
            self.attached = attach({"layer": self.layer}, QuantFormat())
            self.attached.defer_grads()

    def accumulate(self) -> None:
        """An optimizer step's micro-batches, their gradients summed."""
        if self.attached is not None:
            self.attached.invalidate()
        for _ in range(MICRO_BATCHES):
            for total, part in zip(self.sums, self.once()[1:], strict=True):
                if part is not None:
                    total += part
        if self.attached is not None:
            for parameter, total in zip(self.layer.parameters(), self.sums, strict=True):
                parameter.grad = total
            self.attached.finalize_deferred_grads()
            for parameter in self.layer.parameters():
                parameter.grad = None

    def close(self) -> None:
        """Take the scales off."""
        if self.attached is not None:
            self.attached.detach()


def _times(cases: dict[str, _Case]) -> dict[str, dict[str, float]]:
    """Return the times of each case by work, timed alternately."""
    found: dict[str, dict[str, float]] = {name: {} for name in cases}

    def take(entry: str, works: dict[str, Any], repeats: int, share: float = 1.0) -> None:
        for name, ms in paired_ms(works, repeats).items():
            found[name][entry] = ms * share

    take("once_ms", {name: graphed(case.once) for name, case in cases.items()}, 100)
    take("once_with_host_ms", {name: case.once for name, case in cases.items()}, 20)
    for case in cases.values():
        case.keep()
    take("of_16_ms", {name: graphed(case.accumulate) for name, case in cases.items()}, 20, 1 / MICRO_BATCHES)
    for case in cases.values():
        case.close()
    return found


def linear(tokens: int, shapes: list[tuple[int, int]], device: str) -> list[dict[str, Any]]:
    """Per shape and weight dtype: milliseconds of the plain and of the quantized layer, forward and backward.

    A bfloat16 weight is compared with a bfloat16 layer, a float32 master with the same layer under autocast.
    """
    rows = []
    for outputs, inputs in shapes:
        for weight in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
            cases = {name: _Case(tokens, outputs, inputs, device, weight, name == "ours") for name in ("plain", "ours")}
            plain, ours = _times(cases).values()
            ratios = {name.replace("_ms", "_ratio"): ours[name] / plain[name] for name in plain}
            rows.append({"shape": [outputs, inputs], "weight": str(weight), "plain": plain, "ours": ours, **ratios})
    return rows


def layers(depth: int) -> dict[str, Any]:
    """Milliseconds, with the host's share, of what a decoder's quantizer does on CUDA in an optimizer step, float32 masters.

    Every layer is quantized once and its summed gradient settled once: together, and layer by layer.
    """
    device, fmt, out = "cuda", QuantFormat(), torch.bfloat16
    counter, several = StepCounter(), []
    for outputs, inputs in DECODER * depth:
        weight = torch.randn(outputs, inputs, device=device).requires_grad_()
        weight.grad = torch.ones_like(weight)
        theta = start_scales(weight.detach(), fmt).requires_grad_()
        several.append(Layer(weight, theta, WeightCache(counter)))

    def grouped() -> None:
        counter.advance()
        fill(several, fmt, out)
        finalize_all_deferred_grads(several, fmt)

    @torch.no_grad()
    def one_by_one() -> None:
        counter.advance()
        with torch.autocast(device, dtype=out):
            for weight, theta, cache in several:
                fake_quantize(weight, theta, fmt, cache=cache)
        for weight, theta, _ in several:
            finalize_deferred_grads(weight, theta, fmt)

    times = paired_ms({"together": grouped, "one_by_one": one_by_one}, 10)
    count = sum(weight.numel() for weight, _, _ in several)
    return {"layers": len(several), "weights": count, **{f"{name}_ms": ms for name, ms in times.items()}}
