"""A teacher that stays in memory beside the student, or in host memory with its layers streamed.

It runs once per micro-batch without gradients, and only what the losses read is kept: its final hidden states at supervised
positions and its penultimate ones at visual tokens, megabytes instead of logits.

Offloaded, every weight crosses to the device once per micro-batch, however small: 16 GB at 25 GB/s (PCIe 4.0 x16) are 0.6 s.
The head stays on the device, where every loss reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.teacher.base import Teacher, TeacherStates, model_inputs, states_of
from grace_plugin.vlm import VisualTokens, family_of
from grace_plugin.vlm.loading import load_model

__all__ = ["OffloadedTeacher", "ResidentTeacher", "load_teacher"]


def load_teacher(source: str, *, revision: str = "main", dtype: str = "auto", kind: str = "resident") -> nn.Module:
    """Load a teacher checkpoint for inference, whole.

    A teacher in compressed-tensors or FP8 becomes dense, and so does an offloaded one in bitsandbytes: it takes the memory of
    its unquantized weights.

    Args:
        kind: the recipe's `teacher.kind`.

    Raises:
        ValueError: nothing loadable at `source`, weights that load in part, or a quantization that this kind cannot use; the
            message says how to name a teacher.
    """
    try:
        model = load_model(source, "teacher", revision=revision, dtype=dtype, kind=kind)
    except ValueError as error:
        raise ValueError(
            f"{error}. Set teacher.model in the recipe to a folder or hub id, or pass a loaded model as teacher="
        ) from error
    return model.requires_grad_(False)


class ResidentTeacher(Teacher):
    """Wraps a loaded teacher model; holds no state of a run."""

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
        self._device = next(self.model.parameters()).device  # "cuda" has become one of them

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V_t, d_t] and bias of the output head."""
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        """Run the teacher on a batch."""
        if batch["input_ids"].device == self._device:
            inputs = model_inputs(batch, self.model, host)
        else:
            inputs = {key: value.to(self._device) for key, value in model_inputs(batch).items()}
        return states_of(self.model, self._text_model, inputs, positions, visual)


class OffloadedTeacher(ResidentTeacher):
    """Weights in host memory, brought to the device layer by layer as the forward pass needs them (accelerate's hooks)."""

    side_stream = False  # the host waits for each copy, wherever it is queued

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.cpu())
        self._head = super().head()
        self._streamed = False

    def to(self, device: torch.device) -> None:
        """Choose the device that the layers are streamed to; once."""
        if self._streamed and device == self._device:
            return
        if self._streamed:
            raise RuntimeError(f"the teacher's layers are streamed to {self._device} already and cannot go to {device}")
        from accelerate import cpu_offload

        weight, bias = self._head
        self._head = weight.to(device), None if bias is None else bias.to(device)
        cpu_offload(self.model, execution_device=device)
        self._device, self._streamed = device, True

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V_t, d_t] and bias of the output head, held on the device."""
        return self._head

    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        """Run the teacher on a batch, streaming to the batch's device unless another was chosen."""
        if not self._streamed:
            self.to(positions.device)
        return super().states(batch, positions, visual, host)
