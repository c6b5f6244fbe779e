"""The registry of families, by the `model_type` of a model's config."""

from __future__ import annotations

from typing import Any, TypeVar

from grace_plugin.vlm.base import Family

__all__ = ["FAMILIES", "family_of", "register_family"]

FAMILIES: dict[str, Family] = {}

Registered = TypeVar("Registered", Family, type[Family])


def register_family(family: Registered) -> Registered:
    """Register a family (a subclass, or an instance of one) under its `model_type`; also a class decorator.

    A later registration replaces an earlier one.
    """
    registered: Any = family() if isinstance(family, type) else family
    FAMILIES[registered.model_type] = registered
    return family


def family_of(model: Any) -> Family:
    """Return the family of a model, or of any object with a model's `config`.

    Raises:
        ValueError: the model's `model_type` is not registered; names it and how to add it.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        architecture = (getattr(config, "architectures", None) or [type(model).__name__])[0]
        raise ValueError(
            f"model family '{model_type}' ({architecture}) is not known to grace_plugin; known: {sorted(FAMILIES)}. Pass a "
            "subclass of Family to register_family (examples/custom_family.py), or add the class to the file of "
            f"grace_plugin/vlm/ with the same layout or as grace_plugin/vlm/{model_type}.py"
        )
    return FAMILIES[model_type]
