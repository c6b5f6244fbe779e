"""The registry of families, by the `model_type` of a model's config."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from grace_plugin.vlm.family import Family

__all__ = ["FAMILIES", "family_of", "register_family"]

FAMILIES: dict[str, Family] = {}
ENTRY_POINTS = "grace_plugin.families"

Registered = TypeVar("Registered", Family, type[Family])


def register_family(family: Registered) -> Registered:
    """Register a family (a subclass, or an instance of one) under its `model_type`; also a class decorator.

    A later registration replaces an earlier one.
    """
    registered: Any = family() if isinstance(family, type) else family
    FAMILIES[registered.model_type] = registered
    return family


@cache
def _load_installed_families() -> None:
    """Import the modules that installed packages name under the entry point group `grace_plugin.families`, once."""
    for entry_point in entry_points(group=ENTRY_POINTS):
        entry_point.load()


def family_of(model: Any) -> Family:
    """Return the family of a model, of its config, or of any object with a model's `config`.

    Raises:
        ValueError: the model's `model_type` is not registered; names it and how to add it.
    """
    config: Any = getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:  # only now: another package's import error must not break known families
        _load_installed_families()
    if model_type not in FAMILIES:
        architecture = (getattr(config, "architectures", None) or [type(model).__name__])[0]
        raise ValueError(
            f"model family '{model_type}' ({architecture}) is not known to grace_plugin; known: {sorted(FAMILIES)}. Pass a "
            "subclass of Family to register_family (examples/custom_family.py), or add the class to the file of "
            f"grace_plugin/vlm/ with the same layout or as grace_plugin/vlm/{model_type}.py"
        )
    return FAMILIES[model_type]
