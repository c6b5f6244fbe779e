"""Round-to-nearest INT4 checkpoints of the tiny models, and edits of one tensor of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from grace_plugin.export.write import rewrite_ignore
from grace_plugin.upstream import oneshot
from grace_plugin.vlm import family_of

__all__ = ["change", "edited", "rounded", "stored_name"]


def rounded(student: Path, folder: Path) -> Path:
    """llm-compressor's W4A16 round-to-nearest of a checkpoint."""
    model = AutoModelForImageTextToText.from_pretrained(student, dtype="auto").eval()
    family, processor = family_of(model), AutoProcessor.from_pretrained(student)
    family.unfuse_experts(model)
    patterns = family.quantization_ignore()
    recipe = QuantizationModifier(scheme="W4A16", targets=["Linear"], ignore=patterns)
    oneshot(model=model, recipe=recipe, processor=processor)
    model.save_pretrained(str(folder), save_compressed=True)
    rewrite_ignore(folder, model, patterns)
    processor.save_pretrained(folder)
    return folder


def stored_name(folder: Path, ending: str) -> str:
    """The one tensor of a checkpoint whose name ends so."""
    (name,) = [n for n in load_file(folder / "model.safetensors") if n.endswith(ending)]
    return name


def change(folder: Path, ending: str, edit: Callable[[torch.Tensor], Any]) -> None:
    """Edit one tensor of a checkpoint in place."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    edit(tensors[stored_name(folder, ending)])
    save_file(tensors, path, metadata)


def edited(source: Path, folder: Path, ending: str, edit: Callable[[torch.Tensor], Any]) -> Path:
    """A copy of a checkpoint with one tensor edited."""
    shutil.copytree(source, folder)
    change(folder, ending, edit)
    return folder
