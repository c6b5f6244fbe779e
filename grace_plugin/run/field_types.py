"""The fields of the installed `transformers.TrainingArguments`: their names, defaults and types, and values read by them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from grace_plugin.data.bounded_yaml import YamlTextError, read_yaml
from grace_plugin.data.shown import shown
from grace_plugin.run.arguments import ARGUMENTS

__all__ = ["check_name_known", "default_of", "fields", "typed"]

# of a mapping or a list that is given as text
_MOST_VALUES = 10_000
_EMPTY = ("null", "~", "None")
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
    str: "text",
}


@cache
def fields() -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of the installed TrainingArguments by name."""
    return {field.name: field for field in dataclasses.fields(TrainingArguments)}


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(TrainingArguments)


def default_of(name: str) -> Any:
    """Return Trainer's default of a field."""
    field = fields()[name]
    return field.default_factory() if callable(field.default_factory) else field.default


def check_name_known(name: str, others: Iterable[str] = ()) -> None:
    """Refuse a name that no field of TrainingArguments has.

    Args:
        name: as given.
        others: further names that would have been right, for the suggestion.

    Raises:
        ValueError: names the closest known name.
    """
    if name in fields() and name in ARGUMENTS:
        return
    if name in fields():
        raise ValueError(f"{name} is new in this version of transformers and not yet checked with GRACE; leave it out")
    close = difflib.get_close_matches(name, [*fields(), *others], n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"{shown(name)} is not an argument of train() or of transformers.TrainingArguments{meant}")


def _arms(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union without their parameters (dict[str, Any] as dict), or the type alone."""
    found = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(get_origin(arm) or arm for arm in found)


def _choices(name: str) -> list[str]:
    """Return what a text field can be, if its field or its enumeration says so."""
    found = [arm for arm in _arms(_types()[name]) if isinstance(arm, type) and issubclass(arm, Enum)]
    members = [member.value for member in found[0]] if found else fields()[name].metadata.get("choices") or ()
    return [str(member) for member in members]


def _read_text(text: str, arms: tuple[Any, ...]) -> Any:
    """Read text as its field asks: an empty value, a mapping, a list, true or false; any other stays text."""
    if NoneType in arms and text in _EMPTY:
        return None
    if bool in arms and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if (dict in arms and text.lstrip().startswith("{")) or (list in arms and text.lstrip().startswith("[")):
        try:
            read = read_yaml(text, values=_MOST_VALUES)
        except YamlTextError:
            # which its field refuses, with what it takes
            return text
        return _numbers(read) if isinstance(read, dict) else read
    return text


def _numbers(value: Any) -> Any:
    """Return the value with text such as 1e-6, which YAML 1.1 does not take for a number, as numbers."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and value:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def typed(name: str, value: Any) -> Any:
    """Return the value in its field's type.

    Raises:
        ValueError: it has another type, or is none of the field's choices.
    """
    kind = _types()[name]
    arms = _arms(kind)
    if isinstance(value, str):
        value = _read_text(value, arms)
    elif isinstance(value, Mapping):
        value = _numbers(dict(value))
    choices = _choices(name)
    usable = [choice for choice in choices if choice not in ARGUMENTS[name].values]
    wanted = [f"one of {', '.join(usable)}"] if choices else [_KINDS[arm] for arm in arms if arm in _KINDS]
    if dict in arms:
        # text would be the path of a JSON file
        wanted = [_KINDS[dict]]
    fault = f"{name} takes {' or '.join(wanted)}, got {shown(value)}"
    # Python's True is an int, and nobody means 1 by it
    if isinstance(value, bool) and bool not in arms:
        raise ValueError(fault)
    if choices and value is not None:
        text = str(getattr(value, "value", value))
        if text not in choices:
            close = difflib.get_close_matches(text, usable, n=1)
            raise ValueError(fault + (f"; did you mean {close[0]}?" if close else ""))
        return text
    try:
        read = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(fault) from error
    if isinstance(read, str) and dict in arms:
        raise ValueError(fault)
    return read
