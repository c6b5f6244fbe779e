"""Many layers in one launch each way: what an optimizer step asks of the host does not grow with the number of layers.

All stale layers are quantized at once: after an optimizer's step (`QuantizedLayerGroup.prefetch_quantized_weights`), or by
the first layer of a forward pass whose kept weight is stale. Deferred gradients are finalized at once.
Layers of one device, dtype and group
size share a launch; each number is that of a launch of its own.

What it refuses. Nothing: layers that no kernel takes (a CPU, rows not contiguous, scales not in float32) are left to be done
one by one.

What it costs. Quantized weights of all layers from the first layer on, where they would be there from their own layer on.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grace_plugin.quantizer import fake_quant_triton, grouped_triton
from grace_plugin.quantizer.cache import WeightCache
from grace_plugin.quantizer.fake_quant import gradients
from grace_plugin.quantizer.launch import ALIGNED
from grace_plugin.quantizer.layers import PARAMETER, STATE, Format
from grace_plugin.quantizer.scales import code_range, stored_scale

__all__ = ["Layer", "fill", "finalize_all_deferred_grads", "finalize_deferred_grads", "launches", "layer_of"]


class Layer(NamedTuple):
    """weight [out, in], log_scale float32 [out, groups], and the cache that keeps the quantized weight, or None."""

    weight: Tensor
    log_scale: Tensor
    cache: WeightCache | None


def layer_of(linear: nn.Linear) -> Layer:
    """What is quantized of an attached layer."""
    return Layer(linear.weight, getattr(linear, PARAMETER), linear.__dict__[STATE].cache)


def launches(layers: Iterable[Layer], form: Format, *, grads: bool) -> list[list[Layer]]:
    """Layers that one launch takes; those that none takes, and those that are alone, are in no list.

    grads: whether the launch reads gradients as well.
    """
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        weight, log_scale, _ = layer
        read = [weight, log_scale, *([weight.grad] if grads else [])]
        taken = fake_quant_triton.usable(weight, form.stored_dtype) and log_scale.dtype == torch.float32
        if taken and all(t.is_contiguous() and t.data_ptr() % ALIGNED == 0 for t in read if t is not None):
            key = (weight.device, weight.dtype, weight.shape[1] // log_scale.shape[1])
            found.setdefault(key, []).append(layer)
    return [several for several in found.values() if len(several) > 1]


@torch.no_grad()
def fill(layers: Iterable[Layer], form: Format, out_dtype: torch.dtype) -> None:
    """Put w^ in ``out_dtype`` into every cache that is stale, where a launch takes the layer together with others."""
    stale = [layer for layer in layers if layer.cache is not None and layer.cache.stale(*layer[:2], out_dtype)]
    for several in launches(stale, form, grads=False):
        pairs = [layer[:2] for layer in several]
        made = grouped_triton.forward(pairs, form.stored_dtype, code_range(form.num_bits), out_dtype)
        for number, layer in enumerate(several):
            assert layer.cache is not None
            layer.cache.put(*layer[:2], out_dtype, made[number])


@torch.no_grad()
def finalize_deferred_grads(weight: Tensor, log_scale: Tensor, *, num_bits: int, stored_dtype: torch.dtype) -> None:
    """Turn ``weight.grad`` from a sum of dL/dw^ into the gradients of weight and log_scale, in place.

    Both must stand as they stood in the forward passes whose gradients were deferred. What ``log_scale.grad`` held is replaced.
    """
    grad = weight.grad
    assert grad is not None
    scale = stored_scale(log_scale, stored_dtype)
    rows = grad.contiguous()  # the kernels write rows
    _, grad_log_scale = gradients(weight, scale, rows, num_bits, (True, True), into=rows)
    assert grad_log_scale is not None
    if rows is not grad:
        grad.copy_(rows)
    log_scale.grad = grad_log_scale.to(log_scale.dtype)


@torch.no_grad()
def finalize_all_deferred_grads(layers: Sequence[Layer], form: Format) -> None:
    """:func:`finalize_deferred_grads` of every layer."""
    together = launches(layers, form, grads=True)
    for several in together:
        pairs = [layer[:2] for layer in several]
        grads = [layer.weight.grad for layer in several if layer.weight.grad is not None]
        found = grouped_triton.backward(pairs, grads, form.stored_dtype, code_range(form.num_bits))
        for number, layer in enumerate(several):
            layer.log_scale.grad = found[number]
    done = {id(layer.weight) for several in together for layer in several}
    for layer in layers:
        if id(layer.weight) not in done:
            finalize_deferred_grads(
                layer.weight, layer.log_scale, num_bits=form.num_bits, stored_dtype=form.stored_dtype
            )
