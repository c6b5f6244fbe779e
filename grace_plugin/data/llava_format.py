"""The LLaVA and ShareGPT4V format, translated to messages.

    {"id": "7", "image": "a.jpg" | ["a.jpg", "b.jpg"], "video": "clip.mp4" | ["f0.png", "f1.png"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

`<image>` and `<video>` in a human turn stand for the k-th image and the k-th video where the row has that field at all;
in an assistant's turn, or in a row without the field, they are text like any other. The line breaks around a placeholder
belong to the format and are dropped: the model's own chat template sets its own. A `video` that is a list of strings is
one video given as frames; a list of lists is several. A video file in a list (`videos`) is one of several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from grace_plugin.data.faults import RowError
from grace_plugin.data.shown import shown

__all__ = ["from_llava", "is_llava"]

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system",
}  # fmt: skip


def is_llava(row: Mapping[str, Any]) -> bool:
    """Whether a row is in this format."""
    return "conversations" in row and row.get("messages") is None


def _listed(row: Mapping[str, Any], kind: str) -> list[Any] | None:
    """The row's images or videos as a list; None when it has no such field."""
    value = row.get(kind) if row.get(kind) is not None else row.get(f"{kind}s")
    if value is None or value == "":
        return None
    if kind == "video":
        frames = isinstance(value, (list, tuple)) and value and not isinstance(value[0], (list, tuple))
        if isinstance(value, str) or (frames and row.get("video") is not None):
            return [value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _parts(text: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """A human turn as parts."""
    if not kinds:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    for piece in re.split(f"(<(?:{'|'.join(kinds)})>)", text):
        if piece[1:-1] in kinds and piece[0] == "<":
            parts.append({"type": piece[1:-1]})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def from_llava(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The row in the messages format.

    Raises:
        RowError: turns that are no objects with `from` and `value`, or a `from` that is not known.
    """
    turns = row["conversations"]
    if turns is None or isinstance(turns, (str, Mapping)) or not hasattr(turns, "__iter__"):
        raise RowError("malformed", f"{name}: conversations is a {type(turns).__name__}; give a list of turns")
    attached = {kind: _listed(row, kind) for kind in ("image", "video")}
    kinds = tuple(kind for kind, value in attached.items() if value is not None)
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise RowError("malformed", f"{name}: a turn of conversations is no object with from and a text value")
        said = turn.get("from")
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise RowError("unknown_role", f"{name}: from {shown(turn.get('from'))} is not one of {tuple(ROLES)}")
        messages.append({"role": role, "content": _parts(turn["value"], kinds if role == "user" else ())})
    found = {f"{kind}s": value or [] for kind, value in attached.items()}
    return {"id": row.get("id"), "fps": row.get("fps"), "messages": messages, **found}
