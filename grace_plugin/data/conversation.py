"""A row of data: a conversation in the TRL messages format with its images and videos.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "..."}]}],
     "images": [PIL.Image | path | {"bytes": ..., "path": ...}], "videos": [[frame, ...] | path | {"bytes": ...}], "fps": 2.0}

Content may also be a plain string, and a row in the LLaVA format (`conversations`) is translated first. The k-th image
placeholder of the conversation takes the k-th image, and so for videos. Where every message is a plain string there is no
place for a placeholder, and the row's images stand at the beginning of the first user turn, as TRL puts them. Only assistant
turns are learned from. Refused with the row named and the reason to count it by (`faults.REASONS`): placeholders and images
that do not match in number, unknown roles, turns out of order, empty turns, text that is not valid Unicode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grace_plugin.data.faults import RowError, raise_unreadable
from grace_plugin.data.llava_format import from_llava, is_llava
from grace_plugin.data.media import DEFAULT_MAX_PIXELS, decode_image
from grace_plugin.data.shown import shown
from grace_plugin.data.video import Video, decode_video

__all__ = ["Row", "check_row", "check_rows", "read_row", "row_name"]

ROLES = ("system", "user", "assistant")
PARTS = ("text", "image", "video")


@dataclass(frozen=True)
class Row:
    """A checked row: `messages` with content as lists of parts, `images` and `videos` in placeholder order, `name` to say."""

    name: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[Any, ...]
    videos: tuple[Any, ...] = ()
    fps: float = 2.0


def row_name(row: Any, number: int | None = None) -> str:
    """How messages speak of a row: by its id or name, its number, or its beginning."""
    row = row if isinstance(row, Mapping) else {"messages": row}
    for key in ("id", "name"):
        if row.get(key) is not None:
            return f"row {shown(row[key])}"
    return f"the row {shown(row.get('messages'), 200)}" if number is None else f"row {number}"


def _text_part(part: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    text = part.get("text")
    if not isinstance(text, str):
        raise RowError("malformed", f"{name}: a {role} turn holds a text part without text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "invalid_utf8",
            f"{name}: the text of a {role} turn is not valid UTF-8 at character {error.start}; mend the file",
        ) from error
    return {"type": "text", "text": text}


def _parts(message: Any, name: str) -> list[dict[str, Any]]:
    """Content of a message as a list of parts."""
    if not isinstance(message, Mapping):
        raise RowError(
            "malformed", f"{name}: a message is a {type(message).__name__}; give an object with role and content"
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError("unknown_role", f"{name}: role {shown(role)} is not one of {ROLES}")
    if content is None:
        raise RowError("empty_conversation", f"{name}: a {role} turn has no content; give text or a list of parts")
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(given, (list, tuple)) or not all(isinstance(part, Mapping) for part in given):
        raise RowError("malformed", f"{name}: the content of a {role} turn is neither text nor a list of parts")
    parts = []
    for part in given:
        if part.get("type") not in PARTS:
            raise RowError(
                "malformed", f"{name}: a {role} turn holds a part of type {shown(part.get('type'))}; rows take {PARTS}"
            )
        if part["type"] != "text" and role == "assistant":
            raise RowError("malformed", f"{name}: an assistant turn holds an {part['type']}; only text can be learned")
        parts.append(_text_part(part, role, name) if part["type"] == "text" else {"type": part["type"]})
    texts = ["x" if part["type"] != "text" else part["text"] for part in parts]
    if not "".join(texts).strip() if role == "assistant" else not "".join(texts):
        raise RowError("empty_conversation", f"{name}: a {role} turn is empty; give text, or drop the turn")
    return parts


def _check_order(messages: list[dict[str, Any]], name: str) -> None:
    """System first if at all, then user and assistant in turn, the assistant last."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if roles[-1] != "assistant":
        raise RowError(
            "roles_out_of_order",
            f"{name} ends with a {roles[-1]} turn; the last turn must be the assistant's to learn from it",
        )
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise RowError(
            "roles_out_of_order",
            f"{name}: roles stand in the order {', '.join(roles)}; user and assistant take turns, after one system turn",
        )


def _attached(row: Mapping[str, Any], kind: str, messages: list[dict[str, Any]], name: str) -> tuple[Any, ...]:
    """The row's images or videos, as many as the conversation has placeholders for."""
    given = row.get(f"{kind}s")
    if given is None and row.get(kind) is not None:
        given = [row[kind]]
    if given is not None and (isinstance(given, (str, bytes)) or not hasattr(given, "__iter__")):
        raise RowError("malformed", f"{name}: {kind}s is a {type(given).__name__}; give a list")
    attached = tuple(given) if given is not None else ()
    placeholders = sum(part["type"] == kind for message in messages for part in message["content"])
    if placeholders != len(attached):
        raise RowError(
            "placeholder_mismatch",
            f"{name} has {placeholders} {kind} placeholder(s) and {len(attached)} {kind}(s); "
            f'give one {{"type": "{kind}"}} part per {kind}, in order',
        )
    return attached


def _with_images(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> None:
    """Put a placeholder for each image before the text of the first user turn, where all messages are plain strings."""
    given = row.get("images") if row.get("images") is not None else [row.get("image")]
    if not isinstance(given, (list, tuple)) or not all(isinstance(m["content"], str) for m in row["messages"]):
        return
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        first["content"] = [{"type": "image"} for image in given if image is not None] + first["content"]


def _fps(value: Any, name: str) -> float:
    """Frames a second, 2 where the row says nothing."""
    try:
        fps = 2.0 if value is None else float(value)
    except (TypeError, ValueError):
        fps = math.nan
    if not (math.isfinite(fps) and fps > 0):
        raise RowError("malformed", f"{name}: fps is {shown(value)}; give frames a second above 0, or leave it out")
    return fps


def check_row(row: Mapping[str, Any], number: int | None = None) -> Row:
    """Normalise a row without opening its images.

    Raises:
        RowError (a ValueError): names the row, what is wrong with it and the way out.
    """
    name = row_name(row, number)
    if not isinstance(row, Mapping):
        raise RowError("malformed", f"{name} is a {type(row).__name__}, not an object")
    raise_unreadable(row)
    if is_llava(row):
        row = from_llava(row, name)
    messages = row.get("messages")
    if messages is not None and (isinstance(messages, (str, Mapping)) or not hasattr(messages, "__len__")):
        raise RowError("malformed", f"{name}: messages is a {type(messages).__name__}; give a list of turns")
    if messages is None or len(messages) == 0:
        raise RowError(
            "empty_conversation",
            f"{name} has no messages; expected the messages format ({shown(sorted(map(str, row)), 120)} found)",
        )
    normal = []
    for message in messages:
        parts = _parts(message, name)
        normal.append({"role": message["role"], "content": parts})
    _check_order(normal, name)
    _with_images(row, normal)
    images, videos = (_attached(row, kind, normal, name) for kind in ("image", "video"))
    return Row(name, tuple(normal), images, videos, _fps(row.get("fps"), name))


def read_row(row: Mapping[str, Any], number: int | None = None, *, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Row:
    """`check_row`, with every image decoded to RGB and every video to frames.

    Args:
        max_pixels: largest image in pixels, None for no limit; looked at before an image is decoded.

    Raises:
        RowError (a ValueError): as `check_row`, or an image that is missing, unreadable or too large, named with its path.
    """
    checked = check_row(row, number)
    images = tuple(decode_image(image, checked.name, max_pixels) for image in checked.images)
    videos: tuple[Video, ...] = tuple(
        decode_video(video, checked.name, max_pixels, checked.fps) for video in checked.videos
    )
    return Row(checked.name, checked.messages, images, videos, checked.fps)


def check_rows(rows: Iterable[Mapping[str, Any]], limit: int = 1000) -> int:
    """Check the first rows of a dataset before a run; returns how many were looked at.

    Raises:
        ValueError: the first row that cannot be used, or a dataset without rows.
    """
    looked = 0
    for number, row in enumerate(rows):
        if number >= limit:
            break
        check_row(row, number)
        looked += 1
    if not looked:
        raise ValueError("the dataset has no rows")
    return looked
