"""A teacher in host memory, whose layers are copied to the device as the forward pass needs them (accelerate's hooks).

Every weight is copied once per micro-batch, however small the micro-batch: 16 GB at 25 GB/s (PCIe 4.0 x16) take 0.6 s. The head
stays on the device, where every loss reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.teacher.base import TeacherStates
from grace_plugin.teacher.resident import ResidentTeacher
from grace_plugin.vlm import VisualTokens

__all__ = ["OffloadedTeacher"]


class OffloadedTeacher(ResidentTeacher):
    """A teacher whose layers are streamed from host memory."""

    side_stream = False  # accelerate's hooks wait for each copy, on whatever stream it is queued

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.cpu())
        self._head = super().head()
        self._streamed = False

    def to(self, device: torch.device) -> None:
        """Set the device that the layers are streamed to, once.

        Raises:
            RuntimeError: another device was set before.
        """
        if self._streamed and device == self._device:
            return
        if self._streamed:
            raise RuntimeError(f"the teacher's layers are streamed to {self._device} already and cannot go to {device}")
        # accelerate moves the weights into hooks of one execution device, which cannot be given another.
        from accelerate import cpu_offload

        weight, bias = self._head
        self._head = weight.to(device), None if bias is None else bias.to(device)
        cpu_offload(self.model, execution_device=device)
        self._device, self._streamed = device, True

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V_t, d_t] and bias of the output head, which stay on the device."""
        return self._head

    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        """Run the teacher on a batch, streaming to the batch's device unless another was set."""
        if not self._streamed:
            self.to(positions.device)
        return super().states(batch, positions, visual, host)
