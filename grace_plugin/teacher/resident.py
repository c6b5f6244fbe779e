"""A teacher that stays in memory beside the student.

It runs once per micro-batch without gradients, and only what the losses read is kept: its final hidden states at supervised
positions and its penultimate ones at visual tokens, megabytes instead of logits.

Legend: N supervised positions, M visual tokens, d_t teacher width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.vlm import VisualTokens, capture, family_of

__all__ = ["MISSING", "ResidentTeacher", "TeacherStates", "load_teacher"]


MISSING = (
    "GRACE distils from a teacher and none was given: set teacher.model in the recipe, pass teacher=, or disable the distill "
    "and relational blocks"
)


@dataclass(frozen=True)
class TeacherStates:
    """What is kept of one teacher pass: `final` [N, d_t] and `visual` [M, d_t], in the teacher's dtype."""

    final: Tensor
    visual: Tensor


def load_teacher(source: str, *, revision: str = "main", dtype: str = "auto") -> nn.Module:
    """Load a teacher checkpoint for inference.

    Raises:
        ValueError: nothing loadable at `source`; the message says how to name a teacher.
    """
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(source, revision=revision, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load the teacher {source!r}: {error}. Set teacher.model in the recipe to a folder or hub id, "
            "or pass a loaded model as teacher="
        ) from error
    return model.eval().requires_grad_(False)


class ResidentTeacher:
    """Wraps a loaded teacher model; holds no state of a run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.family = family_of(model)
        self.config: Any = model.config
        self._text_model = self.family.text_model(model)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V_t, d_t] and bias of the output head."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return head.weight, getattr(head, "bias", None)

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Any], positions: Tensor, visual: VisualTokens) -> TeacherStates:
        """Run the teacher on a batch (without labels) and keep what the losses read.

        Args:
            inputs: model inputs on the student's device.
            positions: int64 [N], flat positions in [B * S] that predict a supervised token.
            visual: positions of the visual tokens.
        """
        device = next(self.model.parameters()).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with capture(self._text_model) as caught:
            self.model(**moved, use_cache=False, logits_to_keep=1)
        assert caught.final is not None and caught.penultimate is not None
        final = caught.final.flatten(0, 1).index_select(0, positions.to(device))
        seen = caught.penultimate.flatten(0, 1).index_select(0, visual.index.to(device))
        return TeacherStates(final.to(positions.device), seen.to(positions.device))
