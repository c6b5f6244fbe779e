"""What a layer is quantized to, what it carries then, and whether it can be: every problem of every layer in one error."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grace_plugin.quantizer.cache import WeightCache
from grace_plugin.quantizer.scales import check_format, holds, validate_group

__all__ = ["PARAMETER", "STATE", "Format", "LayerState", "check_layers"]

PARAMETER = "weight_log_scale"
"""Name of the learned scales on a layer; theta = log s, float32 [out, groups]."""

STATE = "_grace_fake_quant"
"""Where an attached layer keeps its format and cache."""


@dataclass(frozen=True)
class Format:
    """What one layer is quantized to."""

    group_size: int | None
    num_bits: int
    stored_dtype: torch.dtype


@dataclass
class LayerState:
    """What an attached layer keeps beside its scales."""

    format: Format
    cache: WeightCache | None
    previous_forward: Any  # an instance forward that stood on the layer before, or None
    defer: bool = False  # leave the backward to `QuantizedLayerGroup.finalize_deferred_grads`
    pending: bool = False  # a deferred gradient may be there
    scaling: float | None = None  # alpha / rank of a low-rank update, or None without one
    computed_in: torch.dtype | None = None  # by the latest forward pass


def _problems(linears: Mapping[str, nn.Linear], form: Format) -> Iterator[str]:
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
        if linear.weight.shape != (linear.out_features, linear.in_features):
            yield f"{name}: its weight is {tuple(linear.weight.shape)}; attach before the model is sharded"
        if not holds(linear.weight.dtype, form.stored_dtype):
            yield f"{name}: a weight in {linear.weight.dtype} cannot hold what is stored as {form.stored_dtype}"
        problem = validate_group(linear.in_features, form.group_size)
        if problem is not None:
            yield f"{name}: {problem}"


def check_layers(linears: Mapping[str, nn.Linear], form: Format) -> None:
    """What :func:`attach` checks before it touches a layer.

    Raises:
        ValueError: one message naming every layer that cannot be attached, and the ways out.
    """
    check_format(form.num_bits, form.stored_dtype)
    if not linears:
        raise ValueError("no layer to quantize; check targets and ignore")
    problems = list(_problems(linears, form))
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"{len(problems)} problem(s) with the layers to quantize:\n  {listed}\nWays out: another group_size (one that "
            "divides every width, or -1 for one scale per output channel), or the layers in ignore"
        )
