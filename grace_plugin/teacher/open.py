"""The teacher that a recipe asks for, and whether it can teach a student."""

from __future__ import annotations

from typing import Any

from torch import nn

from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher.base import MISSING, Teacher
from grace_plugin.teacher.cached import CachedTeacher
from grace_plugin.teacher.resident import OffloadedTeacher, ResidentTeacher, load_teacher
from grace_plugin.teacher.self_teacher import SelfTeacher
from grace_plugin.teacher.store import StateStore
from grace_plugin.vlm import (
    check_image_processors,
    check_pixels,
    family_of,
    load_image_processor,
    load_tokenizer,
    load_video_processor,
    shared_vocabulary,
)
from grace_plugin.vlm.loading import check_finite, check_model

__all__ = ["check_pair", "open_teacher"]


def open_teacher(asked: TeacherRecipe, student: nn.Module, given: Any, store: StateStore | None) -> Teacher:
    """Open a teacher of the asked kind.

    Args:
        given: a loaded model that replaces the recipe's checkpoint, a `Teacher` that is used as it is, or None.
        store: opened for a cached teacher.

    Raises:
        ValueError: no teacher is named, nothing loadable there, or a loaded one that this kind cannot use.
    """
    if (given is not None and asked.kind in ("self", "cached")) or (asked.kind == "self" and asked.model is not None):
        raise ValueError(
            f"teacher.kind: {asked.kind} does not use the teacher that was passed; pass none (for cached, name its checkpoint "
            "in teacher.model), or set kind: resident"
        )
    if asked.kind == "self":
        return SelfTeacher(student)
    if asked.kind == "cached":
        assert store is not None
        return CachedTeacher(store, asked)
    if given is None and asked.model is None:
        raise ValueError(MISSING)
    if isinstance(given, Teacher):
        if asked.kind != "resident":
            raise ValueError(
                f"teacher.kind: {asked.kind} does not apply to the {type(given).__name__} that was passed, which says what "
                "it does itself; pass its model, or set kind: resident"
            )
        return given
    if given is None:
        given = load_teacher(str(asked.model), revision=asked.revision, dtype=asked.dtype, kind=asked.kind)
    else:
        check_model(given, "teacher", kind=asked.kind)
    check_finite(dict(given.named_parameters()), "teacher")
    model = given
    return OffloadedTeacher(model) if asked.kind == "offload" else ResidentTeacher(model)


def check_pair(student: Any, teacher: Any, processors: tuple[Any, Any], *, student_rows: int, teacher_rows: int) -> int:
    """Whether two models speak of the same tokens and pixels; returns the number of token ids they share.

    Args:
        student, teacher: anything with a model's `config` and `name_or_path`: a model, a `Teacher`, a checkpoint not loaded.
        processors: student's and teacher's; None for the one beside the checkpoint.
        student_rows, teacher_rows: rows of the output heads.

    Raises:
        ValueError: they do not; names what differs, with both values.
    """
    own, theirs = processors
    check_pixels(family_of(student), student.config, family_of(teacher), teacher.config)
    if not isinstance(teacher, SelfTeacher):
        for kind, load in (("image", load_image_processor), ("video", load_video_processor)):
            check_image_processors(own or load(student), theirs or load(teacher), kind)
    return shared_vocabulary(
        own or load_tokenizer(student, "student"),
        theirs or load_tokenizer(teacher, "teacher"),
        student_rows=student_rows,
        teacher_rows=teacher_rows,
    )
