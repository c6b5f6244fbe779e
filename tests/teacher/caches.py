"""Teacher caches for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data import ConversationCollator
from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher import CachePlan, Teacher, TeacherStates, build_cache, supervised_positions
from tests.pairs import Pair, recipe_text

__all__ = ["ask", "asked", "build", "cached_recipe", "collator_of", "everything", "same", "video_sample"]


def asked(pair: Pair, folder: Path, **other: Any) -> TeacherRecipe:
    """The teacher block of a run that reads the cache."""
    given = {"kind": "cached", "model": str(pair.teacher), "dtype": "float32", "cache": str(folder)}
    return TeacherRecipe(**(given | other))


def cached_recipe(pair: Pair, folder: Path, **blocks: Any) -> str:
    """A recipe whose teacher is read from the cache."""
    return recipe_text(None, teacher=asked(pair, folder).model_dump(), **blocks)


def build(pair: Pair, folder: Path, dataset: Any, **options: Any) -> CachePlan:
    """A cache of the pair's teacher in float32, on the CPU, where the teacher that it is compared with runs too."""
    teacher = TeacherRecipe(model=str(pair.teacher), dtype="float32")
    given = {"teacher": teacher, "dataset": dataset, "output_dir": folder, "device": "cpu"}
    return build_cache(pair.student, **(given | options))


def video_sample(frames: list[Any], image: Any) -> dict[str, Any]:
    """A sample with a video before an image."""
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "what is the shape?"}]
    said = [{"type": "text", "text": "a red square"}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": said}],
        "images": [image], "videos": [frames],
    }  # fmt: skip


def everything(folder: Path) -> dict[str, Tensor]:
    """A copy of every tensor of a store by name; the file's own are mapped, and change with it."""
    from safetensors.torch import load_file

    return {name: value.clone() for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def ask(teacher: Teacher, batch: dict[str, Any]) -> TeacherStates:
    """What a teacher answers for a batch of the collator."""
    visual = teacher.family.visual_tokens(teacher.config, batch)
    return teacher.states(batch, supervised_positions(batch["labels"]), visual)


def same(left: TeacherStates, right: TeacherStates) -> bool:
    """Bit for bit."""
    return torch.equal(left.final, right.final) and torch.equal(left.visual, right.visual)


def collator_of(pair: Pair) -> ConversationCollator:
    """The run's collator, with keys."""
    from transformers import AutoProcessor

    return ConversationCollator(AutoProcessor.from_pretrained(pair.student), keys=True)
