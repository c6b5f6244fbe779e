"""Limits of samples by the configs and tokenizers of student and teacher, known before the teacher is loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from grace_plugin.modifier import GraceModifier
from grace_plugin.teacher import SelfTeacher, Teacher, check_pair
from grace_plugin.teacher.checkpoint import open_checkpoint
from grace_plugin.vlm import context_length, vocabulary_rows

__all__ = ["SampleLimits", "sample_limits"]


class SampleLimits(NamedTuple):
    """Limits of a sample; None for no limit.

    vocabulary: number of token ids that samples may use, from 0. context: most tokens of a sample.
    """

    vocabulary: int | None
    context: int | None


def _smallest(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def sample_limits(
    student: Any, modifier: GraceModifier, given: Any, processor: Any, teacher_processor: Any = None
) -> SampleLimits:
    """Return the limits that both models have in common.

    A token that only the student's tokenizer has is outside: the teacher has no embedding for its id, or an untrained one.

    Args:
        student: a loaded model.
        given: a loaded model or a `Teacher` that replaces the recipe's.
        processor, teacher_processor: the student's, and the teacher's or None for the one of its checkpoint.

    Raises:
        ValueError: the two do not share tokens or pixels.
    """
    own = SampleLimits(vocabulary_rows(student.config), context_length(student.config))
    needed = modifier.teacher.kind not in ("self", "cached") and modifier.needs_teacher
    if modifier.named_teacher is not None:
        teacher: Any = open_checkpoint(modifier.named_teacher, modifier.teacher.revision)
    elif needed and isinstance(given, (nn.Module, Teacher)) and not isinstance(given, SelfTeacher):
        teacher = given
    else:
        return own
    rows = vocabulary_rows(teacher.config)
    if own.vocabulary is None or rows is None:
        return own
    shared = check_pair(
        student, teacher, (processor, teacher_processor), student_rows=own.vocabulary, teacher_rows=rows
    )
    return SampleLimits(shared, _smallest(own.context, context_length(teacher.config)))
