"""The fields of a sample: which are read, which are known to say nothing to training, and which are refused.

A sample is a closed schema. Every field that is not None and not empty is one of these:

- read: it is part of the sample's format (`formats.py`), an image or a video, `fps`, `system` or
  `system_prompt`, `tools`;
- metadata (`METADATA`): an id, a source, a score. It is not read and not reported;
- refused (`REFUSED`, `WRITTEN_OTHERWISE`): other tools let it change what is supervised or what is seen, and nothing here
  honours it. The sample is left out under `unknown_field`, so a run starts only below `max_bad_samples`;
- unused: any other field of the sample. It is counted and named in the report and once in the log.

Fields of a turn or of a content part change the text or the pixels, so one that is neither read nor metadata is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from grace_plugin.data.errors import SampleError
from grace_plugin.data.shown import shown

__all__ = ["METADATA", "REFUSED", "check_turn_fields", "is_empty", "unused_fields"]

#: fields of a sample or a turn that say nothing to training
METADATA = frozenset(
    (
        "id name source type dataset accept split subset category task language lang url license index idx uid uuid "
        "sample_id question_id image_id prompt_id score width height metadata meta data_source channel timestamp"
    ).split()
)
_MEDIA = ("image", "images", "video", "videos")
_PREFERENCE = (
    "preference data also holds answers that must not be supervised; give the answer to learn as the assistant's turn"
)
_TOKENS = "samples are tokenized here with the model's own processor; give text and images"
_PER_TURN = 'say it of a turn: "train": false or "weight": 0 leaves an assistant turn out of the loss'
_PER_IMAGE = (
    'give it in the content part of the image that it is for, {"type": "image", "image": ..., "max_pixels": ...}'
)
_TEMPLATE = "set it in the processor's chat template, which also serves the checkpoint"
_FRAMES = "give the video as the list of its frames, or set `fps`"
_AUDIO = "no model here takes sound"

#: field of a sample -> what to do instead
REFUSED: dict[str, str] = {
    **dict.fromkeys("chosen rejected rejected_response rejected_messages rejected_images kto_tag".split(), _PREFERENCE),
    **dict.fromkeys(
        "input_ids labels attention_mask token_type_ids pixel_values assistant_masks completion_mask".split(), _TOKENS
    ),
    **dict.fromkeys("loss_mask loss_scale loss_weight sample_weight".split(), _PER_TURN),
    **dict.fromkeys("min_pixels max_pixels resized_height resized_width".split(), _PER_IMAGE),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking"), _TEMPLATE),
    **dict.fromkeys("nframes min_frames max_frames video_start video_end total_pixels sample_fps".split(), _FRAMES),
    **dict.fromkeys(("audio", "audios"), _AUDIO),
    "documents": "write them into the text of a turn",
    **dict.fromkeys(("functions", "function_call"), "give `tools`, and `tool_calls` in the assistant's turn"),
}
#: field of a turn or a part -> what to do instead, in addition to `REFUSED`
_REFUSED_IN_TURNS: dict[str, str] = {
    **dict.fromkeys(("reasoning", "thinking", "thoughts"), "name it reasoning_content"),
    **dict.fromkeys(
        "images image videos video".split(), "give images in the turn's content, or in the sample's images"
    ),
    **dict.fromkeys(("prefix", "partial", "train_detail"), "a turn is supervised as a whole or not at all"),
    "channel": "give the reasoning as reasoning_content and what is shown as content",
}
#: other names of media -> the field that is read
_WRITTEN_OTHERWISE: dict[str, str] = {
    **dict.fromkeys("image_path image_file img img_path picture photo image_url".split(), "image"),
    **dict.fromkeys("image_paths image_files imgs pictures photos image_urls image_list".split(), "images"),
    **dict.fromkeys("video_path video_file video_url clip".split(), "video"),
    **dict.fromkeys("video_paths video_files video_urls clips".split(), "videos"),
}


def is_empty(value: Any) -> bool:
    """Return whether a field is empty: tables hold None, "" or [] where a sample has no such field."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and len(value) == 0)


def _is_media(value: Any) -> bool:
    """Return whether a value is an image as datasets hand it out, decoded or as bytes."""
    if isinstance(value, (list, tuple)):
        return bool(value) and _is_media(value[0])
    return isinstance(value, Image.Image) or (isinstance(value, Mapping) and {"bytes", "path"} <= set(value))


def _check_whole_weight(field: str, value: Any, name: str) -> None:
    """Refuse a weight of a whole sample other than 1."""
    if isinstance(value, (bool, int, float)) and value == 1:
        return
    told = (
        "drop a sample that is not to be supervised"
        if isinstance(value, (bool, int, float)) and value == 0
        else _PER_TURN
    )
    raise SampleError("unknown_field", f"{name}: {field} is {shown(value)} and samples are not weighted; {told}")


def unused_fields(sample: Mapping[str, Any], read: Iterable[str], name: str) -> tuple[str, ...]:
    """Return the names of the sample's fields that nothing reads.

    Args:
        sample: the sample as it was given.
        read: fields that its format reads.
        name: how messages speak of the sample.
    """
    taken, unused = {*read, *_MEDIA, "fps", "system", "system_prompt", "tools"}, []
    with_media = any(not is_empty(sample.get(key)) for key in _MEDIA)
    for field, value in sample.items():
        if field in taken or field in METADATA or is_empty(value):
            continue
        if field in ("train", "weight") or (field == "loss" and isinstance(value, bool)):
            _check_whole_weight(field, value, name)
            continue
        if field in REFUSED:
            raise SampleError("unknown_field", f"{name} has the field {field!r}, which is not read; {REFUSED[field]}")
        if field == "label" and "completion" in taken and isinstance(value, bool):
            raise SampleError("unknown_field", f"{name} has the field 'label', which is not read; {_PREFERENCE}")
        if not with_media and (field in _WRITTEN_OTHERWISE or _is_media(value)):
            right = _WRITTEN_OTHERWISE.get(field, "image, or images for a list")
            raise SampleError(
                "unknown_field", f"{name} has the field {shown(field)}, which is not read; name it {right}"
            )
        unused.append(str(field)[:200])
    return tuple(unused)


def check_turn_fields(
    given: Mapping[str, Any], read: Iterable[str], where: str, metadata: frozenset[str] = METADATA
) -> None:
    """Refuse a field of a turn or a content part that nothing reads; `where` says of which.

    Args:
        metadata: fields that say nothing there.
    """
    for field, value in given.items():
        if field in read or (field in metadata and field not in _REFUSED_IN_TURNS) or is_empty(value):
            continue
        told = {**REFUSED, **_REFUSED_IN_TURNS}.get(field, f"fields that are read there: {', '.join(sorted(read))}")
        raise SampleError("unknown_field", f"{where} has the field {shown(field)}, which is not read; {told}")
