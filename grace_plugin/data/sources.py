"""Where rows come from: a JSON or JSONL file, a saved dataset, or a dataset of the hub.

Image paths inside a JSON or JSONL file are relative to the file's folder. Images are opened when a row is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["load_rows"]


def load_rows(source: str) -> Sequence[dict[str, Any]]:
    """Rows in the messages format.

    Args:
        source: `rows.json`, `rows.jsonl`, a folder written by `datasets.save_to_disk`, or `hub-id[:split]`.

    Raises:
        ValueError: nothing readable there; a line that is no JSON is named by its number.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise ValueError(f"no dataset file at {path}")
        rows = _json_lines(path) if path.suffix == ".jsonl" else _json(path)
        return [_relative(row, path.parent) for row in rows]
    import datasets

    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            found = datasets.load_from_disk(str(path))
            return found["train"] if isinstance(found, datasets.DatasetDict) else found
        name, _, split = source.partition(":")
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cannot read a dataset from {source!r}: {error}. Give a .json or .jsonl file, a folder written by "
            "datasets.save_to_disk, or hub-id[:split]"
        ) from error


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, not a list of rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is a {type(row).__name__}, not an object")
    return rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number} is a {type(rows[-1]).__name__}, not an object")
    return rows


def _relative(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    return {**row, "images": [str(folder / image) if isinstance(image, str) else image for image in images]}
