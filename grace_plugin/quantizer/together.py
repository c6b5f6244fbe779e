"""Many layers in one launch each way: what an optimizer step asks of the host does not grow with the number of layers.

What it does. The first layer of a forward pass whose kept weight is stale has all stale layers quantized at once; deferred
gradients are settled at once. Layers of one device, dtype and group size share a launch; each number is that of a launch of
its own.

What it refuses. Nothing: layers that no kernel takes (a CPU, rows not contiguous, scales not in float32) are left to be done
one by one.

What it costs. Quantized weights of all layers from the first layer on, where they would be there from their own layer on.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grace_plugin.quantizer import fake_quant_triton, together_triton
from grace_plugin.quantizer.cache import WeightCache
from grace_plugin.quantizer.fake_quant import settle
from grace_plugin.quantizer.layers import PARAMETER, STATE, Format
from grace_plugin.quantizer.scales import code_range

__all__ = ["Layer", "fill", "layer_of", "settle_all"]

ALIGNED = 16
"""Bytes that the kernels take an address to be a multiple of."""


class Layer(NamedTuple):
    """weight [out, in], log_scale float32 [out, groups], and the cache that keeps the quantized weight, or None."""

    weight: Tensor
    log_scale: Tensor
    cache: WeightCache | None


def layer_of(linear: nn.Linear) -> Layer:
    """What is quantized of an attached layer."""
    return Layer(linear.weight, getattr(linear, PARAMETER), linear.__dict__[STATE].cache)


def _launches(layers: Iterable[Layer], form: Format, grads: bool = False) -> list[list[Layer]]:
    """Layers that one launch takes; those that none takes, and those that are alone, are in no list."""
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        weight, log_scale, grad = layer.weight, layer.log_scale, layer.weight.grad if grads else None
        read = [weight, log_scale] if grad is None else [weight, log_scale, grad]
        taken = fake_quant_triton.usable(weight, form.stored_dtype) and log_scale.dtype == torch.float32
        if taken and all(t.is_contiguous() and t.data_ptr() % ALIGNED == 0 for t in read):
            size = weight.shape[1] // log_scale.shape[1]
            found.setdefault((weight.device, weight.dtype, size), []).append(layer)
    return [several for several in found.values() if len(several) > 1]


@torch.no_grad()
def fill(layers: Iterable[Layer], form: Format, out_dtype: torch.dtype) -> None:
    """Put w^ in ``out_dtype`` into every cache that is stale, where a launch takes the layer together with others."""
    stale = [layer for layer in layers if layer.cache is not None and layer.cache.stale(*layer[:2], out_dtype)]
    for several in _launches(stale, form):
        weights, log_scales, caches = zip(*several, strict=True)
        made = together_triton.forward(weights, log_scales, form.stored_dtype, code_range(form.num_bits), out_dtype)
        for layer, cache, value in zip(several, caches, made, strict=True):
            cache.put(*layer[:2], out_dtype, value)


@torch.no_grad()
def settle_all(layers: Sequence[Layer], form: Format) -> None:
    """`fake_quant.settle` of every layer."""
    together = _launches(layers, form, grads=True)
    for several in together:
        weights, log_scales, _ = zip(*several, strict=True)
        grads = [weight.grad for weight in weights]
        found = together_triton.backward(weights, log_scales, grads, form.stored_dtype, code_range(form.num_bits))
        for log_scale, grad in zip(log_scales, found, strict=True):
            log_scale.grad = grad
    done = {id(layer.weight) for several in together for layer in several}
    for layer in layers:
        if id(layer.weight) not in done:
            settle(layer.weight, layer.log_scale, num_bits=form.num_bits, stored_dtype=form.stored_dtype)
