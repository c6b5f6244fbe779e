"""Choose what of a student trains, and in which dtype, by the recipe's `training.method`.

    full     projector and decoder by the family's rule, and the learned scales
    scales   the learned scales (float32), with `norms` the normalization layers too
    lora     scales and low-rank updates (float32), with `norms` the normalization layers too

With the last two every other weight keeps the dtype it was loaded in. A normalization layer that trains in such a model has a
float32 master of its weight and computes with the master rounded to the loaded dtype, so that small steps are not lost and what
trains is what is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from grace_plugin.quantizer import LORA_A, LORA_B, PARAMETER
from grace_plugin.recipe import LoraRecipe, TrainingRecipe
from grace_plugin.vlm import Family, matches

__all__ = ["choose_trainable", "lora_layers", "release_masters", "upcast_to_fp32"]

LEARNED = (PARAMETER, LORA_A, LORA_B)


class Rounded(nn.Module):
    """Parametrization by a float32 master that its layer sees in another dtype; the gradient passes unchanged."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        """Return the master in the layer's dtype."""
        return master.to(self.dtype)


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    # by class name: models bring their own RMSNorm classes, which share no base class
    return (module for module in model.modules() if "norm" in type(module).__name__.lower())


def upcast_to_fp32(model: nn.Module, asked: TrainingRecipe) -> None:
    """Turn every parameter into float32 where all of the model trains and the recipe asks for it."""
    if asked.method == "full" and asked.master_weights == "float32":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()


def choose_trainable(model: nn.Module, family: Family, asked: TrainingRecipe) -> None:
    """Freeze every parameter that does not train, and give normalization layers that do a float32 master.

    A parameter that was frozen before stays frozen. With method "full" dtypes are left as they are.
    """
    norms = {id(p) for module in _norms(model) for p in module.parameters()} if asked.norms else set()
    for name, parameter in model.named_parameters():
        trains = family.trains(name) and not matches(name, asked.freeze)
        if asked.method != "full":
            trains = trains and (name.rpartition(".")[2] in LEARNED or id(parameter) in norms)
        if not trains:
            parameter.requires_grad_(False)
    if asked.method != "full" and asked.master_weights == "float32":
        _hold_masters(model)


def _hold_masters(model: nn.Module) -> None:
    for module in list(_norms(model)):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and parameter.dtype != torch.float32:
                dtype, parameter.data = parameter.dtype, parameter.data.float()
                # unsafe: torch refuses a parametrization that changes the dtype otherwise
                parametrize.register_parametrization(module, name, Rounded(dtype), unsafe=True)


def release_masters(model: nn.Module) -> None:
    """Undo the masters of `choose_trainable`: each master is its layer's parameter again."""
    for module in list(_norms(model)):
        for name, chain in list(getattr(module, "parametrizations", {}).items()):
            if isinstance(chain[0], Rounded):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def lora_layers(asked: LoraRecipe, linears: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the quantized layers that get a low-rank update.

    Raises:
        ValueError: no layer matches, or the rank is not below a layer's width.
    """
    chosen = {name: linear for name, linear in linears.items() if not asked.targets or matches(name, asked.targets)}
    if not chosen:
        raise ValueError(
            f"no quantized layer matches training.lora.targets {list(asked.targets)}; leave it out for all"
        )
    narrow = [name for name, linear in chosen.items() if asked.rank >= min(linear.weight.shape)]  # type: ignore[arg-type]
    if narrow:
        raise ValueError(
            f"training.lora.rank {asked.rank} is not below the width of {len(narrow)} layer(s): {', '.join(narrow[:6])}; "
            "choose a smaller rank, or leave them out of training.lora.targets"
        )
    return list(chosen)
