"""Read samples from JSON and JSONL files, each in its place: one that cannot be read is an error there, to be counted.

Two things are errors of a sample although Python's `json` accepts one of them: an integer of more digits than Python converts
(`sys.get_int_max_str_digits()`, 4,300), and a key given twice, of which only the second would be used.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grace_plugin.data.errors import unreadable
from grace_plugin.data.shown import shortened, shown

__all__ = ["JsonLines", "check_regular", "json_list", "read_json"]

# which editors on Windows put before the first line
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


class _UnusableError(ValueError):
    """Valid JSON that a sample must not hold."""


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _UnusableError(f"an integer of {len(text):,} digits; write it as a string, or drop it") from None


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise _UnusableError(f"the field {shown(twice)} twice in one object; keep one of them")
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_fields, parse_int=_integer)
# finds the end of what the other one refused
_LENIENT = json.JSONDecoder(parse_int=lambda _text: 0)


def check_regular(path: Path) -> None:
    """Refuse a dataset file that is missing or no regular file: reading a FIFO or a device may never end.

    Raises:
        ValueError: names the file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        raise ValueError(f"no dataset file at {path}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file; give a file with the samples, or remove it from the folder")


class JsonLines(Sequence[dict[str, Any]]):
    """Samples of a JSONL file, read when used; blank lines do not count.

    A line that is no JSON object or no valid UTF-8 is an error in its place, named by its line number.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.path = path
        offsets, numbers, lengths, place = [], [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    offsets.append(place)
                    numbers.append(number)
                    lengths.append(len(line))
                place += len(line)
        self.offsets, self.numbers = np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)
        self.lengths = np.array(lengths, dtype=np.int64)
        self._last: tuple[int, bytes] = (-1, b"")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return _line(self.stored(index), f"{self.path}, line {self.numbers[index]}")

    def stored(self, index: int) -> bytes:
        """Return the bytes of the index-th sample's line."""
        # a sample is hashed and then parsed
        if self._last[0] != index:
            # opened for each read: after a fork, workers share the offset of an open file
            handle = os.open(self.path, os.O_RDONLY)
            try:
                self._last = index, os.pread(handle, int(self.lengths[index]), int(self.offsets[index]))
            finally:
                os.close(handle)
        return self._last[1]


def _line(line: bytes, where: str) -> dict[str, Any]:
    """Return the sample of a JSONL line, or an error in its place."""
    try:
        return _object(_STRICT.decode(line.removeprefix(_BOM).decode("utf-8")), where)
    except UnicodeDecodeError as error:
        return unreadable("invalid_utf8", f"{where} is not valid UTF-8 at byte {error.start}; correct the file")
    except _UnusableError as error:
        return unreadable("not_json", f"{where} holds {error}")
    except (json.JSONDecodeError, RecursionError) as error:
        return unreadable("not_json", f"{where} is not JSON: {shortened(error)}")


def _object(sample: Any, where: str) -> dict[str, Any]:
    return (
        sample
        if isinstance(sample, dict)
        else unreadable("not_json", f"{where} is a {type(sample).__name__}, not an object")
    )


def json_list(path: Path) -> list[dict[str, Any]]:
    """Return samples of a JSON list; bytes that are not UTF-8 are kept as lone surrogates, for `check_sample` to find in
    their sample.

    Raises:
        ValueError: no list, or not JSON, with line, column and the number of the sample.
    """
    check_regular(path)
    # one invalid byte must not refuse the whole list, so it is decoded to a surrogate and found in its own sample
    text = path.read_bytes().removeprefix(_BOM).decode("utf-8", errors="surrogateescape")
    place, samples = _after_space(text, 0), list[dict[str, Any]]()
    if not text.startswith("[", place):
        raise ValueError(f"{path} {_no_list(text)}")
    place = _after_space(text, place + 1)
    while not text.startswith("]", place):
        where = f"{path}, sample {len(samples)}"
        try:
            sample, place = _item(text, place, where)
            samples.append(sample)
            place = _after_space(text, place)
            if text.startswith(",", place):
                place = _after_space(text, place + 1)
            elif not text.startswith("]", place):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {shortened(error)}; correct the file") from error
    if _after_space(text, place + 1) != len(text):
        raise ValueError(f"{path} is not JSON: there is more after its list; one object a line is called .jsonl")
    return samples


def _after_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches the empty string as well


def _item(text: str, place: int, where: str) -> tuple[dict[str, Any], int]:
    """Return an item of a list, or an error in its place, and where it ends."""
    try:
        found, end = _STRICT.raw_decode(text, place)
        return _object(found, where), end
    except _UnusableError as error:
        return unreadable("not_json", f"{where} holds {error}"), _LENIENT.raw_decode(text, place)[1]


def _no_list(text: str) -> str:
    """Return what is wrong with a file that does not begin as a list."""
    try:
        found, end = _LENIENT.raw_decode(text, _after_space(text, 0))
    except (json.JSONDecodeError, RecursionError) as error:
        return f"is not JSON: {shortened(error)}"
    more = "; one object a line is called .jsonl" if isinstance(found, dict) and end < len(text.rstrip()) else ""
    return f"holds a {type(found).__name__}, not a list of samples{more}"


def read_json(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Return the samples of JSON and JSONL files, each file opened when it is reached."""
    for file in files:
        check_regular(file)
        if file.suffix == ".json":
            yield from json_list(file)
            continue
        with file.open("rb") as lines:
            yield from (_line(line, f"{file}, line {n}") for n, line in enumerate(lines, start=1) if line.strip())
