"""Read a recipe from a file or a text, bounded in size and time, and give one sentence on what is wrong with it.

    grace_stage:                 a key that ends in _stage
      grace_modifiers:           a key that ends in _modifiers
        GraceModifier:           the name of a modifier
          scheme: W4A16          its fields

llm-compressor's reader ignores keys of other names, so the form is checked before upstream gets the values.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grace_plugin.data.bounded_yaml import MOST_LEVELS, YamlTextError, read_yaml
from grace_plugin.recipe import problems, shown
from grace_plugin.upstream import Modifier, Recipe

__all__ = ["recipe_from"]

MOST_BYTES, MOST_VALUES = 2**18, 20_000
_ENDINGS = (".yaml", ".yml", ".json")
_RESERVED = {"self", "type_", "allow_registered", "allow_experimental"}  # arguments of upstream's factory
_NAMES = (
    "GraceModifier",
    "QuantizationModifier",
    "GPTQModifier",
    "AWQModifier",
    "SmoothQuantModifier",
    "AutoRoundModifier",
)
_FORM = "write grace_stage: {grace_modifiers: {GraceModifier: {scheme: W4A16, teacher: {model: ...}}}}"


def recipe_from(given: Any) -> Recipe:
    """Return a recipe from a path, a text, a modifier, several, or a recipe.

    Raises:
        ValueError: says what is wrong, with the file, the line or the key.
    """
    if isinstance(given, Recipe | Modifier | list):
        return Recipe.create_instance(given)
    if isinstance(given, os.PathLike) or (isinstance(given, str) and _is_path(given)):
        path = Path(given)
        try:
            return _recipe(_parsed(_text(path), path.suffix.lower() == ".json"))
        except _RecipeError as error:
            raise ValueError(f"recipe {_name(path)}: {error}") from error.__cause__
    if isinstance(given, str):
        try:
            values = _parsed(given, False)
            _check_form(values)
        except _RecipeError as error:
            raise ValueError(f"recipe: {error}") from None
        return _recipe(values)
    raise ValueError(
        f"a recipe is a path, a YAML text, a GraceModifier or a Recipe; got {type(given).__name__}, which is none"
    )


class _RecipeError(ValueError):
    """An error in a recipe, without the name of its file."""


def _name(path: Path) -> str:
    name = str(path)
    return name if len(name) <= 200 else f"{name[:200]}..."


def _is_path(text: str) -> bool:
    """Whether a string names a file: the text of a recipe has lines or braces, or a colon with a space."""
    if not text.strip() or "\n" in text or len(text) > 4096 or "\0" in text:
        return False
    return (
        text.lower().endswith(_ENDINGS)
        or os.path.exists(text)
        or not (": " in text or text.rstrip().endswith((":", "}")))
    )


def _text(path: Path) -> str:
    """Return the text of a recipe file.

    Raises:
        _RecipeError: no regular file of at most 256 KiB of UTF-8, or with another ending than a recipe has.
        ValueError: no file.
    """
    try:
        found = path.stat()
        # opening a pipe waits for a writer, and a device never ends
        if not stat.S_ISREG(found.st_mode):
            raise _RecipeError(f"{'a folder' if stat.S_ISDIR(found.st_mode) else 'no regular file'}; name a YAML file")
        if path.suffix.lower() not in _ENDINGS:
            raise _RecipeError(f"the name ends in {shown(path.suffix)}, a recipe's in {', '.join(_ENDINGS)}")
        if found.st_size > MOST_BYTES:
            raise _RecipeError(
                f"{found.st_size:,} bytes, where a recipe has at most {MOST_BYTES:,}; is it another file?"
            )
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _RecipeError(
            f"no UTF-8 text (at byte {error.start:,}); is it another file, or saved as UTF-16?"
        ) from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"no recipe at {_name(path)}") from error
    except OSError as error:
        raise _RecipeError(f"cannot be read: {error.strerror}") from error


def _parsed(text: str, is_json: bool) -> Any:
    """Return the values of a text.

    Raises:
        _RecipeError: no YAML (with line and column), too much of it, a key given twice, or a value of another kind than
            JSON has.
    """
    if len(text) > MOST_BYTES:
        raise _RecipeError(f"{len(text):,} characters, where a recipe has at most {MOST_BYTES:,}")
    try:
        if is_json or text.lstrip().startswith("{"):
            try:
                value = json.loads(text, object_pairs_hook=_pairs)
                _count(value)
                return value
            except json.JSONDecodeError as error:
                if is_json:
                    raise _RecipeError(f"no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
            except ValueError as error:
                if isinstance(error, _RecipeError):
                    raise
                raise _RecipeError("an integer of too many digits") from None
        read = read_yaml(text, values=MOST_VALUES, what="a recipe")
    except RecursionError:
        raise _RecipeError(f"nested deeper than {MOST_LEVELS} levels") from None
    except YamlTextError as error:
        raise _RecipeError(str(error)) from None
    if read is None:
        raise _RecipeError(f"empty; {_FORM}")
    return read


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RecipeError(f"the key {shown(twice)} is given twice; keep one of them")
    return made


def _count(value: Any, level: int = 0) -> int:
    if level > MOST_LEVELS:
        raise _RecipeError(f"nested deeper than {MOST_LEVELS} levels")
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    count = 1 + sum(_count(part, level + 1) for part in parts)
    if count > MOST_VALUES:
        raise _RecipeError(f"more than {MOST_VALUES:,} values")
    return count


def _recipe(values: Any) -> Recipe:
    """Return upstream's recipe of checked values.

    Raises:
        _RecipeError: names the key that is wrong.
    """
    _check_form(values)
    try:
        return Recipe.from_dict(values)
    except ValidationError as error:  # of another modifier; a GraceModifier raises a ValueError
        fields = [given[error.title] for groups in values.values() for given in groups.values() if error.title in given]
        raise _RecipeError(f"{error.title[:80]}: {problems(error, fields[0] if fields else {})}") from None
    except ValueError as error:
        # any name may have been registered with llm-compressor, so its factory alone knows which are none
        unknown = re.fullmatch(r"No modifier of type '(.*)' found\.", str(error), re.DOTALL)
        if unknown is None:
            raise _RecipeError(str(error)) from error
        near = "".join(f"; did you mean {one!r}?" for one in difflib.get_close_matches(unknown[1], _NAMES, 1))
        raise _RecipeError(f"{shown(unknown[1])} is no name of a modifier{near}") from error
    except Exception as error:  # another modifier's own code, which compares and calls values of any type
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise _RecipeError(
            f"llm-compressor cannot read a modifier of the recipe ({said}); check the types of its values"
        ) from error


def _check_form(values: Any) -> None:
    """Refuse what upstream's reader would ignore or fail at.

    Raises:
        _RecipeError: names the key.
    """
    if values is None or values == {}:
        raise _RecipeError(f"empty; {_FORM}")
    for stage, groups in _mapping(values, "the recipe", "").items():
        if stage == "args" and groups == {}:
            continue
        _ends(stage, "_stage", "the recipe")
        for group, modifiers in _mapping(groups, stage, "").items():
            _ends(group, "_modifiers", stage)
            for name, fields in _mapping(modifiers, f"{stage}.{group}", "").items():
                where = f"{stage}.{group}.{name}"[:200]
                _check_fields(_mapping(fields, where, ", for instance {scheme: W4A16}"), name, where)


def _check_fields(fields: Mapping[str, Any], name: str, where: str) -> None:
    for key in fields:
        if key in _RESERVED:
            raise _RecipeError(f"unknown key {shown(key)} in {name}")
    group = fields.get("group")
    if group is not None and not isinstance(group, str):
        raise _RecipeError(f"{where}.group must be a name, got {shown(group)}")


def _mapping(value: Any, where: str, advice: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _RecipeError(
            f"{where[:200]} must be a mapping{advice}, got {shown(value)}" + ("" if advice else f"; {_FORM}")
        )
    return value


def _ends(key: str, ending: str, where: str) -> None:
    if not key.endswith(ending):
        raise _RecipeError(f"unknown key {shown(key)} in {where[:200]}, whose keys end in {ending}; {_FORM}")
