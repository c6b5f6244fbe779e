"""A linear layer with learned scales: what it carries, whether it can, and the forward pass it runs.

y = x w^^T + b, and in the backward pass dL/dx = g w^ and dL/dw^ = g^T x, from which the quantizer's own backward makes the
gradients of weight and scales. The products are those of `torch.nn.functional.linear`, in the same dtypes. Product and
quantizer are one node of autograd with one saved tensor, which saves the host some 20 microseconds a layer and step over two
nodes. A layer with a low-rank update quantizes its weight in a function of its own (`lora`) and multiplies with torch's.

Legend: input x [..., in]; weight [out, in]; log_scale [out, groups]; bias [out].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grace_plugin.quantizer.fake_quant import FakeQuantSpec, SavedWeights, WeightCache, fake_quantize, make_spec
from grace_plugin.quantizer.format import QuantFormat
from grace_plugin.quantizer.lora import LORA_A, LORA_B, factors, fake_quantize_merged
from grace_plugin.quantizer.scales import autocasts, holds, start_scales

__all__ = ["PARAMETER", "STATE", "LayerState", "check_layers", "forward_weight", "quantized_forward"]

PARAMETER = "weight_log_scale"
"""Name of the learned scales on a layer; theta = log s, float32 [out, groups]."""

STATE = "_grace_fake_quant"
"""Name of a layer's :class:`LayerState`."""


@dataclass
class LayerState:
    """What a layer with learned scales keeps in addition to them."""

    fmt: QuantFormat
    cache: WeightCache | None
    previous_forward: Any  # the instance's own forward before, or None
    defer_grads: bool = False  # leave the quantizer's backward to `QuantizedLayerGroup.finalize_deferred_grads`
    grads_pending: bool = False  # a deferred gradient may be there
    scaling: float | None = None  # alpha / rank of a low-rank update, or None without one
    computed_in: torch.dtype | None = None  # by the latest forward pass


def state_of(linear: nn.Linear) -> LayerState:
    """Return the state of a layer with learned scales."""
    state: LayerState = linear.__dict__[STATE]
    return state


def _problems(linears: Mapping[str, nn.Linear], fmt: QuantFormat) -> Iterator[str]:
    seen: dict[int, str] = {}
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            yield f"{name}: a {type(linear).__name__}, not a torch.nn.Linear"
            continue
        if id(linear) in seen:
            yield f"{name}: the same module as {seen[id(linear)]}"
        seen[id(linear)] = name
        if STATE in linear.__dict__ or PARAMETER in linear._parameters:
            yield f"{name}: carries learned scales already; detach them first"
        # FSDP flattens or empties weights: scales made from such a shape would round every weight to zero
        if linear.weight.shape != (linear.out_features, linear.in_features):
            yield f"{name}: its weight is {tuple(linear.weight.shape)}; attach before the model is sharded"
        if not holds(linear.weight.dtype, fmt.stored_dtype):
            yield f"{name}: a weight in {linear.weight.dtype} cannot hold what is stored as {fmt.stored_dtype}"
        problem = fmt.width_problem(linear.in_features)
        if problem is not None:
            yield f"{name}: {problem}"


def check_layers(linears: Mapping[str, nn.Linear], fmt: QuantFormat) -> None:
    """Check whether every layer can carry learned scales of a format, before any layer is changed.

    Raises:
        ValueError: one message naming every layer that cannot, and how to fix it.
    """
    _ = fmt.quantizer
    if not linears:
        raise ValueError("no layer to quantize; check targets and ignore")
    problems = list(_problems(linears, fmt))
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"{len(problems)} problem(s) with the layers to quantize:\n  {listed}\nTo fix: choose another group_size (one that "
            "divides every width, or -1 for one scale per output channel), or add the layers to ignore"
        )


def attach_layer(linear: nn.Linear, fmt: QuantFormat, cache: WeightCache | None, **search: Any) -> None:
    """Give a layer learned scales and the forward that reads them; ``search`` goes to :func:`start_scales`."""
    linear.__dict__[STATE] = LayerState(fmt, cache, linear.__dict__.get("forward"))
    theta = start_scales(linear.weight, fmt, **search).to(torch.float32)
    linear.register_parameter(PARAMETER, nn.Parameter(theta))
    # on the instance, not by a subclass: `isinstance` checks, hooks and state dicts of the model see no difference
    linear.__dict__["forward"] = MethodType(quantized_forward, linear)


def detach_layer(linear: nn.Linear) -> None:
    """Undo :func:`attach_layer`, also where it failed half way; a layer without scales is left alone."""
    state: LayerState | None = linear.__dict__.pop(STATE, None)
    if state is None:
        return
    for name in (PARAMETER, LORA_A, LORA_B):
        linear._parameters.pop(name, None)
    linear.__dict__.pop("forward", None)
    if state.previous_forward is not None:
        linear.__dict__["forward"] = state.previous_forward


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, log_scale: Tensor, bias: Tensor | None, spec: FakeQuantSpec
    ) -> Tensor:
        value, scale = spec.value(weight, log_scale)
        # autocast does not reach into a function of autograd, so it is applied here as torch would
        if input.dtype != value.dtype and autocasts(input.device.type):
            input = input.to(value.dtype)
        ctx.spec, ctx.saved_weights = spec, SavedWeights(weight, log_scale, scale)
        # With a cache w^ is asked for again in the backward pass, so that a graph that is held keeps none alive. Without
        # one it is saved as an activation is, so that checkpointing drops it.
        ctx.save_for_backward(input, *([value] if spec.cache is None else []))
        return torch.nn.functional.linear(input, value, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        input, *saved = ctx.saved_tensors
        weight, log_scale, scale = ctx.saved_weights.tensors()
        needs = ctx.needs_input_grad
        # one matrix product for all leading dimensions, as torch.nn.functional.linear has
        rows = grad_out.reshape(-1, grad_out.shape[-1])
        grad_input, grad_weight, grad_log_scale = None, None, None
        if needs[0]:
            value = saved[0] if saved else ctx.spec.value(weight, log_scale)[0]
            grad_input = (rows @ value).view_as(input)
        if needs[1] or needs[2]:
            grad_value = rows.mT @ input.reshape(-1, input.shape[-1])
            grad_weight, grad_log_scale = ctx.spec.gradients(weight, log_scale, scale, grad_value, (needs[1], needs[2]))
        return grad_input, grad_weight, grad_log_scale, rows.sum(dim=0) if needs[3] else None, None


def _merged_weight(self: nn.Linear, state: LayerState) -> Tensor:
    """The fake-quantized weight of a layer with a low-rank update."""
    assert state.scaling is not None
    theta = getattr(self, PARAMETER)
    value = fake_quantize_merged(
        self.weight, *factors(self), theta, state.fmt, scaling=state.scaling, cache=state.cache
    )
    state.computed_in = value.dtype
    return value


def quantized_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """Run a layer with its fake-quantized weight in place of its weight."""
    state = state_of(self)
    if state.scaling is not None:
        return nn.functional.linear(input, _merged_weight(self, state), self.bias)
    weight, theta = self.weight, getattr(self, PARAMETER)
    # a frozen weight or scale has no gradient to wait for; evaluation must not mark one as pending
    defer = state.defer_grads and torch.is_grad_enabled() and weight.requires_grad and theta.requires_grad
    spec = make_spec(weight, theta, state.fmt, state.cache, defer)
    state.grads_pending, state.computed_in = state.grads_pending or defer, spec.out_dtype
    found: Tensor = _QuantizedLinear.apply(input, weight, theta, self.bias, spec)
    return found


def forward_weight(self: nn.Linear) -> Tensor:
    """Return what `quantized_forward` multiplies by."""
    state = state_of(self)
    if state.scaling is not None:
        return _merged_weight(self, state)
    return fake_quantize(self.weight, getattr(self, PARAMETER), state.fmt, cache=state.cache)
