"""Where rows come from: JSON, JSONL and parquet files, folders of them, saved datasets, the hub, and mixes.

Rows are in the messages format or in the LLaVA format. Image paths are relative to the image folder if one is given, else
to the file's folder. Nothing is decoded here, and a row that cannot be read keeps its place as a fault, to be counted
where rows are looked at: a broken line does not shift the others. JSONL files are read line by line, so their size does
not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grace_plugin.data.faults import unreadable
from grace_plugin.data.mix import Rows, RowSet, read_mix

__all__ = ["load_rows", "stream_rows"]

FILES = (".json", ".jsonl", ".parquet")


def load_rows(source: str, images: str | None = None) -> Rows:
    """Rows of a dataset, to be looked at by `prepare`.

    Args:
        source: `rows.json`, `rows.jsonl`, `rows.parquet`, a folder of such files, a folder written by
            `datasets.save_to_disk`, a mix (`mix.yaml`, see `grace_plugin.data.mix`), or `hub-id[:split]`.
        images: folder that image and video paths are relative to; by default the file's own.

    Raises:
        ValueError: nothing readable there.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        sets = [(entry, load_rows(entry.path, entry.images)) for entry in read_mix(path)]
        return Rows(
            RowSet(entry.name, rows, weight=entry.weight, cap=entry.cap, seed=entry.seed, fingerprint=rows.fingerprint)
            for entry, rows in sets
        )
    if path.suffix in FILES:
        if not path.is_file():
            raise ValueError(f"no dataset file at {path}")
        return Rows([_file(path, images)])
    if path.is_dir() and not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        files = sorted(file for file in path.iterdir() if file.suffix in FILES)
        if files:
            return Rows(_file(file, images) for file in files)
    dataset = _dataset(source)
    fingerprint = getattr(dataset, "_fingerprint", None)
    return Rows([RowSet(path.name, _undecoded(dataset), fingerprint=fingerprint, folder=_folder(images))])


def stream_rows(source: str, images: str | None = None) -> Any:
    """The rows of a JSONL or parquet file, a folder of them or a hub dataset as a `datasets.IterableDataset`.

    Raises:
        ValueError: nothing readable there.
    """
    import datasets

    path, name, split = Path(source), *_split_of(source)
    kind, files = _streamable(path)
    try:
        if kind:
            found = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        else:
            found = datasets.load_dataset(name, split=split, streaming=True)
    except (FileNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"cannot stream {source!r}: {error}. {_WAYS_OUT}") from error
    folder = _folder(images) or (path.parent if path.is_file() else path if path.is_dir() else None)
    return _undecoded(found).map(_Resolve(folder)) if folder else _undecoded(found)


_WAYS_OUT = "Give a .json or .jsonl file, a .parquet file, a folder of these, a saved dataset, a mix, or hub-id[:split]"


class _Resolve:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return resolve(row, self.folder)


def _streamable(path: Path) -> tuple[str | None, list[str]]:
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    for suffix, kind in ((".jsonl", "json"), (".json", "json"), (".parquet", "parquet")):
        found = [str(file) for file in files if file.suffix == suffix]
        if found:
            return kind, found
    return None, []


def _folder(images: str | None) -> Path | None:
    if images is not None and not Path(images).is_dir():
        raise ValueError(f"no image folder at {images}")
    return Path(images) if images is not None else None


def _split_of(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return name, split or "train"


def _file(path: Path, images: str | None) -> RowSet:
    folder = _folder(images) or path.parent
    stat = path.stat()
    mark = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {folder.resolve()}".encode()).hexdigest()
    rows: Any
    if path.suffix == ".parquet":
        import datasets

        try:
            rows = _undecoded(datasets.Dataset.from_parquet(str(path)))
        except Exception as error:
            raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    else:
        rows = JsonLines(path) if path.suffix == ".jsonl" else _json(path)
    return RowSet(path.name, rows, fingerprint=mark, folder=folder)


def _dataset(source: str) -> Any:
    import datasets

    path = Path(source)
    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            found = datasets.load_from_disk(str(path))
            return found["train"] if isinstance(found, datasets.DatasetDict) else found
        name, split = _split_of(source)
        return datasets.load_dataset(name, split=split)
    except (FileNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"cannot read a dataset from {source!r}: {error}. {_WAYS_OUT}") from error


def _undecoded(dataset: Any) -> Any:
    """The dataset with its image and video columns left as files or bytes, so that they are decoded where rows are used."""
    import datasets

    for column, feature in (dataset.features or {}).items():
        for kind in (datasets.Image, datasets.Video):
            if isinstance(feature, kind):
                dataset = dataset.cast_column(column, kind(decode=False))
            elif isinstance(getattr(feature, "feature", None), kind):
                dataset = dataset.cast_column(column, datasets.List(kind(decode=False)))
    return dataset


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
        where = f"{self.path}, line {self.numbers[index]}"
        try:
            return _object(json.loads(line.decode("utf-8")), where)
        except UnicodeDecodeError as error:
            return unreadable("invalid_utf8", f"{where} is not valid UTF-8 at byte {error.start}; mend the file")
        except (json.JSONDecodeError, RecursionError) as error:
            return unreadable("not_json", f"{where} is not JSON: {error}")


def _object(row: Any, where: str) -> dict[str, Any]:
    return row if isinstance(row, dict) else unreadable("not_json", f"{where} is a {type(row).__name__}, not an object")


def _json(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON list; bytes that are not UTF-8 are kept as lone surrogates, for `check_row` to find in their row."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8", errors="surrogateescape"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, not a list of rows")
    return [_object(row, f"{path}, row {number}") for number, row in enumerate(rows)]


def resolve(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row with its image and video paths, at any depth of list, put behind `folder`; web addresses are no paths."""

    def join(value: Any) -> Any:
        if isinstance(value, str):
            return str(folder / value)
        if isinstance(value, (list, tuple)):
            return [join(item) for item in value]
        if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
            return {**value, "path": str(folder / value["path"])}
        return value

    keys = [key for key in ("image", "images", "video", "videos") if row.get(key)]
    return {**row, **{key: join(row[key]) for key in keys}}
