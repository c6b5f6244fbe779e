"""Read and check what a run is given: recipe, student and processor."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from grace_plugin.export.write import VerifiedSave
from grace_plugin.modifier import GraceModifier
from grace_plugin.run.recipe_file import recipe_from
from grace_plugin.teacher import StateStore, check_cached_processor
from grace_plugin.upstream import Modifier, QuantizationMixin, Recipe
from grace_plugin.vlm import check_depth
from grace_plugin.vlm.loading import check_checkpoint, check_model, check_weights, load_model

__all__ = [
    "check_models",
    "check_modifiers",
    "copy_recipe",
    "grace_modifier",
    "load_processor",
    "load_student",
    "open_cache",
    "read_recipe",
]

logger = logging.getLogger(__name__)


def grace_modifier(recipe: Recipe) -> GraceModifier:
    """Return the one GraceModifier of a recipe.

    Raises:
        ValueError: none, or more than one.
    """
    found = [modifier for modifier in recipe.modifiers if isinstance(modifier, GraceModifier)]
    if len(found) != 1:
        names = [type(modifier).__name__ for modifier in recipe.modifiers]
        raise ValueError(f"the recipe holds {len(found)} GraceModifier(s) ({names}); a GRACE run needs exactly one")
    return found[0]


# of llm-compressor's own: acts on the events of training steps, by masks
_TRAINS_ALONGSIDE = {"ConstantPruningModifier"}


def check_modifiers(recipe: Recipe, *, oneshot: bool = False) -> None:
    """Refuse modifiers that GRACE cannot run with: they would quantize a second time, change weights whose scales are being
    learned, or do nothing because no calibration runs.

    Args:
        recipe: with one GraceModifier. Modifiers that are not llm-compressor's own are the caller's responsibility, unless they
            quantize.
        oneshot: whether each modifier runs a pipeline of its own, and no training events reach the others.

    Raises:
        ValueError: names every such modifier and how to get its effect.
    """
    allowed = set() if oneshot else _TRAINS_ALONGSIDE
    refused = []
    for modifier in recipe.modifiers:
        kind = type(modifier)
        upstreams = kind.__module__.partition(".")[0] == "llmcompressor" and kind.__name__ not in allowed
        if not isinstance(modifier, GraceModifier) and (upstreams or isinstance(modifier, QuantizationMixin)):
            refused.append(kind.__name__)
    if refused:
        raise ValueError(
            f"GraceModifier and {', '.join(refused)} cannot be in one recipe: GRACE quantizes alone, and what another modifier "
            "does to weights or schemes would not be what was trained. Say all that is quantized in GraceModifier's scheme or "
            "config_groups; run a modifier that transforms or prunes weights before, by itself, and give its result as "
            "the student"
        )


def read_recipe(recipe: str | os.PathLike[str] | Recipe | Modifier, *, oneshot: bool = False) -> Recipe:
    """Return a recipe from a path, YAML text, a modifier or a recipe, checked; `oneshot` as for `check_modifiers`.

    Raises:
        ValueError: unreadable, an unknown key, a scheme that is not learned, or modifiers that GRACE cannot run with.
    """
    read = recipe_from(recipe)
    grace_modifier(read)
    check_modifiers(read, oneshot=oneshot)
    return read


def copy_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with a GraceModifier of its own, so that a run leaves the caller's as it is."""
    # other modifiers are the caller's own, whose state only they know
    modifiers = [m.copied() if isinstance(m, GraceModifier) else m for m in recipe.modifiers]
    return recipe.model_copy(update={"modifiers": modifiers})


def check_models(modifier: GraceModifier, student: str | os.PathLike[str] | nn.Module) -> None:
    """Check the files of student and teacher, where they are not loaded yet, before anything is.

    Raises:
        ValueError: names the file, the method or the weights that do not fit.
    """
    asked, named, found = modifier.teacher, modifier.named_teacher, {}
    if not isinstance(student, nn.Module):
        found["student"] = check_checkpoint(os.fspath(student), "student")
    if named is not None:
        found["teacher"] = check_checkpoint(named, "teacher", revision=asked.revision, kind=asked.kind)
    if modifier.reads_visual_states:
        for role, config in found.items():
            check_depth(config, role)


def open_cache(
    modifier: GraceModifier, student: str | os.PathLike[str] | nn.Module, processor: Any
) -> StateStore | None:
    """Return the store of a cached teacher, checked against recipe and processor before any model is loaded; else None.

    Raises:
        ValueError: no store, or one written for another teacher or with another processor.
    """
    store = modifier.open_store()
    if store is not None:
        check_cached_processor(store, processor or load_processor(student))
    return store


def load_student(model: str | os.PathLike[str] | nn.Module, method: str = "full") -> Any:
    """Return the student: a loaded model as it is, or a checkpoint, in float32 when all of it trains, else as it is stored.

    Args:
        model: a loaded model or a checkpoint.
        method: the recipe's `training.method`.

    Raises:
        ValueError: nothing loadable there, weights that load in part, a quantized checkpoint, an adapter, or a model that an
            earlier run has saved.
    """
    if isinstance(model, nn.Module):
        if isinstance(getattr(model, "save_pretrained", None), VerifiedSave):
            raise ValueError(
                "an earlier GRACE run has saved this model and its weights in memory are packed; load the checkpoint again"
            )
        check_model(model, "student")
        _warn_of_folder(model)
        return model
    return load_model(os.fspath(model), "student", dtype=torch.float32 if method == "full" else "auto")


def _warn_of_folder(model: Any) -> None:
    """Warn where a loaded student's folder lacks weights that the model in memory has: transformers drew them at random."""
    source = getattr(model, "name_or_path", "")
    if source and os.path.isdir(source):
        try:
            check_weights(source, "student", model.config)
        except ValueError as error:
            logger.warning(
                "the student was given as a loaded model and its weights in memory are trained, but: %s", error
            )


def load_processor(student: Any) -> Any:
    """Return the processor of the student's checkpoint; `student` is a loaded model or its checkpoint.

    Raises:
        ValueError: nothing readable there.
    """
    from transformers import AutoProcessor

    source = student if isinstance(student, str | os.PathLike) else getattr(student, "name_or_path", "")
    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the student's processor from {source!r}; pass processor=") from error
