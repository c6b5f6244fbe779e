"""Open the teacher of a recipe, and check that it can teach a student."""

from __future__ import annotations

from typing import Any

from torch import nn

from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher.base import MISSING, Teacher
from grace_plugin.teacher.cached import CachedTeacher
from grace_plugin.teacher.offloaded import OffloadedTeacher
from grace_plugin.teacher.resident import ResidentTeacher, load_teacher
from grace_plugin.teacher.self_teacher import SelfTeacher
from grace_plugin.teacher.store import StateStore
from grace_plugin.vlm import (
    check_image_processors,
    check_pixels,
    family_of,
    load_image_processor,
    load_tokenizer,
    shared_vocabulary,
)
from grace_plugin.vlm.loading import check_finite, check_model

__all__ = ["check_pair", "open_teacher"]


def open_teacher(asked: TeacherRecipe, student: nn.Module, given: Any, store: StateStore | None) -> Teacher:
    """Open a teacher of the recipe's kind.

    Args:
        asked: the recipe's `teacher` block.
        student: the loaded student.
        given: a loaded model that replaces the recipe's checkpoint, a `Teacher` that is used as it is, or None.
        store: the opened cache of a cached teacher.

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
    return OffloadedTeacher(given) if asked.kind == "offload" else ResidentTeacher(given)


def check_pair(student: Any, teacher: Any, processors: tuple[Any, Any], *, student_rows: int, teacher_rows: int) -> int:
    """Check that two models use the same tokens and pixels; returns the number of token ids they share.

    Args:
        student, teacher: a model, a `Teacher`, or any object with a model's `config` and `name_or_path`.
        processors: student's and teacher's; None for that of the checkpoint.
        student_rows, teacher_rows: rows of the output heads.

    Raises:
        ValueError: names what differs, with both values.
    """
    ours, theirs = processors
    check_pixels(family_of(student), student.config, family_of(teacher), teacher.config)
    if not isinstance(teacher, SelfTeacher):  # the student's own settings are those of its teacher
        for kind in ("image", "video"):
            check_image_processors(
                ours or load_image_processor(student, kind), theirs or load_image_processor(teacher, kind), kind
            )
    return shared_vocabulary(
        ours or load_tokenizer(student, "student"),
        theirs or load_tokenizer(teacher, "teacher"),
        student_rows=student_rows,
        teacher_rows=teacher_rows,
    )
