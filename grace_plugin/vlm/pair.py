"""A student and a teacher must speak of the same tokens and the same pixels; this file decides whether they do.

Families pad the embedding table differently by size, so logits are cut to the ids both tokenizers define. On those ids the
two must agree in content, not in name. Image geometry must agree as well, or the visual tokens cannot be compared.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from grace_plugin.vlm.base import Family

__all__ = ["check_pixels", "load_tokenizer", "shared_vocabulary"]

_SAMPLE = (
    "What stands left of the apple? 3 dogs, naïve café, 日本語のテキスト, Привет мир, 12,345.67 €\n"
    "def f(x):\n    return x ** 2  # comment\n\t(end)"
)


def load_tokenizer(model: nn.Module, role: str) -> Any:
    """The tokenizer beside a model's checkpoint.

    Raises:
        ValueError: the model has no `name_or_path`, or nothing readable lies there.
    """
    from transformers import AutoTokenizer

    source = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "name_or_path", "")
    if not source:
        raise ValueError(f"the {role} has no name_or_path to read its tokenizer from; pass {role}_processor=")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the {role}'s tokenizer from {source!r}; pass {role}_processor=") from error


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def shared_vocabulary(student: Any, teacher: Any, *, student_rows: int, teacher_rows: int) -> int:
    """Number of leading token ids that both tokenizers define and both heads can score.

    Args:
        student, teacher: tokenizers, or processors holding one.
        student_rows, teacher_rows: rows of each model's output head, padding included.

    Raises:
        ValueError: the tokenizers differ on the shared ids, or cut the same text differently.
    """
    student, teacher = _tokenizer(student), _tokenizer(teacher)
    ids_s = {index: token for token, index in student.get_vocab().items()}
    ids_t = {index: token for token, index in teacher.get_vocab().items()}
    size = min(max(ids_s) + 1, max(ids_t) + 1, student_rows, teacher_rows)
    differing = [i for i in range(size) if ids_s.get(i) != ids_t.get(i)]
    hint = "distillation compares distributions id by id: choose a teacher of the same tokenizer generation"
    if differing:
        shown = ", ".join(f"{i}: {ids_s.get(i)!r} / {ids_t.get(i)!r}" for i in differing[:5])
        raise ValueError(
            f"teacher and student tokenizers differ on {len(differing)} of {size} shared ids "
            f"(student / teacher: {shown}); {hint}"
        )
    if student.encode(_SAMPLE) != teacher.encode(_SAMPLE):
        raise ValueError(f"teacher and student tokenizers share their ids but cut the same text differently; {hint}")
    return size


def check_pixels(student: Family, student_config: Any, teacher: Family, teacher_config: Any) -> None:
    """Refuse a pair whose images become different numbers of visual tokens, showing both values.

    Raises:
        ValueError: names every config value that differs.
    """
    if student.model_type != teacher.model_type:
        raise ValueError(
            f"the student is of family '{student.model_type}' and the teacher of '{teacher.model_type}'; "
            "visual tokens of two families cannot be compared, choose a teacher of the student's family"
        )
    ours, theirs = student.pixel_signature(student_config), teacher.pixel_signature(teacher_config)
    differing = [f"{key}: {ours[key]!r} / {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise ValueError(f"teacher and student see images differently (student / teacher): {'; '.join(differing)}")
