"""All layers with learned scales of one format: attach, freeze, bake, detach, and what is done for all of them in one launch.

``attach`` gives every listed layer a parameter ``weight_log_scale`` [out, groups] and a forward that multiplies by the
fake-quantized weight; ``add_lora`` adds a low-rank update before that. ``freeze`` reads codes and scales, ``bake`` writes
``code * scale`` into the weights, ``detach`` restores the layers. Scales are allocated by a layer's shape, so attach *before*
sharding (FSDP, ZeRO-3): they are then sharded and saved as any other parameter.

On CUDA all stale layers are quantized at once, after an optimizer's step (`prefetch_quantized_weights`) or by the first layer
of a forward pass, and deferred gradients are finalized at once: what a step asks of the host does not grow with the number of
layers. Layers of one device, dtype and group size share a launch; each number is that of a launch of its own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grace_plugin.quantizer import fake_quant_triton, grouped_triton
from grace_plugin.quantizer.fake_quant import StepCounter, WeightCache, clipped, codes, dequantize, gradients
from grace_plugin.quantizer.format import QuantFormat
from grace_plugin.quantizer.linear import (
    PARAMETER,
    attach_layer,
    check_layers,
    detach_layer,
    forward_weight,
    state_of,
)
from grace_plugin.quantizer.lora import factors, merged, start_lora
from grace_plugin.quantizer.scales import stored_scale

__all__ = ["Layer", "QuantizedLayerGroup", "attach", "fill", "finalize_all_deferred_grads", "finalize_deferred_grads"]


class Layer(NamedTuple):
    """weight [out, in], log_scale float32 [out, groups], and the cache that holds the quantized weight, or None."""

    weight: Tensor
    log_scale: Tensor
    cache: WeightCache | None


def _layer_of(linear: nn.Linear) -> Layer:
    return Layer(linear.weight, getattr(linear, PARAMETER), state_of(linear).cache)


def launches(layers: Iterable[Layer], fmt: QuantFormat, *, grads: bool) -> list[list[Layer]]:
    """Return the layers that share a launch, one list for each launch; layers that would be alone, or that no kernel takes
    (a CPU, rows not contiguous, scales not in float32), are in none.

    Args:
        layers: of one format.
        fmt: the format.
        grads: whether the launch reads gradients as well.
    """
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        weight, log_scale, _ = layer
        read = [weight, log_scale, *([weight.grad] if grads else [])]
        taken = fake_quant_triton.usable(weight, fmt) and log_scale.dtype == torch.float32
        # the kernels promise Triton addresses of 16 bytes (`tl.multiple_of`), which a view into other storage may not have
        aligned = (t.is_contiguous() and t.data_ptr() % fake_quant_triton.ALIGNED == 0 for t in read if t is not None)
        if taken and all(aligned):
            key = (weight.device, weight.dtype, weight.shape[1] // log_scale.shape[1])
            found.setdefault(key, []).append(layer)
    return [several for several in found.values() if len(several) > 1]


@torch.no_grad()
def fill(layers: Iterable[Layer], fmt: QuantFormat, out_dtype: torch.dtype) -> None:
    """Put w^ in ``out_dtype`` into every stale cache whose layer shares a launch with another."""
    stale = [layer for layer in layers if layer.cache is not None and layer.cache.stale(*layer[:2], out_dtype)]
    for several in launches(stale, fmt, grads=False):
        made = grouped_triton.forward([layer[:2] for layer in several], fmt, out_dtype)
        for layer, value in zip(several, made, strict=True):
            assert layer.cache is not None
            layer.cache.put(*layer[:2], out_dtype, value)


@torch.no_grad()
def finalize_deferred_grads(weight: Tensor, log_scale: Tensor, fmt: QuantFormat) -> None:
    """Turn ``weight.grad`` from a sum of dL/dw^ into the gradients of weight and log_scale, in place.

    Neither may have changed since the forward passes whose gradients were deferred. ``log_scale.grad`` is replaced.
    """
    # the backward is linear in dL/dw^, so that of a sum is the sum of those of its parts
    grad = weight.grad
    assert grad is not None
    scale = stored_scale(log_scale, fmt.stored_dtype)
    rows = grad.contiguous()  # the kernels write rows
    _, grad_log_scale = gradients(weight, scale, rows, fmt, (True, True), into=rows)
    assert grad_log_scale is not None
    if rows is not grad:
        grad.copy_(rows)
    log_scale.grad = grad_log_scale.to(log_scale.dtype)


@torch.no_grad()
def finalize_all_deferred_grads(layers: Sequence[Layer], fmt: QuantFormat) -> None:
    """Call :func:`finalize_deferred_grads` for every layer, in one launch for those that can share one."""
    shared = launches(layers, fmt, grads=True)
    for several in shared:
        grads = [layer.weight.grad for layer in several if layer.weight.grad is not None]
        found = grouped_triton.backward([layer[:2] for layer in several], grads, fmt)
        for layer, grad in zip(several, found, strict=True):
            # replaced, not added: until now it held nothing, or the zeros that DDP waits for
            layer.log_scale.grad = grad
    # layers that no launch takes are finalized one by one
    done = {id(layer.weight) for several in shared for layer in several}
    for layer in layers:
        if id(layer.weight) not in done:
            finalize_deferred_grads(layer.weight, layer.log_scale, fmt)


class QuantizedLayerGroup:
    """Layers with learned scales of one format, by name; made by :func:`attach`."""

    def __init__(self, linears: Mapping[str, nn.Linear], fmt: QuantFormat, counter: StepCounter) -> None:
        self._linears = dict(linears)
        self._fmt, self._counter = fmt, counter
        self._one_by_one = False

    def __len__(self) -> int:
        return len(self._linears)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The layers by name."""
        return dict(self._linears)

    @property
    def scales(self) -> dict[str, nn.Parameter]:
        """theta of each layer by name: the optimizer's second group (10x the rate, no decay)."""
        return {name: getattr(linear, PARAMETER) for name, linear in self._linears.items()}

    @property
    def quantizations(self) -> int:
        """How often a weight was quantized, by a forward pass or before it (0 when the cache is off)."""
        caches = (state_of(linear).cache for linear in self._linears.values())
        return sum(cache.quantizations for cache in caches if cache is not None)

    def add_lora(self, names: Iterable[str], *, rank: int, alpha: float, seed: int = 0) -> None:
        """Give layers a low-rank update, added to the weight before it is quantized; see ``quantizer.lora``."""
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            start_lora(self._linears[name], rank, generator)
            state = state_of(self._linears[name])
            state.scaling = alpha / rank
            if state.cache is not None:
                state.cache = WeightCache(self._counter)  # a group's launch cannot form its sum
        self.invalidate()

    def invalidate(self) -> None:
        """Say that weights or scales were changed in a way torch does not count (a write through ``.data``)."""
        self._counter.advance()

    @torch.no_grad()
    def clip_share(self) -> Tensor:
        """Return the share of all weights that the clip acts on: 0-dimensional float32 on the first layer's device."""
        device = next(iter(self._linears.values())).weight.device
        counts = [clipped(weight, scale, self._fmt).to(device) for _, weight, scale in self._layers()]
        return torch.stack(counts).sum() / sum(linear.weight.numel() for linear in self._linears.values())

    def defer_grads(self, on: bool = True) -> None:
        """Let gradients of weights be dL/dw^ until :meth:`finalize_deferred_grads`, so that a window of many micro-batches
        costs one backward of the quantizer.

        For loops whose gradients stay in ``.grad`` (one process, DDP); other engines leave nothing there to finalize.
        """
        for linear in self._linears.values():
            state_of(linear).defer_grads = on

    def fill(self, dtype: torch.dtype) -> None:
        """Quantize in one launch all stale layers that compute in ``dtype``; the first layer of a forward pass asks for it."""
        linears = self._linears.values()
        if not self._one_by_one and fake_quant_triton.usable(next(iter(linears)).weight, self._fmt):
            states = ((linear, state_of(linear)) for linear in linears)
            plain = (one for one, state in states if state.scaling is None and state.computed_in in (None, dtype))
            fill(map(_layer_of, plain), self._fmt, dtype)

    def prefetch_quantized_weights(self) -> None:
        """Quantize now what the next forward pass would, in the dtype of the latest one, where layers share a launch.

        After an optimizer's step the host's part of it passes while the device still works on the step.
        """
        states = [state_of(linear) for linear in self._linears.values()]
        # each layer in the dtype of its latest forward pass: autocast may be on for some of them only
        for dtype in {s.computed_in for s in states if s.scaling is None and s.computed_in is not None}:
            self.fill(dtype)

    def finalize_deferred_grads(self) -> None:
        """Form the gradients of weights and scales from deferred ones, before they are clipped or used.

        A second call changes nothing.
        """
        pending = [linear for linear in self._linears.values() if state_of(linear).grads_pending]
        layers = [_layer_of(linear) for linear in pending if linear.weight.grad is not None]
        finalize_all_deferred_grads(layers, self._fmt)
        for linear in pending:
            state_of(linear).grads_pending = False

    @torch.no_grad()
    def freeze(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return codes int8 [out, in] and scales [out, groups] in the stored dtype, of every layer as it is now."""
        return {name: (integers, scale) for name, integers, scale in self._codes()}

    @torch.no_grad()
    def count_forward_mismatches(self, frozen: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
        """Count the weights that a forward pass multiplies by and that are not ``code * scale``.

        Each weight is taken as the layer's forward takes it, from its cache where that is still held to be valid, in the dtype
        of its latest forward pass; the cache is then emptied, so that one layer exists at a time.

        Args:
            frozen: what :meth:`freeze` returned.

        Returns:
            Numbers by layer, of the layers that have some.
        """
        # one by one: a launch would fill the caches of all layers, a second model in memory
        self._one_by_one, found = True, {}
        for name, linear in self._linears.items():
            state, device = state_of(linear), linear.weight.device.type
            dtype = state.computed_in or linear.weight.dtype
            # the run's autocast is over by now, and without it the weight would be taken in another dtype
            with torch.autocast(device, dtype=dtype, enabled=dtype != linear.weight.dtype):
                weight = forward_weight(linear)
            differing = int((weight != dequantize(*frozen[name])).sum())
            if differing:
                found[name] = differing
            if state.cache is not None:
                state.cache.drop()
        self._one_by_one = False
        return found

    @torch.no_grad()
    def bake(self) -> None:
        """Write ``code * scale`` into every weight, in the stored dtype; gradients of the weights are dropped.

        Quantizing a baked weight again gives the same codes.
        """
        for name, integers, scale in self._codes():
            linear = self._linears[name]
            state_of(linear).scaling = None  # the update is in the codes
            linear.weight.grad = None
            # `.data` keeps the Parameter object, which optimizers and upstream hold
            linear.weight.data = dequantize(integers, scale)
        self.invalidate()

    def detach(self) -> None:
        """Restore each layer's forward and remove its scales; a second call changes nothing."""
        for linear in self._linears.values():
            detach_layer(linear)
        self._counter.stop()
        self._linears = {}

    def _layers(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, weight with its low-rank update, and theta, one layer at a time."""
        for name, linear in self._linears.items():
            scaling, weight = state_of(linear).scaling, linear.weight
            yield (
                name,
                weight if scaling is None else merged(weight, *factors(linear), scaling=scaling),
                getattr(linear, PARAMETER),
            )

    def _codes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, weight, log_scale in self._layers():
            yield name, codes(weight, log_scale, self._fmt), stored_scale(log_scale, self._fmt.stored_dtype)


def attach(
    linears: Mapping[str, nn.Linear],
    fmt: QuantFormat,
    *,
    candidates: int = 20,
    low: float = 0.3,
    high: float = 1.2,
    cache: bool = True,
) -> QuantizedLayerGroup:
    """Give every layer learned group scales and a fake-quantized forward; a failure half way leaves the layers as they were.

    Args:
        linears: layers by name; names are used in messages and in :meth:`QuantizedLayerGroup.freeze`.
        fmt: the format of all of them.
        candidates: start values tried per group.
        low: smallest start value, as a share of max|w| / q_max.
        high: largest start value.
        cache: keep the quantized weight while weight and scale do not change.

    Raises:
        ValueError: one message naming every layer that cannot be attached, and how to fix it; nothing was changed.
    """
    check_layers(linears, fmt)
    counter = StepCounter()
    group = QuantizedLayerGroup(linears, fmt, counter)
    try:
        counter.start()
        for linear in linears.values():
            own = WeightCache(counter, group.fill) if cache else None
            attach_layer(linear, fmt, own, candidates=candidates, low=low, high=high)
    # also for KeyboardInterrupt: a part of the layers must not keep a quantized forward
    except BaseException:
        group.detach()
        raise
    return group
