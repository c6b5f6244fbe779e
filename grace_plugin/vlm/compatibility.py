"""Check that a student and a teacher use the same tokens and the same pixels.

Models of one family pad the embedding table to different sizes, so logits are cut to the ids that both tokenizers define. On
those ids the tokenizers must agree token by token. Image geometry must agree as well, or visual tokens cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from grace_plugin.vlm.family import Family

__all__ = [
    "check_image_processors",
    "check_pixels",
    "load_image_processor",
    "load_tokenizer",
    "shared_vocabulary",
]

# text that tokenizers of equal vocabularies still cut differently: digits, accents, other scripts, code, whitespace
_TEXT = (
    "What stands left of the apple? 3 dogs, naïve café, 日本語のテキスト, Привет мир, 12,345.67 €\n"
    "def f(x):\n    return x ** 2  # comment\n\t(end)"
)


def load_tokenizer(model: Any, role: str) -> Any:
    """Load the tokenizer of a model's checkpoint.

    Args:
        model: any object with `name_or_path`, or with a `config` that has one.
        role: "student" or "teacher", for the message.

    Raises:
        ValueError: the model has no `name_or_path`, or no tokenizer can be read there.
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
    """Return the number of leading token ids that both tokenizers define and both heads can score.

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
    # by id, not by set: added tokens may stand at other ids in the same vocabulary
    differing = [i for i in range(size) if ids_s.get(i) != ids_t.get(i)]
    hint = "distillation compares distributions id by id: choose a teacher of the same tokenizer generation"
    if differing:
        shown = ", ".join(f"{i}: {ids_s.get(i)!r} / {ids_t.get(i)!r}" for i in differing[:5])
        raise ValueError(
            f"teacher and student tokenizers differ on {len(differing)} of {size} shared ids "
            f"(student / teacher: {shown}); {hint}"
        )
    # Equal vocabularies do not imply equal merges, normalization or pre-tokenization.
    if student.encode(_TEXT) != teacher.encode(_TEXT):
        raise ValueError(f"teacher and student tokenizers share their ids but cut the same text differently; {hint}")
    return size


def check_pixels(student: Family, student_config: Any, teacher: Family, teacher_config: Any) -> None:
    """Refuse a pair whose images become different visual tokens.

    A teacher of another family is accepted when both lay images out alike and mark them with the same token ids.

    Raises:
        ValueError: names every config value that differs, with both values.
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


#: settings of an image or video processor that change the pixels or the number of visual tokens
_RESOLUTION = (
    "size resample crop_size min_pixels max_pixels patch_size merge_size temporal_patch_size image_mean image_std "
    "rescale_factor do_resize do_center_crop do_normalize do_pad image_grid_pinpoints max_image_size do_image_splitting "
    "crop_to_patches min_patches max_patches do_pan_and_scan"
).split()


def load_image_processor(model: Any, kind: str = "image") -> Any:
    """Load the image (or video) processor of a model's checkpoint; None if it has none that can be read."""
    from transformers import AutoImageProcessor, AutoVideoProcessor

    source, auto = getattr(model, "name_or_path", ""), {"image": AutoImageProcessor, "video": AutoVideoProcessor}[kind]
    try:
        return auto.from_pretrained(source) if source else None
    except (OSError, ValueError):
        return None


def check_image_processors(student: Any, teacher: Any, kind: str = "image") -> None:
    """Refuse a teacher whose image settings differ from the student's, whose processor makes the pixels of both.

    Args:
        student, teacher: processors, or image (or video) processors; others (a tokenizer, None) are not compared.
        kind: "image" or "video". How frames are sampled is not compared, because videos come as frames.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    settings = []
    for processor in (student, teacher):
        whole = hasattr(processor, "tokenizer")  # a processor with all its parts; else the part itself
        part: Any = getattr(processor, f"{kind}_processor", None) if whole else processor
        if not hasattr(part, "image_mean"):
            return
        values = part.to_dict()
        settings.append({key: _plain(values[key]) for key in _RESOLUTION if values.get(key) is not None})
    differing = _differing(*settings)
    if differing:
        raise ValueError(
            f"teacher and student have different {kind} settings (student / teacher): {differing}; the student's processor "
            "makes the pixels of both. Give both the same settings; if the teacher is meant to see the student's, pass its own "
            "processor with the student's values as teacher_processor="
        )


def _plain(value: Any) -> Any:
    """Return a setting as loaded and as read from JSON alike: `resample` is an enum or a number, sizes may hold None."""
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
