"""Rows of JSON and JSONL files, of any types, each in its place: one that cannot be read is a fault there, to be counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grace_plugin.data.faults import unreadable

__all__ = ["JsonLines", "json_list", "read_json"]


class JsonLines(Sequence[dict[str, Any]]):
    """Rows of a JSONL file, read when used; blank lines do not count.

    A line that is no JSON object or no valid UTF-8 is a fault in its place, named by its line number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        offsets, numbers, place = [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    offsets.append(place)
                    numbers.append(number)
                place += len(line)
        self.offsets, self.numbers = np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            line = file.readline()
        return _line(line, f"{self.path}, line {self.numbers[index]}")


def _line(line: bytes, where: str) -> dict[str, Any]:
    """The row of a JSONL line, or a fault in its place."""
    try:
        return _object(json.loads(line.decode("utf-8")), where)
    except UnicodeDecodeError as error:
        return unreadable("invalid_utf8", f"{where} is not valid UTF-8 at byte {error.start}; mend the file")
    except (json.JSONDecodeError, RecursionError) as error:
        return unreadable("not_json", f"{where} is not JSON: {error}")


def _object(row: Any, where: str) -> dict[str, Any]:
    return row if isinstance(row, dict) else unreadable("not_json", f"{where} is a {type(row).__name__}, not an object")


def json_list(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON list; bytes that are not UTF-8 are kept as lone surrogates, for `check_row` to find in their row."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8", errors="surrogateescape"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, not a list of rows")
    return [_object(row, f"{path}, row {number}") for number, row in enumerate(rows)]


def read_json(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows of JSON and JSONL files, each file opened when it is reached."""
    for file in files:
        if file.suffix == ".json":
            yield from json_list(file)
            continue
        with file.open("rb") as lines:
            yield from (_line(line, f"{file}, line {n}") for n, line in enumerate(lines, start=1) if line.strip())
