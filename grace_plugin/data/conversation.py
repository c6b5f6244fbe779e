"""A row of data: a conversation in the TRL messages format with its images.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "..."}]}],
     "images": [PIL.Image | path]}

Content may also be a plain string. The k-th image placeholder of the conversation takes the k-th image. Only assistant turns
are learned from. Refused, with the row named: placeholders and images that do not match in number, roles the template does
not know, a conversation without an assistant turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "check_row", "check_rows", "read_row"]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """A checked row: `messages` with content as lists of parts, `images` in placeholder order, `name` for messages."""

    name: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[Any, ...]


PARTS = ("text", "image")


def _name(row: Mapping[str, Any], number: int | None) -> str:
    for key in ("id", "name"):
        if row.get(key) is not None:
            return f"row {row[key]!r}"
    return f"the row {str(row.get('messages'))[:200]}" if number is None else f"row {number}"


def _parts(message: Any, name: str) -> list[dict[str, Any]]:
    """Content of a message as a list of parts."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{name}: a message is a {type(message).__name__}; give an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{name}: role {role!r} is not one of {ROLES}")
    if content is None:
        raise ValueError(f"{name}: a {role} turn has no content; give text or a list of parts")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
    for part in parts:
        if part.get("type") not in PARTS:
            raise ValueError(f"{name}: a {role} turn holds a part of type {part.get('type')!r}; rows take {PARTS}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"{name}: a {role} turn holds a text part without text")
        if part["type"] == "image" and role == "assistant":
            raise ValueError(f"{name}: an assistant turn holds an image; only text can be learned")
    return parts


def check_row(row: Mapping[str, Any], number: int | None = None) -> Row:
    """Normalise a row without decoding its images.

    Raises:
        ValueError: names the row, what is wrong with it and the way out.
    """
    name = _name(row, number)
    messages = row.get("messages")
    if not messages:
        raise ValueError(f"{name} has no messages; expected the messages format ({sorted(row)} found)")
    normal = []
    for message in messages:
        parts = _parts(message, name)
        normal.append({"role": message["role"], "content": parts})
    if normal[-1]["role"] != "assistant":
        raise ValueError(
            f"{name} ends with a {normal[-1]['role']} turn; the last turn must be the assistant's to learn from it"
        )
    images = row.get("images")
    images = [row["image"]] if images is None and row.get("image") is not None else list(images or [])
    placeholders = sum(part.get("type") == "image" for message in normal for part in message["content"])
    if placeholders != len(images):
        raise ValueError(
            f"{name} has {placeholders} image placeholder(s) and {len(images)} image(s); "
            'give one {"type": "image"} part per image, in order'
        )
    return Row(name, tuple(normal), tuple(images))


def read_row(row: Mapping[str, Any], number: int | None = None) -> Row:
    """`check_row`, with every image decoded to RGB.

    Raises:
        ValueError: as `check_row`, or an image that is missing or unreadable, named with its path.
    """
    checked = check_row(row, number)
    return Row(checked.name, checked.messages, tuple(_decode(image, checked.name) for image in checked.images))


def _decode(image: Any, name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{name}: cannot read image {str(image)!r}: {error}") from error
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    raise ValueError(f"{name}: an image is a {type(image).__name__}; give a path or a PIL image")


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
