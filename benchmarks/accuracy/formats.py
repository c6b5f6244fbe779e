"""Quantize the student for a trained method: formats of its layers, start of their scales, and ablations.

Mixed precision: with a mean of b bits, layers holding half of the quantized weights get b + 1, the others b - 1. Which ones is
said by a measure of each layer at b - 1 bits, everything else in bf16: "damage" is the divergence of the student's own answers
on training rows, in nats a token; "error" the relative squared error of the weights; "reverse" takes the layers that "damage"
would not. Layers are compared per weight, as a bit of a large layer costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from benchmarks.accuracy.methods import Method
from benchmarks.accuracy.others import prepare
from benchmarks.accuracy.study import SETTINGS
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.quantizer import PARAMETER, QuantFormat, QuantizedLayerGroup, attach, fake_quantize, stored_scale
from grace_plugin.teacher import model_inputs
from grace_plugin.vlm import capture, family_of, matches

__all__ = ["Quantized", "quantize", "stored_dtype"]

Form = tuple[int, int | None]  # bits, group size


@dataclass
class Quantized:
    """What was put on the student. bake: ends another library's quantizer; bits: by layer, where they differ."""

    attached: tuple[QuantizedLayerGroup, ...] = ()
    bake: Callable[[], None] = lambda: None
    bits: dict[str, int] = field(default_factory=dict)


def stored_dtype(setting: str) -> torch.dtype:
    """Of weights and scales in a setting's checkpoint: 8-bit codes do not survive bfloat16."""
    return torch.float16 if (SETTINGS[setting] or (0,))[0] == 8 else torch.bfloat16


def quantize(
    model: Any, method: Method, setting: str, probe: Mapping[str, Any], scales: Mapping[str, Tensor] | None = None
) -> Quantized:
    """Put fake quantization on the decoder's linears: GRACE's learned scales, or another library's quantizer.

    probe: a batch of training rows, on which layers are judged for mixed precision.
    scales: [out, groups] by layer, where they start instead of the method's own start.
    """
    form = SETTINGS[setting]
    if form is None:
        return Quantized()
    ignored = family_of(model).quantization_ignore()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not matches(n, ignored)}
    if method.quantizer != "grace":
        return Quantized(bake=prepare(method.quantizer, model, layers, *form))
    stored = torch.float32 if method.float_scales else stored_dtype(setting)
    start: Any = {"candidates": 1, "low": 1.0, "high": 1.0} if method.start == "minmax" else {}
    bits = mixed_bits(model, layers, method.mixed, form, probe) if method.mixed else dict.fromkeys(layers, form[0])
    attached = []
    for width in sorted(set(bits.values())):
        chosen = {name: layer for name, layer in layers.items() if bits[name] == width}
        attached.append(attach(chosen, QuantFormat(width, form[1], stored), **start))
        for layer in chosen.values() if method.float_scales or not method.masked else ():
            layer.forward = MethodType(changed_forward(QuantFormat(width, form[1], stored), method.masked), layer)  # type: ignore[method-assign]
    for name, scale in (scales or {}).items():
        getattr(layers[name], PARAMETER).data = scale.float().log()
    return Quantized(tuple(attached), bits=bits if method.mixed else {})


def changed_forward(fmt: QuantFormat, masked: bool) -> Callable[[nn.Linear, Tensor], Tensor]:
    """Forward of an attached layer that quantizes in float32 and multiplies in autocast's dtype.

    Its values are those of the layer's own forward where that dtype holds what is stored. masked: a weight beyond the clip has
    no gradient.
    """
    low, high = fmt.code_range

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        theta, weight = getattr(self, PARAMETER), self.weight
        with torch.autocast(weight.device.type, enabled=False):
            quantized = fake_quantize(weight, theta, fmt)
            if not masked:
                scale = stored_scale(theta.detach(), fmt.stored_dtype).float().unsqueeze(2)
                code = (weight.detach().unflatten(1, (theta.shape[1], -1)) / scale).round()
                outside = ((code < low) | (code > high)).flatten(1)
                quantized = quantized + torch.where(outside, weight - weight.detach(), 0.0)
        return linear(input, quantized, self.bias)

    return forward


def mixed_bits(
    model: Any, layers: Mapping[str, nn.Linear], how: str, form: Form, probe: Mapping[str, Any]
) -> dict[str, int]:
    """Bits by layer: one more than the setting's for layers that hold half of the weights, one fewer for the others."""
    found = dict(damages(model, layers, how, (form[0] - 1, form[1]), probe))
    ranked = sorted(layers, key=lambda name: found[name] / layers[name].weight.numel(), reverse=how != "reverse")
    left, bits = sum(layer.weight.numel() for layer in layers.values()) / 2, {}
    for name in ranked:
        more = layers[name].weight.numel() <= left
        left -= layers[name].weight.numel() * more
        bits[name] = form[0] + 1 if more else form[0] - 1
    return bits


@torch.no_grad()
def damages(
    model: Any, layers: Mapping[str, nn.Linear], how: str, form: Form, probe: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    """Layer and what rounding it alone does, by the measure `how`."""
    model.eval()
    before = answers(model, probe)
    for name, layer in layers.items():
        attached = attach({name: layer}, QuantFormat(*form), cache=False)
        if how == "error":
            ((codes, scale),) = attached.freeze().values()
            rounded = (codes.unflatten(1, (scale.shape[1], -1)) * scale.float().unsqueeze(2)).flatten(1)
            damage = ((rounded - layer.weight).square().sum() / layer.weight.square().sum()) * layer.weight.numel()
        else:
            damage = kl_div(answers(model, probe), before, reduction="batchmean", log_target=True)
        attached.detach()
        yield name, float(damage)


def answers(model: Any, probe: Mapping[str, Any]) -> Tensor:
    """Log-probabilities of the next token at the supervised positions of a batch, float32 [N, V]."""
    with capture(model.model.language_model) as caught:
        model(**model_inputs(probe), use_cache=False, logits_to_keep=1)
    assert caught.final is not None
    hidden = caught.final[:, :-1][probe["labels"][:, 1:] != IGNORE_INDEX]
    return log_softmax(model.lm_head(hidden).float(), -1)
