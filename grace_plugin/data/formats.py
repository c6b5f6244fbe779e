"""The formats of samples, each translated to messages.

| format | fields | read as |
|---|---|---|
| messages | `messages` of `role`, `content` | as they are |
| LLaVA format (ShareGPT's) | `conversations` of `from`, `value`; `image`, `video` | see `from_llava` |
| prompt and completion | messages, or two texts | only the completion is supervised |
| instruction | `instruction`, `input`, `output`, `history`, `system` | instruction and input in one user turn |
| query | `query`, `response`, `history`, `system` | a user's and an assistant's turn |

The first format whose fields a sample has is taken; fields of another format are then unused. `system`, also named
`system_prompt`, is the system turn in every format. Two texts as prompt and completion become a user's and an assistant's turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from grace_plugin.data.errors import SampleError, malformed
from grace_plugin.data.schema import check_turn_fields, is_empty, unused_fields
from grace_plugin.data.shown import shortened, shown

__all__ = ["EXPECTED", "from_llava", "to_messages"]

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


def _media_list(sample: Mapping[str, Any], kind: str) -> list[Any] | None:
    """Return the sample's images or videos as a list; None when it has no such field."""
    value = sample.get(kind) if sample.get(kind) is not None else sample.get(f"{kind}s")
    # a tag without its image is found where the column is there
    if value is None or value == "":
        return [] if kind in sample or f"{kind}s" in sample else None
    if kind == "video":
        frames = isinstance(value, (list, tuple)) and value and not isinstance(value[0], (list, tuple))
        if isinstance(value, str) or (frames and sample.get("video") is not None):
            return [value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _tagged_parts(text: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a human turn as parts."""
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
    """Return the turns, each with `from` and `value`."""
    if isinstance(turns, (str, Mapping)) or not hasattr(turns, "__iter__"):
        raise malformed(f"{name}: {field} is a {type(turns).__name__}; give a list of turns")
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


def _tool_calls(value: str, name: str) -> list[Any]:
    """Return the tool calls that a turn holds as JSON text."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:  # ValueError also of an integer of more digits than Python converts
        raise malformed(f"{name}: a function_call turn is no JSON object: {shortened(error)}") from error
    return found if isinstance(found, list) else [found]


def from_llava(sample: Mapping[str, Any], field: str, name: str) -> dict[str, Any]:
    """Return what replaces the sample's fields in the messages format.

        {"id": "7", "image": "a.jpg" | ["a.jpg", "b.jpg"], "video": "clip.mp4" | ["f0.png", "f1.png"],
         "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

    `<image>` and `<video>` in a human turn are placeholders, in order, where the sample has that field at all; in an
    assistant's turn, or in a sample without the field, they are text. Line breaks around a placeholder are dropped, since the
    model's chat template sets its own. A `video` that is a list of strings is one video given as frames; a list of lists is
    several videos, and so is `videos`.

    A turn may also have `role` and `content`, or be a pair {"human": ..., "assistant": ...}. `weight` and `train` of a turn are
    kept. A turn from `function_call` holds a tool call as JSON text, one from `observation` or `tool` the tool's answer.

    Args:
        field: which of the sample's fields holds the turns.
    """
    attached = {kind: _media_list(sample, kind) for kind in ("image", "video")}
    kinds = tuple(kind for kind, value in attached.items() if value is not None)
    messages: list[dict[str, Any]] = []
    for turn in _turns(sample[field], field, name):
        value = turn.get("value") if isinstance(turn, Mapping) else None
        listed = isinstance(value, (list, tuple))
        if not isinstance(turn, Mapping) or not (isinstance(value, str) or listed or turn.get("tool_calls")):
            raise malformed(f"{name}: a turn of {field} is no object with from and a text value")
        said = turn.get("from")
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise SampleError("unknown_role", f"{name}: from {shown(said)} is not one of {tuple(ROLES)}")
        check_turn_fields(turn, ("from", "value", *_KEPT), f"{name}: a turn from {shown(said)}")
        kept = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
        content: Any = value
        if said == "function_call" and isinstance(value, str):
            kept["tool_calls"], content = _tool_calls(value, name), None
        elif isinstance(value, str):
            content = _tagged_parts(value, kinds if role == "user" else ())
        messages.append({"role": role, "content": content, **kept})
    found = {f"{kind}s": value or [] for kind, value in attached.items()}
    return {"messages": messages, **found, "image": None, "video": None}


EXPECTED = (
    'give "messages" (a list of role and content), "conversations" (from and value), "prompt" and "completion", "instruction" '
    'and "output", or "query" and "response"; rename the columns, or map them'
)


class _Format(NamedTuple):
    """needs: fields that tell it. reads: all of its fields. messages: (sample, name) -> fields to replace."""

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    messages: Callable[[Mapping[str, Any], str], dict[str, Any]]


def _text(sample: Mapping[str, Any], field: str, name: str) -> str:
    value = sample.get(field)
    if not isinstance(value, str):
        raise malformed(f"{name}: {field} is a {type(value).__name__}; give text")
    return value


def _history(sample: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return earlier rounds, [[question, answer], ...]."""
    given = sample.get("history") if sample.get("history") is not None else []
    rounds = given if isinstance(given, (list, tuple)) else None
    if rounds is None or not all(
        isinstance(one, (list, tuple)) and len(one) == 2 and all(isinstance(text, str) for text in one)
        for one in rounds
    ):
        raise malformed(f"{name}: history is {shown(given)}; give a list of [question, answer]")
    return [
        {"role": role, "content": text} for one in rounds for role, text in zip(("user", "assistant"), one, strict=True)
    ]


def _rounds(sample: Mapping[str, Any], question: str, answer: str, name: str) -> dict[str, Any]:
    last = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*_history(sample, name), *last]}


def _instruction(sample: Mapping[str, Any], name: str) -> dict[str, Any]:
    asked, more = _text(sample, "instruction", name), sample.get("input")
    if not is_empty(more):
        asked = f"{asked}\n{_text(sample, 'input', name)}"
    return _rounds(sample, asked, _text(sample, "output", name), name)


def _query(sample: Mapping[str, Any], name: str) -> dict[str, Any]:
    return _rounds(sample, _text(sample, "query", name), _text(sample, "response", name), name)


def _completion(sample: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the messages; the prompt is not supervised, nor are answers in it."""
    sides = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        given = sample.get(field)
        turns = [{"role": role, "content": given}] if isinstance(given, str) else given
        if isinstance(turns, (str, Mapping)) or not isinstance(turns, (list, tuple)):
            raise malformed(f"{name}: {field} is a {type(turns).__name__}; give text or a list of messages")
        sides.append(list(turns))
    prompt = [
        {**turn, "train": False} if isinstance(turn, Mapping) and turn.get("role") == "assistant" else turn
        for turn in sides[0]
    ]
    return {"messages": [*prompt, *sides[1]]}


FORMATS = (
    _Format(("messages",), ("messages",), lambda _sample, _name: {}),
    _Format(("conversations",), ("conversations",), lambda sample, name: from_llava(sample, "conversations", name)),
    _Format(("conversation",), ("conversation",), lambda sample, name: from_llava(sample, "conversation", name)),
    _Format(("prompt", "completion"), ("prompt", "completion"), _completion),
    _Format(("instruction", "output"), ("instruction", "input", "output", "history"), _instruction),
    _Format(("query", "response"), ("query", "response", "history"), _query),
)


def _format_of(sample: Mapping[str, Any]) -> _Format | None:
    """Return the first format whose fields the sample fills; else the first whose fields it has, empty ones included."""
    for lacks in (is_empty, lambda value: value is None):
        for one in FORMATS:
            if not any(lacks(sample.get(field)) for field in one.needs):
                return one
    return None


def _system(sample: Mapping[str, Any], name: str) -> Any:
    """Return the sample's system text, by either of its names."""
    given = [sample[field] for field in ("system", "system_prompt") if not is_empty(sample.get(field))]
    if len(given) == 2 and given[0] != given[1]:
        raise malformed(f"{name} has a system and another system_prompt; give one of them")
    return given[0] if given else None


def _with_system(messages: list[Any], system: Any, name: str) -> list[Any]:
    """Return the messages after the sample's system text."""
    if is_empty(system):
        return messages
    if not isinstance(system, str):
        raise malformed(f"{name}: system is a {type(system).__name__}; give text")
    first = messages[0] if isinstance(messages[0], Mapping) else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") not in (system, [{"type": "text", "text": system}]):
        raise malformed(f"{name} has a system field and another system turn; give one of them")
    return messages


def to_messages(sample: Mapping[str, Any], name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a sample in the messages format and the names of its fields that nothing reads."""
    found = _format_of(sample)
    unused = unused_fields(sample, found.reads if found is not None else (), name)
    if found is None:
        fields = ", ".join(shown(key) for key, value in list(sample.items())[:20] if value is not None) or "no fields"
        reason = "malformed" if any(not is_empty(value) for value in sample.values()) else "empty_conversation"
        raise SampleError(reason, f"{name} has no messages: it has {fields}; {EXPECTED}")
    made = {**sample, **found.messages(sample, name)}
    messages = made["messages"]
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__len__"):
        raise malformed(f"{name}: messages is a {type(messages).__name__}; give a list of turns")
    messages = list(messages)
    if not messages:
        raise SampleError(
            "empty_conversation", f"{name} has no messages: {found.needs[0]} is empty; give a list of turns"
        )
    return {**made, "messages": _with_system(messages, _system(sample, name), name)}, unused
