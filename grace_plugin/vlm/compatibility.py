"""A student and a teacher must speak of the same tokens and the same pixels; this file decides whether they do.

Families pad the embedding table differently by size, so logits are cut to the ids both tokenizers define. On those ids the
two must agree in content, not in name. Image geometry must agree as well, or the visual tokens cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from grace_plugin.vlm.base import Family

__all__ = [
    "check_image_processors",
    "check_pixels",
    "load_image_processor",
    "load_tokenizer",
    "load_video_processor",
    "shared_vocabulary",
]

_SAMPLE = (
    "What stands left of the apple? 3 dogs, naïve café, 日本語のテキスト, Привет мир, 12,345.67 €\n"
    "def f(x):\n    return x ** 2  # comment\n\t(end)"
)


def load_tokenizer(model: Any, role: str) -> Any:
    """The tokenizer beside a model's checkpoint; `model` needs no more than `name_or_path` or `config`.

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
    """Refuse a pair whose images become different visual tokens, showing both values.

    A teacher of another family (another generation, a mixture of experts) is taken when both lay images out alike and mark
    them with the same token ids; whether the tokenizers agree is `shared_vocabulary`'s to say.

    Raises:
        ValueError: names every config value that differs.
    """
    ours, theirs = student.pixel_signature(student_config), teacher.pixel_signature(teacher_config)
    ours |= {f"{kind} token id": token_id for kind, token_id in student.token_ids(student_config).items()}
    theirs |= {f"{kind} token id": token_id for kind, token_id in teacher.token_ids(teacher_config).items()}
    differing = _differing(ours, theirs)
    if differing and student.model_type != teacher.model_type:
        raise ValueError(
            f"the student is of family '{student.model_type}' and the teacher of '{teacher.model_type}', and they see images "
            f"differently (student / teacher): {differing}; choose a teacher of the student's family"
        )
    if differing:
        raise ValueError(f"teacher and student see images differently (student / teacher): {differing}")


#: what an image or video processor may be told that changes the pixels or the number of visual tokens
_RESOLUTION = (
    "size", "resample", "crop_size", "min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size",
    "image_mean", "image_std", "rescale_factor", "do_resize", "do_center_crop", "do_normalize", "do_pad",
    "image_grid_pinpoints", "max_image_size", "do_image_splitting", "crop_to_patches", "min_patches", "max_patches",
    "do_pan_and_scan",
)  # fmt: skip


def load_image_processor(model: Any) -> Any:
    """The image processor beside a model's checkpoint, or None where there is none to read."""
    from transformers import AutoImageProcessor

    source = getattr(model, "name_or_path", "")
    try:
        return AutoImageProcessor.from_pretrained(source) if source else None
    except (OSError, ValueError):
        return None


def load_video_processor(model: Any) -> Any:
    """The video processor beside a model's checkpoint, or None where there is none to read."""
    from transformers import AutoVideoProcessor

    source = getattr(model, "name_or_path", "")
    try:
        return AutoVideoProcessor.from_pretrained(source) if source else None
    except (OSError, ValueError):
        return None


def check_image_processors(student: Any, teacher: Any, kind: str = "image") -> None:
    """Refuse a teacher whose own image settings differ from those its pixels are made with, the student's.

    Args:
        student, teacher: processors, or image (or video) processors; what holds none (a tokenizer, None) is not compared.
        kind: "image" or "video"; which part of a processor is compared. How frames are sampled is not: videos come as frames.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    settings = []
    for processor in (student, teacher):
        whole = hasattr(processor, "tokenizer")
        part: Any = getattr(processor, f"{kind}_processor", None) if whole else processor
        if not hasattr(part, "image_mean"):
            return
        known = part.to_dict()
        settings.append({key: _plain(known[key]) for key in _RESOLUTION if known.get(key) is not None})
    differing = _differing(*settings)
    if differing:
        raise ValueError(
            f"teacher and student have different {kind} settings (student / teacher): {differing}; the student's processor "
            "makes the pixels of both. Give both the same settings; if the teacher is meant to see the student's, pass its own "
            "processor with the student's values as teacher_processor="
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: part for key, part in sorted(value.items()) if part is not None}
    if isinstance(value, IntEnum):
        return int(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return "; ".join(
        f"{key}: {ours.get(key)!r} / {theirs.get(key)!r}" for key in keys if ours.get(key) != theirs.get(key)
    )
