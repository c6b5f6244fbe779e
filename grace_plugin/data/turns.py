"""One turn of a conversation: its role, its content, and what else a chat template reads of it.

Turns of the assistant are supervised, but for those that say `train: false`, `weight: 0` or `loss: false`. `reasoning_content`
and `tool_calls` go through the chat template, which has to write them (`segments.py`). A tool's answer has the role `tool`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from grace_plugin.data.errors import SampleError, malformed
from grace_plugin.data.parts import check_text, read_parts
from grace_plugin.data.schema import check_turn_fields, is_empty
from grace_plugin.data.shown import shortened, shown

__all__ = ["ROLES", "check_order", "read_tools", "read_turn", "split_tags"]

ROLES = ("system", "user", "assistant", "tool")
# OpenAI's newer name of the system role
_SAME = {"developer": "system"}
_WEIGHTS = ("train", "weight", "loss")
_READ = ("role", "content", "tool_calls", "reasoning_content", "tool_call_id", "name", *_WEIGHTS)


def split_tags(text: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Cut a text at its tags `<image>` and `<video>` of the given kinds; the text around them is kept as it is."""
    if not kinds:
        return [{"type": "text", "text": text}]
    pieces = re.split(f"<({'|'.join(kinds)})>", text)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):  # every second piece is the kind of a tag
        if number % 2:
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _article(role: str) -> str:
    return f"{'an' if role == 'assistant' else 'a'} {role}"


def _is_trained(turn: Mapping[str, Any], role: str, name: str) -> bool:
    """Return whether a turn's own fields leave it in the loss."""
    said = {key: turn[key] for key in _WEIGHTS if turn.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise malformed(
                f"{name}: {key} of {_article(role)} turn is {shown(value)}; a turn is supervised (1, true) or not (0, false)"
            )
        if role != "assistant" and value:
            raise malformed(f"{name}: {key} asks to learn {_article(role)} turn; only assistant turns are supervised")
    if len({bool(value) for value in said.values()}) > 1:
        raise malformed(f"{name}: {' and '.join(said)} of {_article(role)} turn disagree; give one of them")
    return all(said.values())


def _parsed(value: Any, what: str, name: str) -> Any:
    """Return a value that tables often hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:  # ValueError also of an integer of more digits than Python converts
        raise malformed(f"{name}: {what} is text that is not JSON ({shortened(error)})") from error


def _check_texts(value: Any, what: str, name: str) -> None:
    """Refuse lone surrogates at any depth."""
    if isinstance(value, str):
        check_text(value, what, name)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check_texts(key, what, name)
            _check_texts(part, what, name)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_texts(part, what, name)


def _call(given: Any, name: str) -> dict[str, Any]:
    """Return one tool call as chat templates read it, its arguments an object."""
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise malformed(f"{name}: a tool call has no function name; give a name and arguments")
    if function is not given:
        check_turn_fields(given, ("id", "type", "index", "function"), f"{name}: a tool call")
    check_turn_fields(function, ("id", "type", "name", "arguments"), f"{name}: a tool call")
    arguments = _parsed(function.get("arguments") or {}, "arguments of a tool call", name)
    if not isinstance(arguments, Mapping):
        raise malformed(f"{name}: the arguments of a tool call are a {type(arguments).__name__}, not an object")
    mark = {"id": given["id"]} if given.get("id") is not None else {}
    return {**mark, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def read_tools(given: Any, name: str) -> tuple[dict[str, Any], ...]:
    """Return the tools of a sample as chat templates read them: a list of objects, or that as JSON text."""
    tools = [] if is_empty(given) else _parsed(given, "tools", name)
    if not isinstance(tools, (list, tuple)):
        raise malformed(f"{name}: tools is a {type(tools).__name__}; give a list")
    found = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise malformed(f"{name}: a tool has no name; give name, description and parameters")
        found.append(dict(tool) if function is not tool else {"type": "function", "function": dict(function)})
    _check_texts(found, "tools", name)
    return tuple(found)


def _extras(turn: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    """Return what a template reads of a turn in addition to its content."""
    found: dict[str, Any] = {}
    for key in ("tool_calls", "reasoning_content"):
        if not is_empty(turn.get(key)) and role != "assistant":
            raise SampleError(
                "unknown_field", f"{name}: {_article(role)} turn has {key}, which only an assistant turn can have"
            )
    calls = _parsed(turn.get("tool_calls"), "tool_calls", name)
    if not is_empty(calls):
        if not isinstance(calls, (list, tuple)):
            raise malformed(f"{name}: tool_calls is a {type(calls).__name__}; give a list")
        found["tool_calls"] = [_call(call, name) for call in calls]
    thought = turn.get("reasoning_content")
    if thought is not None and not isinstance(thought, str):
        raise malformed(f"{name}: reasoning_content is a {type(thought).__name__}; give text")
    if thought and thought.strip():
        found["reasoning_content"] = thought
    if not is_empty(turn.get("tool_call_id")) and role != "tool":
        raise SampleError(
            "unknown_field", f"{name}: {_article(role)} turn has tool_call_id, which only a tool's turn can have"
        )
    if not is_empty(turn.get("name")) and not isinstance(turn["name"], str):
        raise malformed(f"{name}: name of {_article(role)} turn is a {type(turn['name']).__name__}; give text")
    found |= {key: turn[key] for key in ("tool_call_id", "name") if not is_empty(turn.get(key))}
    _check_texts(found, f"a field of {_article(role)} turn", name)
    return found


def read_turn(
    turn: Any, name: str, kinds: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[tuple[str, Any, Any]], bool]:
    """Return a turn in one form, its images and videos as `read_parts` has them, and whether its content was plain text.

    Args:
        kinds: which tags of a user's plain text stand for images and videos.
    """
    if not isinstance(turn, Mapping):
        raise malformed(f"{name}: a message is a {type(turn).__name__}; give an object with role and content")
    said, content = turn.get("role"), turn.get("content")
    role = _SAME.get(said, said) if isinstance(said, str) else said
    if role not in ROLES:
        raise SampleError("unknown_role", f"{name}: role {shown(said)} is not one of {ROLES}")
    where = f"{name}: {_article(role)} turn"
    check_turn_fields(turn, _READ, where)
    extras = _extras(turn, role, name)
    plain = isinstance(content, str)
    if content is None:
        if "tool_calls" not in extras:
            raise SampleError(
                "empty_conversation", f"{name}: {_article(role)} turn has no content; give text or a list of parts"
            )
        content = []
    parts, media = read_parts(
        split_tags(content, kinds if role == "user" else ()) if isinstance(content, str) else content, role, name
    )
    texts = ["x" if part["type"] != "text" else part["text"] for part in parts]
    empty = not "".join(texts).strip() if role == "assistant" else not "".join(texts)
    if empty and "tool_calls" not in extras:
        raise SampleError("empty_conversation", f"{name}: {_article(role)} turn is empty; give text, or drop the turn")
    trained = _is_trained(turn, role, name)
    return {"role": role, "content": parts, **extras, **({} if trained else {"train": False})}, media, plain


def check_order(messages: list[dict[str, Any]], name: str) -> None:
    """Refuse turns out of order: a system turn first if at all, then user and assistant in turn, the assistant last.

    Between two assistant turns, answers of tools may take the place of the user's turn.
    """
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise SampleError(
            "roles_out_of_order",
            f"{name} ends with a {roles[-1]} turn; the last turn must be the assistant's to learn from it",
        )
    turns = roles[1:] if roles[0] == "system" else roles
    follows = {"user": ("", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool"), "system": ()}
    if any(before not in follows[role] for before, role in zip(["", *turns], turns, strict=False)):
        listed = ", ".join(roles[:20]) + (", ..." if len(roles) > 20 else "")
        raise SampleError(
            "roles_out_of_order",
            f"{name}: the roles are in the order {listed}; user and assistant take turns, after one system turn",
        )
