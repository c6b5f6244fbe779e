"""Put learned fake quantization on the linear layers of a model, and take it off again.

What it does. ``attach`` gives every listed layer a parameter ``weight_log_scale`` [out, groups] and a forward that
multiplies by the fake-quantized weight; ``add_lora`` adds a low-rank update before that. ``freeze`` reads codes and scales,
``bake`` writes ``code * scale`` into the weights, ``detach`` restores the layers to what they were.

What it refuses. Everything wrong with any layer is reported in one error before the first layer is touched: a width the
group does not divide, a weight that is not there yet (already sharded), a dtype that would round the shipped weight, a
layer listed twice or attached before. A failure half way leaves the model as it was.

What it costs. One float32 number per group, and the cache of ``quantizer.cache``. Scales are allocated by the layer's
shape, so attach *before* sharding (FSDP, ZeRO-3): they are then sharded and saved like any other parameter.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.quantizer import fake_quant_triton
from grace_plugin.quantizer.cache import StepCounter, WeightCache
from grace_plugin.quantizer.fake_quant import clipped, codes, dequantize
from grace_plugin.quantizer.grouped import fill, finalize_all_deferred_grads, layer_of
from grace_plugin.quantizer.layers import PARAMETER, STATE, Format, LayerState, check_layers
from grace_plugin.quantizer.linear import forward_weight, quantized_forward
from grace_plugin.quantizer.lora import LORA_A, LORA_B, factors, merged, start_lora
from grace_plugin.quantizer.scales import start_scales, stored_scale


class QuantizedLayerGroup:
    """The layers that carry learned scales, by name; made by :func:`attach`."""

    def __init__(self, linears: Mapping[str, nn.Linear], form: Format, counter: StepCounter) -> None:
        self._linears = dict(linears)
        self._form, self._counter = form, counter
        self._one_by_one = False

    def __len__(self) -> int:
        return len(self._linears)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The attached layers by name."""
        return dict(self._linears)

    @property
    def scales(self) -> dict[str, nn.Parameter]:
        """theta of each layer by name: the optimizer's second group (10x the rate, no decay)."""
        return {name: getattr(linear, PARAMETER) for name, linear in self._linears.items()}

    @property
    def quantizations(self) -> int:
        """How often a weight was quantized so far, by a forward pass or ahead of it (0 when the cache is off)."""
        caches = (self._state(linear).cache for linear in self._linears.values())
        return sum(cache.quantizations for cache in caches if cache is not None)

    def add_lora(self, names: Iterable[str], *, rank: int, alpha: float, seed: int = 0) -> None:
        """Give layers a low-rank update, added to the weight before it is quantized; see ``quantizer.lora``."""
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            start_lora(self._linears[name], rank, generator)
            state = self._state(self._linears[name])
            state.scaling = alpha / rank
            if state.cache is not None:
                state.cache = WeightCache(self._counter)  # its sum is formed in its own forward pass
        self.invalidate()

    def invalidate(self) -> None:
        """Say that weights or scales were changed in a way torch does not count (a write through ``.data``)."""
        self._counter.advance()

    @torch.no_grad()
    def clip_share(self) -> Tensor:
        """Share of all attached weights that the clip acts on: 0-dimensional float32 on the first layer's device."""
        device = next(iter(self._linears.values())).weight.device
        counts = [
            clipped(weight, scale, num_bits=form.num_bits, stored_dtype=form.stored_dtype).to(device)
            for _, weight, scale, form in self._layers()
        ]
        return torch.stack(counts).sum() / sum(linear.weight.numel() for linear in self._linears.values())

    def defer(self, on: bool = True) -> None:
        """Let gradients of weights be dL/dw^ until :meth:`finalize_deferred_grads`: many
        micro-batches then cost one backward of the quantizer.

        For loops whose gradients stay in ``.grad`` (one process, DDP): other engines leave nothing there to finalize.
        """
        for linear in self._linears.values():
            self._state(linear).defer = on

    def fill(self, dtype: torch.dtype) -> None:
        """Quantize in one launch all stale layers that compute in ``dtype``; the first of a forward pass asks for it."""
        linears = self._linears.values()
        if not self._one_by_one and fake_quant_triton.usable(next(iter(linears)).weight, self._form.stored_dtype):
            pairs = ((one, self._state(one)) for one in linears)
            plain = (one for one, state in pairs if state.scaling is None and state.computed_in in (None, dtype))
            fill(map(layer_of, plain), self._form, dtype)

    def prefetch_quantized_weights(self) -> None:
        """Quantize now what the next forward pass would, in the dtype of the latest one, where one launch takes it together.

        Called behind an optimizer's step, the host's part of it passes while the device still steps. Elsewhere it does nothing.
        """
        states = [self._state(linear) for linear in self._linears.values()]
        for dtype in {s.computed_in for s in states if s.scaling is None and s.computed_in is not None}:
            self.fill(dtype)

    def finalize_deferred_grads(self) -> None:
        """Make deferred gradients what they stand for, before they are clipped or used; a second call changes nothing."""
        pending = [linear for linear in self._linears.values() if self._state(linear).pending]
        finalize_all_deferred_grads(
            [layer_of(linear) for linear in pending if linear.weight.grad is not None], self._form
        )
        for linear in pending:
            self._state(linear).pending = False

    @torch.no_grad()
    def freeze(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes int8 [out, in] and scales [out, groups] in the stored dtype, of every layer as it stands now."""
        return {name: (integers, scale) for name, integers, scale in self._codes()}

    @torch.no_grad()
    def count_forward_mismatches(self, frozen: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
        """How many of the weights that a forward pass multiplies by are not ``code * scale``, by layers that have some.

        Each weight is taken as the layer's forward takes it, from what it keeps where that is still held to be valid, in the
        dtype of its latest forward pass; what was kept is then dropped, so that one layer exists at a time.

        Args:
            frozen: what :meth:`freeze` gave.
        """
        self._one_by_one, found = True, {}
        for name, linear in self._linears.items():
            state, device = self._state(linear), linear.weight.device.type
            dtype = state.computed_in or linear.weight.dtype
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

        The codes do not change by it: quantizing a baked weight again gives the same codes.
        """
        for name, integers, scale in self._codes():
            linear = self._linears[name]
            self._state(linear).scaling = None  # the update is in the codes
            linear.weight.grad = None
            linear.weight.data = dequantize(integers, scale)
        self.invalidate()

    def detach(self) -> None:
        """Restore each layer's forward and remove its scales; a second call changes nothing."""
        for linear in self._linears.values():
            _restore(linear)
        self._counter.stop()
        self._linears = {}

    def _state(self, linear: nn.Linear) -> LayerState:
        state: LayerState = linear.__dict__[STATE]
        return state

    def _layers(self) -> Iterator[tuple[str, Tensor, Tensor, Format]]:
        """Name, weight with its low-rank update, theta and format, one layer at a time."""
        for name, linear in self._linears.items():
            state, weight = self._state(linear), linear.weight
            if state.scaling is not None:
                weight = merged(weight, *factors(linear), scaling=state.scaling)
            yield name, weight, getattr(linear, PARAMETER), state.format

    def _codes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, weight, scale, form in self._layers():
            integers = codes(weight, scale, num_bits=form.num_bits, stored_dtype=form.stored_dtype)
            yield name, integers, stored_scale(scale, form.stored_dtype)


def _restore(linear: nn.Linear) -> None:
    """Undo what is there of an attachment; a layer without one is left alone."""
    state: LayerState | None = linear.__dict__.pop(STATE, None)
    if state is None:
        return
    for name in (PARAMETER, LORA_A, LORA_B):
        linear._parameters.pop(name, None)
    linear.__dict__.pop("forward", None)
    if state.previous_forward is not None:
        linear.__dict__["forward"] = state.previous_forward


def _attach_one(linear: nn.Linear, form: Format, start: dict[str, Any], cache: WeightCache | None) -> None:
    linear.__dict__[STATE] = LayerState(form, cache, linear.__dict__.get("forward"))
    theta = start_scales(linear.weight, form.group_size, num_bits=form.num_bits, dtype=form.stored_dtype, **start).to(
        torch.float32
    )
    linear.register_parameter(PARAMETER, nn.Parameter(theta))
    linear.__dict__["forward"] = MethodType(quantized_forward, linear)


def attach(
    linears: Mapping[str, nn.Linear],
    *,
    group_size: int | None,
    num_bits: int = 4,
    stored_dtype: torch.dtype = torch.bfloat16,
    candidates: int = 20,
    low: float = 0.3,
    high: float = 1.2,
    cache: bool = True,
) -> QuantizedLayerGroup:
    """Give every layer learned group scales and a fake-quantized forward.

    Args:
        linears: layers by name; names are used in messages and in :meth:`QuantizedLayerGroup.freeze`.
        group_size: weights of a row that share a scale; None or -1 for one scale per row.
        num_bits: 2..8.
        stored_dtype: dtype of the checkpoint (weights' or scales' on disk).
        candidates: start values tried per group.
        low: smallest start value, as a share of max|w| / q_max.
        high: largest start value.
        cache: keep the quantized weight while weight and scale stand still.

    Raises:
        ValueError: one message naming every layer that cannot be attached, and the ways out; nothing was changed.
    """
    form = Format(group_size, num_bits, stored_dtype)
    check_layers(linears, form)
    counter, start = StepCounter(), {"candidates": candidates, "low": low, "high": high}
    attached = QuantizedLayerGroup(linears, form, counter)
    try:
        counter.start()
        for linear in linears.values():
            _attach_one(linear, form, start, WeightCache(counter, attached.fill) if cache else None)
    except BaseException:
        attached.detach()
        raise
    return attached
