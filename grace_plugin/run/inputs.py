"""What a run is given: recipe, student and processor, read and checked."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from torch import nn

from grace_plugin.modifier import GraceModifier
from grace_plugin.run.recipe_file import recipe_from
from grace_plugin.teacher import StateStore, check_cached_processor
from grace_plugin.upstream import Modifier, Recipe

__all__ = ["grace_modifier", "load_processor", "load_student", "open_cache", "read_recipe", "recipe_hash"]


def grace_modifier(recipe: Recipe) -> GraceModifier:
    """The one GraceModifier of a recipe.

    Raises:
        ValueError: none, or more than one.
    """
    found = [modifier for modifier in recipe.modifiers if isinstance(modifier, GraceModifier)]
    if len(found) != 1:
        names = [type(modifier).__name__ for modifier in recipe.modifiers]
        raise ValueError(f"the recipe holds {len(found)} GraceModifier(s) ({names}); a GRACE run needs exactly one")
    return found[0]


def read_recipe(recipe: str | os.PathLike[str] | Recipe | Modifier) -> Recipe:
    """A recipe from a path, YAML text, a modifier or a recipe, checked.

    Raises:
        ValueError: unreadable, an unknown key, or a scheme that is not learned.
    """
    read = recipe_from(recipe)
    grace_modifier(read)
    return read


def recipe_hash(modifier: GraceModifier) -> str:
    """SHA-256 of everything the recipe asks for; a checkpoint is resumed only under the same."""
    asked = modifier.model_dump(exclude={"index", "initialized_", "finalized_", "started_", "ended_"})
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def open_cache(
    modifier: GraceModifier, student: str | os.PathLike[str] | nn.Module, processor: Any
) -> StateStore | None:
    """The store of a cached teacher, checked against recipe and processor before any model is loaded; else None.

    Raises:
        ValueError: no store, or one written for another teacher or with another processor.
    """
    store = modifier.open_store()
    if store is not None:
        check_cached_processor(store, processor or load_processor(student))
    return store


def load_student(model: str | os.PathLike[str] | nn.Module, method: str = "full") -> Any:
    """The student: a loaded model as it is, or a checkpoint, in float32 when all of it trains, else as it is stored.

    method: the recipe's `training.method`.

    Raises:
        ValueError: nothing loadable there, or a model that an earlier run has saved.
    """
    if isinstance(model, nn.Module):
        if getattr(getattr(model, "save_pretrained", None), "_grace", False):
            raise ValueError(
                "an earlier GRACE run has saved this model and its weights in memory are packed; load the checkpoint anew"
            )
        return model
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(
            os.fspath(model), dtype=torch.float32 if method == "full" else "auto"
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the student {os.fspath(model)!r}: {error}") from error


def load_processor(student: Any) -> Any:
    """The processor beside the student's checkpoint; `student` is a loaded model or its checkpoint.

    Raises:
        ValueError: nothing readable there.
    """
    from transformers import AutoProcessor

    source = student if isinstance(student, str | os.PathLike) else getattr(student, "name_or_path", "")
    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the student's processor from {source!r}; pass processor=") from error
