"""Share a teacher's states between runs: the run that reaches a batch first computes them, the others read them.

The distillation runs of the demo train on the same batches under the same teacher. The states of a batch are stored as they
are, in a file named by the hash of the batch, so a run reads exactly what it would have computed, in whatever order runs
proceed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grace_plugin.teacher import ResidentTeacher, TeacherStates
from grace_plugin.vlm import VisualTokens

__all__ = ["SharedTeacher"]


class SharedTeacher(ResidentTeacher):
    """A resident teacher whose states of a batch are computed once for all runs with the same `folder`.

    Raises:
        OSError: the folder cannot be written to.
    """

    side_stream = False  # files are read and written by the host, which a side stream would not wait for

    def __init__(self, model: nn.Module, folder: Path) -> None:
        super().__init__(model)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        """Return the states from the batch's file, or run the teacher and write them."""
        file = self.folder / f"{_digest(batch if host is None else host)}.safetensors"
        if file.is_file():
            return TeacherStates(**load_file(file, device=str(positions.device)))
        made = super().states(batch, positions, visual, host)
        partial = file.with_suffix(f".{os.getpid()}")
        save_file({"final": made.final.contiguous(), "visual": made.visual.contiguous()}, partial)
        partial.replace(file)
        return made


def _digest(batch: Mapping[str, Any]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values of a batch's tensors."""
    found = hashlib.sha256()
    for name, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
