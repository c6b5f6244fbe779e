"""The training batch that is kept, so that the finished checkpoint can be verified on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.objective.window import MicroBatch
from grace_plugin.vlm import Family

__all__ = ["choose_probe"]


def choose_probe(
    kept: dict[str, Tensor] | None, batch: Mapping[str, Any], item: MicroBatch, family: Family
) -> dict[str, Tensor] | None:
    """The batch a checkpoint will be verified on: the run's first with a supervised token and an image.

    Until there is one: the first with a supervised token, else the first with an image, else the first.

    Args:
        kept: the choice so far; None before the first.
        batch: the micro-batch just looked at, and `item` what was found in it.
    """
    if kept is not None:
        labels, pictured = kept.get("labels"), any(key in kept for key in family.pixel_keys.values())
        supervised = labels is None or bool((labels[:, 1:] != IGNORE_INDEX).any())
        if (bool(item.positions.numel()), bool(item.visual.sizes)) <= (supervised, pictured):
            return kept
    return {k: v.detach().cpu().clone() for k, v in batch.items() if isinstance(v, Tensor)}
