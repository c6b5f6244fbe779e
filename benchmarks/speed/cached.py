"""A teacher as `grace teacher cache` leaves it: a folder with its head alone, and a store with the states of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from grace_plugin.data import SAMPLE_KEY
from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher.base import supervised_positions
from grace_plugin.teacher.cached import CachedTeacher, open_store, teacher_identity
from grace_plugin.teacher.checkpoint import open_checkpoint
from grace_plugin.teacher.store import ShardWriter, write_store

__all__ = ["cached_teacher"]


def cached_teacher(config: Any, batch: dict[str, Any], image_token: int, folder: Path, device: str) -> CachedTeacher:
    """Write random states for the rows of `batch` and open them; the batch gets its keys."""
    width, rows = config.get_text_config().hidden_size, config.get_text_config().vocab_size
    checkpoint, store = folder / "teacher", folder / "store"
    config.dtype = torch.bfloat16
    config.save_pretrained(checkpoint)
    head = (torch.randn(rows, width, device=device) / width**0.5).to("cpu", torch.bfloat16)
    save_file({"lm_head.weight": head}, checkpoint / "model.safetensors")
    identity = teacher_identity(open_checkpoint(str(checkpoint)), "auto")
    write_store(store, {"teacher": identity, "processor": {}, "visual": True}, {"teacher": str(checkpoint)})
    batch[SAMPLE_KEY] = [f"{row:064d}" for row in range(len(batch["input_ids"]))]
    with ShardWriter(store, 1 << 28) as writer:
        for key, ids, labels in zip(batch[SAMPLE_KEY], batch["input_ids"], batch["labels"], strict=True):
            supervised, seen = len(supervised_positions(labels[None])), int((ids == image_token).sum())
            states = torch.randn(supervised + seen, width, device=device).to(torch.bfloat16)
            writer.add(key, states[:supervised], states[supervised:])
    asked = TeacherRecipe(kind="cached", model=str(checkpoint), cache=str(store))
    teacher = CachedTeacher(open_store(asked, visual=True), asked)
    teacher.to(torch.device(device))
    return teacher
