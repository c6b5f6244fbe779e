"""The formats that samples come in, each as messages.

| format | fields | read as |
|---|---|---|
| messages | `messages` of `role`, `content` | as they are |
| LLaVA format | `conversations` of `from`, `value` | `llava_format.py` |
| prompt and completion | messages, or two texts | only the completion is learned |
| instruction | `instruction`, `input`, `output`, `history`, `system` | instruction and input in one user turn |
| query | `query`, `response`, `history`, `system` | a user's and an assistant's turn |

The first format of which a sample has the fields is taken; the fields of another one are then unused ones. `system`, also named
`system_prompt`, is the system turn in every format. Two texts as prompt and completion become a user's and an assistant's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from grace_plugin.data.errors import SampleError
from grace_plugin.data.llava_format import from_llava
from grace_plugin.data.schema import is_empty, unused_fields
from grace_plugin.data.shown import shown

__all__ = ["EXPECTED", "to_messages"]

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
        raise SampleError("malformed", f"{name}: {field} is a {type(value).__name__}; give text")
    return value


def _history(sample: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Earlier rounds, [[question, answer], ...]."""
    given = sample.get("history") if sample.get("history") is not None else []
    rounds = given if isinstance(given, (list, tuple)) else None
    if rounds is None or not all(
        isinstance(one, (list, tuple)) and len(one) == 2 and all(isinstance(text, str) for text in one)
        for one in rounds
    ):
        raise SampleError("malformed", f"{name}: history is {shown(given)}; give a list of [question, answer]")
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
    """What is prompt is not learned, answers in it neither."""
    sides = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        given = sample.get(field)
        turns = [{"role": role, "content": given}] if isinstance(given, str) else given
        if isinstance(turns, (str, Mapping)) or not isinstance(turns, (list, tuple)):
            raise SampleError(
                "malformed", f"{name}: {field} is a {type(turns).__name__}; give text or a list of messages"
            )
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
    """The first format whose fields the sample fills; else the first whose fields it has, empty ones included."""
    for lacks in (is_empty, lambda value: value is None):
        for one in FORMATS:
            if not any(lacks(sample.get(field)) for field in one.needs):
                return one
    return None


def _system(sample: Mapping[str, Any], name: str) -> Any:
    """The sample's system text, by either of its names."""
    given = [sample[field] for field in ("system", "system_prompt") if not is_empty(sample.get(field))]
    if len(given) == 2 and given[0] != given[1]:
        raise SampleError("malformed", f"{name} has a system and another system_prompt; give one of them")
    return given[0] if given else None


def _with_system(messages: list[Any], system: Any, name: str) -> list[Any]:
    """The messages after the sample's system text."""
    if is_empty(system):
        return messages
    if not isinstance(system, str):
        raise SampleError("malformed", f"{name}: system is a {type(system).__name__}; give text")
    first = messages[0] if isinstance(messages[0], Mapping) else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") not in (system, [{"type": "text", "text": system}]):
        raise SampleError("malformed", f"{name} has a system field and another system turn; give one of them")
    return messages


def to_messages(sample: Mapping[str, Any], name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a sample in the messages format and the names of its fields that nothing reads.

    Raises:
        SampleError: no format that is read, or a field that is refused.
    """
    found = _format_of(sample)
    unused = unused_fields(sample, found.reads if found is not None else (), name)
    if found is None:
        fields = ", ".join(shown(key) for key, value in list(sample.items())[:20] if value is not None) or "no fields"
        reason = "malformed" if any(not is_empty(value) for value in sample.values()) else "empty_conversation"
        raise SampleError(reason, f"{name} has no messages: it has {fields}; {EXPECTED}")
    made = {**sample, **found.messages(sample, name)}
    messages = made["messages"]
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__len__"):
        raise SampleError("malformed", f"{name}: messages is a {type(messages).__name__}; give a list of turns")
    messages = list(messages)
    if not messages:
        raise SampleError(
            "empty_conversation", f"{name} has no messages: {found.needs[0]} is empty; give a list of turns"
        )
    return {**made, "messages": _with_system(messages, _system(sample, name), name)}, unused
