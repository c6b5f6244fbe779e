"""What an attached layer runs: a product with its fake-quantized weight, as one function of autograd.

What it does. y = x w^^T + b, and in the backward pass dL/dx = g w^ and dL/dw^ = g^T x, from which the quantizer's own backward
makes the gradients of weight and scales. The products are those of `torch.nn.functional.linear`, in the same types. With a
low-rank update the weight is quantized by a function of its own (`lora`) and multiplied by torch's.

What it refuses. What `fake_quantize` refuses.

What it costs. x for the backward pass, as any linear layer; w^ is asked of the layer's cache again, so that a graph still held
keeps none alive, and where there is no cache it is saved as an activation is, so that checkpointing drops it. One node of
autograd and one saved tensor, where quantizer and product by themselves are two nodes and two saved tensors: some 20
microseconds a layer and step of the host's time.

Legend: input x [..., in]; weight [out, in]; log_scale [out, groups]; bias [out].
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grace_plugin.quantizer.fake_quant import FakeQuantSpec, checked, fake_quantize
from grace_plugin.quantizer.kept import Kept
from grace_plugin.quantizer.layers import PARAMETER, STATE, LayerState
from grace_plugin.quantizer.lora import factors, fake_quantize_merged
from grace_plugin.quantizer.scales import autocasts

__all__ = ["forward_weight", "quantized_forward"]


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, log_scale: Tensor, bias: Tensor | None, how: FakeQuantSpec
    ) -> Tensor:
        value, scale = how.value(weight, log_scale)
        if input.dtype != value.dtype and autocasts(input.device.type):
            input = input.to(value.dtype)
        ctx.how, ctx.kept = how, Kept(weight, log_scale, scale)
        ctx.save_for_backward(input, *([value] if how.cache is None else []))
        return torch.nn.functional.linear(input, value, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        input, *saved = ctx.saved_tensors
        weight, log_scale, scale = ctx.kept.tensors()
        needs = ctx.needs_input_grad
        rows = grad_out.reshape(-1, grad_out.shape[-1])
        grad_input, grad_weight, grad_log_scale = None, None, None
        if needs[0]:
            value = saved[0] if saved else ctx.how.value(weight, log_scale)[0]
            grad_input = (rows @ value).view_as(input)
        if needs[1] or needs[2]:
            grad_value = rows.mT @ input.reshape(-1, input.shape[-1])
            grad_weight, grad_log_scale = ctx.how.gradients(weight, log_scale, scale, grad_value, (needs[1], needs[2]))
        return grad_input, grad_weight, grad_log_scale, rows.sum(dim=0) if needs[3] else None, None


def _merged_weight(self: nn.Linear, state: LayerState) -> Tensor:
    """The fake-quantized weight of a layer with a low-rank update."""
    how, scaling = {**vars(state.format), "cache": state.cache}, state.scaling
    assert scaling is not None
    value = fake_quantize_merged(self.weight, *factors(self), getattr(self, PARAMETER), scaling=scaling, **how)
    state.computed_in = value.dtype
    return value


def quantized_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """Forward of an attached layer: the fake-quantized weight in place of the weight."""
    state: LayerState = self.__dict__[STATE]
    if state.scaling is not None:
        return nn.functional.linear(input, _merged_weight(self, state), self.bias)
    weight, theta, form = self.weight, getattr(self, PARAMETER), state.format
    defer = state.defer and torch.is_grad_enabled() and weight.requires_grad and theta.requires_grad
    how = checked(weight, theta, form.group_size, form.num_bits, form.stored_dtype, state.cache, defer)
    state.pending, state.computed_in = state.pending or defer, how.out_dtype
    found: Tensor = _QuantizedLinear.apply(input, weight, theta, self.bias, how)
    return found


def forward_weight(self: nn.Linear) -> Tensor:
    """What `quantized_forward` multiplies by."""
    state: LayerState = self.__dict__[STATE]
    if state.scaling is not None:
        return _merged_weight(self, state)
    return fake_quantize(self.weight, getattr(self, PARAMETER), **vars(state.format), cache=state.cache)
