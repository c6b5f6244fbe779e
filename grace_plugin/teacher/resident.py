"""A teacher in the memory of the training device.

It runs once per micro-batch without gradients. Only what the losses read is kept: its final hidden states at supervised
positions and its penultimate ones at visual tokens, megabytes instead of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.teacher.base import Teacher, TeacherStates, model_inputs, states_of
from grace_plugin.vlm import VisualTokens, family_of
from grace_plugin.vlm.loading import load_model

__all__ = ["ResidentTeacher", "load_teacher"]


def load_teacher(source: str, *, revision: str = "main", dtype: str = "auto", kind: str = "resident") -> nn.Module:
    """Load a whole teacher checkpoint for inference.

    A teacher in compressed-tensors or FP8 is dequantized, and so is an offloaded one in bitsandbytes: each takes the memory of
    unquantized weights.

    Args:
        source: a folder or a hub id.
        revision: of the hub repository.
        dtype: of the weights; "auto" for the stored one.
        kind: the recipe's `teacher.kind`.

    Raises:
        ValueError: nothing loadable at `source`, weights that load in part, or a quantization that this kind cannot use.
    """
    try:
        model = load_model(source, "teacher", revision=revision, dtype=dtype, kind=kind)
    except ValueError as error:
        raise ValueError(
            f"{error}. Set teacher.model in the recipe to a folder or hub id, or pass a loaded model as teacher="
        ) from error
    return model.requires_grad_(False)


class ResidentTeacher(Teacher):
    """A loaded model in evaluation mode."""

    side_stream = True

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.config: Any = self.model.config
        self.name_or_path = getattr(model, "name_or_path", "")
        self._text_model = family_of(model).text_model(model)
        self._device: torch.device = next(model.parameters()).device

    def to(self, device: torch.device) -> None:
        """Move the whole model."""
        self.model.to(device)
        self._device = next(self.model.parameters()).device  # "cuda" has become "cuda:0", say

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V_t, d_t] and bias of the output head."""
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        """Run the teacher on a batch."""
        # A teacher on a device of its own gets plain copies: host inputs are made for the batch's device.
        if batch["input_ids"].device == self._device:
            inputs = model_inputs(batch, self.model, host)
        else:
            inputs = {key: value.to(self._device) for key, value in model_inputs(batch).items()}
        return states_of(self.model, self._text_model, inputs, positions, visual)
