"""The LLaVA format, which is also ShareGPT's, translated to messages.

    {"id": "7", "image": "a.jpg" | ["a.jpg", "b.jpg"], "video": "clip.mp4" | ["f0.png", "f1.png"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

`<image>` and `<video>` in a human turn stand for the k-th image and the k-th video where the sample has that field at all;
in an assistant's turn, or in a sample without the field, they are text like any other. The line breaks around a placeholder
belong to the format and are dropped: the model's own chat template sets its own. A `video` that is a list of strings is
one video given as frames; a list of lists is several. A video file in a list (`videos`) is one of several.

Turns may also say `role` and `content`, or be a pair {"human": ..., "assistant": ...}. `weight` and `train` of a turn are kept.
A turn from `function_call` holds a tool call as JSON text, one from `observation` or `tool` the tool's answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from grace_plugin.data.errors import SampleError
from grace_plugin.data.schema import check_turn_fields
from grace_plugin.data.shown import shortened, shown

__all__ = ["from_llava"]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
_KEPT = ("train", "weight", "loss", "tool_calls", "reasoning_content", "tool_call_id", "name")


def _listed(sample: Mapping[str, Any], kind: str) -> list[Any] | None:
    """The sample's images or videos as a list; None when it has no such field."""
    value = sample.get(kind) if sample.get(kind) is not None else sample.get(f"{kind}s")
    if value is None or value == "":  # a tag without its image is found where the column is there
        return [] if kind in sample or f"{kind}s" in sample else None
    if kind == "video":
        frames = isinstance(value, (list, tuple)) and value and not isinstance(value[0], (list, tuple))
        if isinstance(value, str) or (frames and sample.get("video") is not None):
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


def _turns(turns: Any, field: str, name: str) -> Iterator[Mapping[str, Any]]:
    """The turns, each with `from` and `value`."""
    if isinstance(turns, (str, Mapping)) or not hasattr(turns, "__iter__"):
        raise SampleError("malformed", f"{name}: {field} is a {type(turns).__name__}; give a list of turns")
    for turn in turns:
        if isinstance(turn, Mapping) and {"human", "assistant"} <= set(turn):
            yield {"from": "human", "value": turn["human"]}
            yield {"from": "gpt", "value": turn["assistant"]}
        elif isinstance(turn, Mapping) and turn.get("from") is None and isinstance(turn.get("role"), str):
            yield {
                **{key: value for key, value in turn.items() if key not in ("role", "content")},
                "from": turn["role"],
                "value": turn.get("content"),
            }
        else:
            yield turn


def _called(value: str, name: str) -> list[Any]:
    """The tool calls that a turn holds as JSON text."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:  # ValueError also of an integer of more digits than Python converts
        raise SampleError("malformed", f"{name}: a function_call turn is no JSON object: {shortened(error)}") from error
    return found if isinstance(found, list) else [found]


def from_llava(sample: Mapping[str, Any], field: str, name: str) -> dict[str, Any]:
    """Return what takes the place of the sample's fields in the messages format.

    Args:
        field: which of the sample's fields holds the turns.

    Raises:
        SampleError: turns that are no objects with `from` and `value`, or a `from` that is not known.
    """
    attached = {kind: _listed(sample, kind) for kind in ("image", "video")}
    kinds = tuple(kind for kind, value in attached.items() if value is not None)
    messages: list[dict[str, Any]] = []
    for turn in _turns(sample[field], field, name):
        value = turn.get("value") if isinstance(turn, Mapping) else None
        listed = isinstance(value, (list, tuple))
        if not isinstance(turn, Mapping) or not (isinstance(value, str) or listed or turn.get("tool_calls")):
            raise SampleError("malformed", f"{name}: a turn of {field} is no object with from and a text value")
        said = turn.get("from")
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise SampleError("unknown_role", f"{name}: from {shown(said)} is not one of {tuple(ROLES)}")
        check_turn_fields(turn, ("from", "value", *_KEPT), f"{name}: a turn from {shown(said)}")
        kept = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
        content: Any = value
        if said == "function_call" and isinstance(value, str):
            kept["tool_calls"], content = _called(value, name), None
        elif isinstance(value, str):
            content = _parts(value, kinds if role == "user" else ())
        messages.append({"role": role, "content": content, **kept})
    found = {f"{kind}s": value or [] for kind, value in attached.items()}
    return {"messages": messages, **found, "image": None, "video": None}
