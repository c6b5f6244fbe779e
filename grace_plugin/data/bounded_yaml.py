"""Read YAML that somebody else wrote in time and memory proportional to its length: recipes, mixes, run files, arguments.

PyYAML takes of a key given twice the last, and aliases of aliases until memory ends. Here the text is first read as events
(depth and count), then composed into nodes, which are counted as if every alias were written out, and only then made into
values: mappings with names as keys, lists, words, numbers, true, false and null, as JSON has them.
"""

from __future__ import annotations

from typing import Any

import yaml

from grace_plugin.data.shown import shown

__all__ = ["CONSTRUCTOR_ERRORS", "MOST_LEVELS", "YamlTextError", "read_yaml"]

MOST_LEVELS = 32
#: what PyYAML's constructors raise, in addition to its own errors, for `!!int ""`, an integer of 5,000 digits or 30 February
CONSTRUCTOR_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# libyaml's parser is used for the speed of its events; composing by it ends the process where the text is nested too deep, so
# the depth is checked before
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KINDS: dict[type, str] = {yaml.SequenceNode: "list", yaml.MappingNode: "mapping"}
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}


class YamlTextError(ValueError):
    """What is wrong with a text, as the end of a sentence; the caller names the file."""


def read_yaml(text: str, *, values: int, what: str = "the file") -> Any:
    """Return the values of a YAML text; None where it holds none.

    Args:
        text: at most some hundred thousand characters; the caller bounds it.
        values: how many it may hold, every alias written out.
        what: what the text is, for messages ("a recipe").

    Raises:
        YamlTextError: no YAML (with line and column), too much or too deep, a key given twice or no name, or a value of a
            kind that JSON does not have.
    """
    try:
        _check_events(text, values)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node, {}, values, what)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except YamlTextError:
        raise
    except RecursionError:
        raise YamlTextError(f"nested deeper than {MOST_LEVELS} levels") from None
    except UnicodeEncodeError:
        raise YamlTextError("half a character (a lone surrogate)") from None
    except yaml.YAMLError as error:
        raise YamlTextError(f"no YAML: {_error(error, text)}") from None
    except CONSTRUCTOR_ERRORS as error:
        raise YamlTextError(f"a value that cannot be read: {str(error)[:200]}") from None


def _check_events(text: str, values: int) -> None:
    level = count = 0
    event: Any
    for event in yaml.parse(text, Loader=_Loader):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if level > MOST_LEVELS:
            raise YamlTextError(f"line {event.start_mark.line + 1}: nested deeper than {MOST_LEVELS} levels")
        count += 1
        if count > 2 * values:
            raise YamlTextError(f"more than {values:,} values")


def _check_nodes(node: yaml.Node, sizes: dict[int, int], values: int, what: str) -> int:
    """Return how many values a node stands for, every alias written out; each node is visited once.

    Raises:
        YamlTextError: too many, one that contains itself, a key given twice, or a kind that JSON does not have.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise YamlTextError(f"{_line(node)}: an alias contains itself")
        return sizes[id(node)]
    if node.tag not in _TAGS:
        if node.tag.endswith(":timestamp"):
            raise YamlTextError(f"{_line(node)}: {shown(node.value)} is read as a date; put it in quotes")
        raise YamlTextError(
            f"{_line(node)}: the tag {shown(node.tag)}; {what} holds mappings, lists, words and numbers alone"
        )
    sizes[id(node)] = 0
    count, keys = 1, set()
    for child in node.value if not isinstance(node, yaml.ScalarNode) else ():
        for part in child if isinstance(node, yaml.MappingNode) else (child,):
            count += _check_nodes(part, sizes, values, what)
        if isinstance(node, yaml.MappingNode):
            key = child[0]
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                said = shown(key.value) if isinstance(key, yaml.ScalarNode) else f"a {_KINDS[type(key)]}"
                raise YamlTextError(f"{_line(key)}: the key {said} must be a name; put it in quotes if it is one")
            if key.value in keys:
                raise YamlTextError(f"{_line(key)}: the key {shown(key.value)} is given twice; keep one of them")
            keys.add(key.value)
    if count > values:
        raise YamlTextError(f"{_line(node)}: aliases that stand for more than {values:,} values")
    sizes[id(node)] = count
    return count


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"


def _error(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.encode(errors="replace")[: error.position].count(b"\n") + 1
        return f"line {line}: a character that is not allowed; is it another file?"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = " ".join(str(getattr(error, "problem", None) or getattr(error, "context", None) or error).split())[:200]
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}" if mark else said
