"""The training batch that is kept, so that the finished checkpoint can be verified on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grace_plugin.objective.window import MicroBatch
from grace_plugin.vlm import Family

__all__ = ["choose_probe"]


def choose_probe(
    kept: dict[str, Tensor] | None, batch: Mapping[str, Any], item: MicroBatch, family: Family
) -> dict[str, Tensor] | None:
    """The batch a checkpoint will be verified on: the run's first with a supervised token and an image, text until then.

    Args:
        kept: the choice so far; None before the first.
        batch: the micro-batch just looked at, and `item` what was found in it.
    """
    pictured = kept is not None and any(key in kept for key in family.pixel_keys.values())
    if pictured or not item.positions.numel() or (kept is not None and not item.visual.sizes):
        return kept
    return {k: v.detach().cpu().clone() for k, v in batch.items() if isinstance(v, Tensor)}
