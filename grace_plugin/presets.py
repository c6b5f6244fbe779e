"""Named sets of recipe values: `preset: paper` of a GraceModifier stands for every constant of the paper (arXiv 2601.22709)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from grace_plugin.recipe import shown

__all__ = ["PRESETS", "apply_preset"]

#: what `preset:` of a GraceModifier stands for; keys that the recipe gives as well win
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "distill": {"enabled": True, "temperature": 2.0, "alpha": 1.0, "beta": 4.0, "gate_sharpness": 1.0},
        "relational": {"enabled": True, "weight": 3.0, "warmup_steps": 400, "warmup_share": 0.05},
        "controller": {
            "enabled": True,
            "beta_start": 0.5,
            "beta_min": 0.1,
            "beta_max": 1.0,
            "ema_decay": 0.99,
            "tau": 3.0,
            "eta": 0.003,
        },
        "scales": {"learning_rate_multiplier": 10.0, "candidates": 20, "search_low": 0.3, "search_high": 1.2},
    }
}


def apply_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a GraceModifier with those of its `preset` filled in where the recipe does not give them.

    Raises:
        ValueError: no preset of that name.
    """
    name = given.get("preset")
    if name is None:
        return dict(given)
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset {shown(name)} is unknown; known: {', '.join(PRESETS)}")
    filled = dict(given)
    for block, values in PRESETS[name].items():
        own = given.get(block, {})
        if isinstance(own, BaseModel):  # built in Python: what its author did not set is the preset's
            own = own.model_dump(exclude_unset=True)
        if isinstance(own, Mapping):  # anything else is refused by the block itself
            filled[block] = {**values, **own}
    return filled
