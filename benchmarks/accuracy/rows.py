"""Rows on disk: one JSON file each, with right and wrong answers as packed bits, so that methods are compared by question.

A row that is there is not made again; one that failed keeps its error, is shown in the table, and is tried again when asked.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.scenes import TYPES
from benchmarks.accuracy.study import Row

__all__ = ["RESULTS", "Store", "answers_of"]

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"


def revision() -> str:
    """Git revision of the checkout, "-dirty" behind it where files differ; the file REVISION where there is no repository."""
    root = Path(__file__).parents[2]
    if (root / "REVISION").is_file():
        return (root / "REVISION").read_text().strip()
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def answers_of(record: dict[str, Any]) -> np.ndarray:
    """bool [questions] of a record."""
    packed = np.frombuffer(base64.b64decode(record["right"]), np.uint8)
    return np.unpackbits(packed, count=record["questions"]).astype(bool)


class Store:
    """The folder of rows. options: what the command that makes a row again has beside the row."""

    def __init__(self, folder: Path = RESULTS / "rows", options: str = "") -> None:
        self.folder, self.options = folder, options

    def file(self, row: Row) -> Path:
        """Where a row lies."""
        return self.folder / f"{row.name}.json"

    def read(self, row: Row) -> dict[str, Any] | None:
        """The record, or None."""
        file = self.file(row)
        return json.loads(file.read_text()) if file.is_file() else None

    def done(self, row: Row) -> bool:
        """Whether the row is there and did not fail."""
        record = self.read(row)
        return record is not None and "failed" not in record

    def all(self) -> list[dict[str, Any]]:
        """Every record, by name."""
        return [json.loads(file.read_text()) for file in sorted(self.folder.rglob("*.json"))]

    def write(self, row: Row, **entries: Any) -> None:
        """Write the record whole or not at all."""
        from grace_plugin.export.record import environment

        record = {
            "row": row.name, "setting": row.setting, "method": row.method, "seed": row.seed, **entries,
            "environment": environment(), "revision": revision(),
            "command": f"python -m benchmarks.accuracy {row.name} --again{self.options}",
        }  # fmt: skip
        file = self.file(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(file)


def scored(right: np.ndarray, type_: np.ndarray, names: Sequence[str] = TYPES) -> dict[str, Any]:
    """Entries of a record for answers bool [R] to questions of a type, int64 [R], index into `names`."""
    parts = {name: right[type_ == number] for number, name in enumerate(names)}
    by_type = {name: float(part.mean()) for name, part in parts.items() if len(part)}
    return {
        "questions": len(right), "accuracy": float(right.mean()), "by_type": by_type,
        "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
    }  # fmt: skip
