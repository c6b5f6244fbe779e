"""Content parts and the images and videos in them, in every form that is common, as one form.

    {"type": "text", "text": ...}                         also input_text, output_text
    {"type": "image"}                                     takes the sample's next image
    {"type": "image", "image" | "url" | "path" | "base64" | "bytes": ...}
    {"type": "image_url" | "input_image", "image_url": ... | {"url": ...}}
    {"type": "video"}, {"type": "video", "video": ...}, {"type": "video_url", "video_url": ...}

An image is a path, a `PIL.Image`, bytes, {"bytes", "path"}, a data URI or a file URI. A web address is refused: what lies there
can change between two epochs, and a step would wait for it. An image part may also say `min_pixels`, `max_pixels`, or
`resized_height` and `resized_width`, which are bounds for this image alone (`grace_plugin.vlm.image_size`).
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grace_plugin.data.errors import SampleError, malformed
from grace_plugin.data.media import is_path
from grace_plugin.data.schema import METADATA, check_turn_fields, is_empty
from grace_plugin.data.shown import shown

__all__ = ["BOUNDS", "inline_media", "media_value", "read_parts", "resolve"]

BOUNDS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_KINDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}
_VALUES = {
    "image": ("image", "image_url", "url", "path", "base64", "bytes"),
    "video": ("video", "video_url", "url", "path"),
}
# of a part they say where its image is
_METADATA = METADATA - {"url", "source"}
_TOOL_PARTS = ("tool_use", "tool_result", "tool_call")


def _from_base64(text: str, name: str) -> dict[str, Any]:
    try:
        return {"bytes": base64.b64decode("".join(text.split()), validate=True), "path": None}
    except (binascii.Error, ValueError) as error:
        raise SampleError(
            "unreadable_image", f"{name}: base64 is {shown(text, 40)}, which is no base64: {error}"
        ) from error


def media_value(value: Any) -> Any:
    """Return an image or a video as `media.py` and `video.py` read it, from any form that a part or a list may hold."""
    if isinstance(value, Mapping):
        found = value.get("url") or value.get("path")
        return found if value.get("bytes") is None and isinstance(found, str) else value
    if isinstance(value, (list, tuple)):
        return [media_value(frame) for frame in value]
    return value


def _value_of(part: Mapping[str, Any], kind: str, where: str) -> Any:
    """Return the image or video that a part holds itself; None for one that takes the sample's next."""
    given = {key: part[key] for key in _VALUES[kind] if not is_empty(part.get(key))}
    if not given:
        return None
    if "bytes" in given and set(given) <= {"bytes", "path"}:
        return {"bytes": part["bytes"], "path": part.get("path")}
    if len(given) > 1:
        raise malformed(f"{where} gives its {kind} as {' and as '.join(sorted(given))}; give it once")
    ((key, value),) = given.items()
    if key == "base64":
        if not isinstance(value, str):
            raise malformed(f"{where}: base64 is a {type(value).__name__}; give text")
        return _from_base64(value, where) if is_path(value) else value
    return media_value(value)


def _bounds(part: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return what a part says of its image's size in pixels."""
    found = {key: part[key] for key in BOUNDS if part.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise malformed(f"{where}: {key} is {shown(value)}; give a whole number of pixels above 0")
    if ("resized_height" in found) != ("resized_width" in found):
        raise malformed(f"{where} gives one of resized_height and resized_width; give both")
    if found.get("min_pixels", 0) > found.get("max_pixels", found.get("min_pixels", 0)):
        raise malformed(f"{where}: min_pixels {found['min_pixels']} is above max_pixels {found['max_pixels']}")
    return found


def _kind_of(part: Mapping[str, Any], role: str, name: str) -> str:
    given = part.get("type")
    # some formats name the part by its one field
    if given is None:
        found = [kind for key, kind in _KINDS.items() if not is_empty(part.get(key))]
        if len(found) == 1:
            return found[0]
    kind = _KINDS.get(given) if isinstance(given, str) else None
    if kind is None:
        told = "; give tool_calls in the assistant's turn and a turn of role tool" if given in _TOOL_PARTS else ""
        raise malformed(
            f"{name}: a {role} turn holds a part of type {shown(given)}; samples take text, image, video{told}"
        )
    return kind


def _text(part: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    text = part.get("text")
    if not isinstance(text, str):
        raise malformed(f"{name}: a {role} turn holds a text part without text")
    check_text(text, f"the text of a {role} turn", name)
    check_turn_fields(part, ("type", "text"), f"{name}: a text part of a {role} turn", _METADATA)
    return {"type": "text", "text": text}


def check_text(text: str, where: str, name: str) -> None:
    """Refuse text with a lone surrogate, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError(
            "invalid_utf8", f"{name}: {where} is not valid UTF-8 at character {error.start}; correct the file"
        ) from error


def read_parts(given: Any, role: str, name: str) -> tuple[list[dict[str, Any]], list[tuple[str, Any, Any]]]:
    """Return the parts of a turn in one form, and (kind, value or None, frames a second or None) of its images and videos.

    Args:
        given: the turn's content as a list of parts.
    """
    if not isinstance(given, (list, tuple)) or not all(isinstance(part, Mapping) for part in given):
        raise malformed(f"{name}: the content of a {role} turn is neither text nor a list of parts")
    parts: list[dict[str, Any]] = []
    media: list[tuple[str, Any, Any]] = []
    for part in given:
        kind = _kind_of(part, role, name)
        if kind == "text":
            parts.append(_text(part, role, name))
            continue
        if role == "assistant":
            raise malformed(f"{name}: an assistant turn holds an {kind}; only text can be supervised")
        where = f"{name}: an {kind} part" if kind == "image" else f"{name}: a {kind} part"
        more = (*BOUNDS, "detail") if kind == "image" else ("fps",)
        for said in (part, *(part[key] for key in _VALUES[kind] if isinstance(part.get(key), Mapping))):
            if said.get("detail") not in (None, "", "auto"):
                raise SampleError(
                    "unknown_field",
                    f"{where} asks for detail {shown(said['detail'])}, which is not read; say max_pixels instead",
                )
            if said is not part:
                check_turn_fields(said, ("url", "path", "bytes", "detail"), where)
        check_turn_fields(part, ("type", *_VALUES[kind], *more), where, _METADATA)
        parts.append({"type": kind, **(_bounds(part, where) if kind == "image" else {})})
        media.append((kind, _value_of(part, kind, where), part.get("fps")))
    return parts, media


def inline_media(sample: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each content part of a sample that holds an image or video by itself, with the field that holds it."""
    for key in ("messages", "conversations", "prompt", "completion"):
        turns = sample.get(key)
        for turn in turns if isinstance(turns, (list, tuple)) else ():
            content = turn.get("content") if isinstance(turn, Mapping) else None
            for part in content if isinstance(content, (list, tuple)) else ():
                if isinstance(part, Mapping):
                    for field in {*_VALUES["image"], *_VALUES["video"]} - {"base64", "bytes"}:
                        if isinstance(part.get(field), (str, os.PathLike, Mapping, list, tuple)) and part[field]:
                            yield part, field


def resolve(sample: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the sample with its image and video paths, at any depth of list and in content parts, made relative to `folder`.

    Web addresses, data URIs and file URLs are no paths and stay as they are.
    """

    def join(value: Any) -> Any:
        if isinstance(value, str):
            return str(folder / value) if is_path(value) else value
        if isinstance(value, (list, tuple)):
            return [join(item) for item in value]
        if isinstance(value, dict) and value.get("bytes") is None:
            return {**value, **{key: join(value[key]) for key in ("path", "url") if isinstance(value.get(key), str)}}
        return value

    keys = [key for key in ("image", "images", "video", "videos") if sample.get(key)]
    found = {**sample, **{key: join(sample[key]) for key in keys}}
    # parts that hold an image themselves
    held = {id(part): part for part, _ in inline_media(sample)}
    if not held:
        return found

    def turn(given: Any) -> Any:
        content = given.get("content") if isinstance(given, dict) else None
        if not isinstance(content, (list, tuple)):
            return given
        fields = ("image", "video", "path", "url", "image_url", "video_url")
        parts = [
            {**part, **{key: join(part[key]) for key in fields if part.get(key)}} if id(part) in held else part
            for part in content
        ]
        return {**given, "content": parts}

    turns = [
        key
        for key in ("messages", "conversations", "prompt", "completion")
        if isinstance(sample.get(key), (list, tuple))
    ]
    return {**found, **{key: [turn(given) for given in sample[key]] for key in turns}}
