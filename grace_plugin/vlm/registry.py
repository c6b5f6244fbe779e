"""The registry of families, by the `model_type` of a model's config."""

from __future__ import annotations

from typing import Any

from torch import nn

from grace_plugin.vlm.base import Family
from grace_plugin.vlm.llava import Llava
from grace_plugin.vlm.qwen_vl import Qwen2VL, Qwen3VL

__all__ = ["FAMILIES", "family_of", "register_family"]

FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known under its `model_type`; a later registration replaces an earlier one."""
    FAMILIES[family.model_type] = family


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        ValueError: the model's `model_type` is unknown; the message names it and the file to add.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model family '{model_type}' ({type(model).__name__}) is not known to grace_plugin; known: {sorted(FAMILIES)}. "
            f"Add grace_plugin/vlm/{model_type}.py with a subclass of Family, or call register_family with your own"
        )
    return FAMILIES[model_type]


for _family in (Llava(), Qwen2VL(), Qwen3VL()):
    register_family(_family)
