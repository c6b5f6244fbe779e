"""Freeze what was trained: codes and scales of the final weights, written into the model that llm-compressor then saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.quantizer import QuantizedLayerGroup
from grace_plugin.trainable import release_masters


def freeze_layers(groups: Sequence[QuantizedLayerGroup]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, int]]:
    """Read codes and scales of all layers, and prove that the forward pass multiplies by exactly these.

    Each layer's weight is computed as in its forward pass and compared with `code * scale` bit for bit, one layer at a time.

    Returns:
        Codes (int8 [out, in]) and scales ([out, groups], stored dtype) by layer name, and how many weights were compared.

    Raises:
        RuntimeError: a forward pass would multiply by other weights; nothing was changed, and the call can be repeated.
    """
    frozen: dict[str, tuple[Tensor, Tensor]] = {}
    differing: dict[str, int] = {}
    for group in groups:
        # Compared layer by layer: the dense weights of all layers at once would double the model's memory.
        codes = group.freeze()
        differing |= group.count_forward_mismatches(codes)
        frozen |= codes
    if differing:
        shown = ", ".join(f"{name}: {count}" for name, count in list(differing.items())[:5])
        raise RuntimeError(
            f"in {len(differing)} of {len(frozen)} layers the forward pass multiplies by weights that are not code * scale of "
            f"the final ones ({shown}): they were changed in a way torch does not count, such as a write through .data, and "
            "the last forward passes ran on older ones. Call invalidate() of objective.attached after such a write; to save "
            "the weights as they are now, call the same again"
        )
    return frozen, {"weights": sum(codes.numel() for codes, _ in frozen.values()), "weights_differing": 0}


def freeze_model(
    model: nn.Module, groups: Sequence[QuantizedLayerGroup], dtype: torch.dtype
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, int]]:
    """Freeze all layers, write `code * scale` into their weights, remove the scales and cast every parameter.

    Args:
        model: the trained student.
        groups: its quantized layers; empty for a model that trains without quantization.
        dtype: stored dtype of the checkpoint.

    Returns, Raises:
        As `freeze_layers`.
    """
    frozen, compared = freeze_layers(groups)
    for group in groups:
        # Saving recomputes codes as round(w / s) in the saved dtype. On the latent weights that flips 0.5 to 0.95 % of the
        # codes; on code * scale it flips none.
        group.bake()
        group.detach()
    cast_parameters(model, dtype)
    return frozen, compared


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """End float32 master weights, and cast every floating-point parameter to `dtype`."""
    release_masters(model)
    # not model.to(dtype): rotary buffers must stay float32, or reloaded log-probabilities differ by 0.05 to 0.11
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def set_upstream_scales(model: Any, frozen: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Copy the learned scales into compressed-tensors' parameters, and the stored dtype into the configs that are saved."""
    for name, (_, scale) in frozen.items():
        # a new Parameter, because assigning to the old one's data would keep its dtype
        model.get_submodule(name).weight_scale = nn.Parameter(scale.clone(), requires_grad=False)
    # every sub-config: transformers loads each tower in the dtype that its own config names
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.dtype = dtype
