"""The registry of families, by the `model_type` of a model's config."""

from __future__ import annotations

from typing import Any

from grace_plugin.vlm.anyres import LlavaNext, LlavaOnevision
from grace_plugin.vlm.base import Family
from grace_plugin.vlm.llava import Llava, Mistral3
from grace_plugin.vlm.qwen_moe import Qwen3VLMoe
from grace_plugin.vlm.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from grace_plugin.vlm.tiles import Gemma3, Idefics3, InternVL, SmolVLM

__all__ = ["FAMILIES", "family_of", "register_family"]

FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known under its `model_type`; a later registration replaces an earlier one."""
    FAMILIES[family.model_type] = family


def family_of(model: Any) -> Family:
    """The family of a model, or of anything with a model's `config`.

    Raises:
        ValueError: the model's `model_type` is unknown; the message names it and the file to add.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        built = (getattr(config, "architectures", None) or [type(model).__name__])[0]
        raise ValueError(
            f"model family '{model_type}' ({built}) is not known to grace_plugin; known: {sorted(FAMILIES)}. "
            f"Add a subclass of Family to the file of families laid out alike, or in a new grace_plugin/vlm/{model_type}.py, "
            "and to registry.py; or call register_family with your own"
        )
    return FAMILIES[model_type]


for _family in (
    Llava(), LlavaNext(), LlavaOnevision(), Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe(), InternVL(), SmolVLM(),
    Idefics3(), Gemma3(), Mistral3(),
):  # fmt: skip
    register_family(_family)
