"""Edits of a finished checkpoint: single bytes of any file, single fields of its JSON files, files that come and go."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grace_plugin
from grace_plugin.export import VerificationError
from grace_plugin.export.record import VERIFICATION


class Edit(NamedTuple):
    """file: relative name. what: for reports. make: old content -> new content."""

    file: str
    what: str
    make: Callable[[bytes], bytes]


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def byte_edits(folder: Path, count: int, seed: int) -> list[Edit]:
    """`count` single bytes with another value, as many in each file as in any other."""
    draw, names = random.Random(seed), files_of(folder)
    edits = []
    for number in range(count):
        name = names[number % len(names)]
        place = draw.randrange((folder / name).stat().st_size)
        flip = draw.randrange(1, 256)

        def make(content: bytes, place: int = place, flip: int = flip) -> bytes:
            return content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]

        edits.append(Edit(name, f"byte {place} xor {flip}", make))
    return edits


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values of a JSON document that are neither object nor list."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    elif path:
        yield path


def other(value: Any) -> Any:
    """Another value of the same kind where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return 0 if value is None else [0]


def changed_field(content: bytes, path: tuple[Any, ...]) -> bytes:
    document = json.loads(content)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = other(place[path[-1]])
    indent = 1 if content.startswith(b'{\n "') else 2
    return (json.dumps(document, indent=indent, ensure_ascii=False) + "\n").encode()


def field_edits(folder: Path, count: int, seed: int) -> list[Edit]:
    """`count` fields with another value, as many in each JSON file as in any other."""
    draw = random.Random(seed)
    names = [name for name in files_of(folder) if name.endswith(".json")]
    fields = {name: list(leaves(json.loads((folder / name).read_bytes()))) for name in names}
    edits = []
    for number in range(count):
        name = names[number % len(names)]
        path = draw.choice(fields[name])
        edits.append(Edit(name, ".".join(map(str, path)), lambda content, path=path: changed_field(content, path)))
    return edits


@contextmanager
def edited(folder: Path, edit: Edit) -> Iterator[None]:
    """The folder with one edit, and as it was afterwards."""
    before = {name: (folder / name).read_bytes() for name in {edit.file, VERIFICATION}}
    (folder / edit.file).write_bytes(edit.make(before[edit.file]))
    try:
        yield
    finally:
        for name, content in before.items():
            (folder / name).write_bytes(content)


def verdict(folder: Path, edit: Edit) -> str | None:
    """The sentence that `verify` refuses an edited checkpoint with; None where it passes."""
    with edited(folder, edit):
        try:
            grace_plugin.verify(folder)
        except VerificationError as error:
            return str(error)
    return None
