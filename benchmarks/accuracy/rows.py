"""Store the rows of a study: one record each, with right and wrong answers as packed bits, to compare methods by question.

A row that is there is not made again; one that failed keeps its error, is shown in the table, and is tried again when asked.
"""

from __future__ import annotations

import base64
import json
import lzma
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.scenes import TYPES
from benchmarks.accuracy.study import Row

__all__ = ["RESULTS", "Store", "answers_of", "read_packed"]

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 24, "lc": 3, "lp": 0, "pb": 0, "nice_len": 273}]


def revision() -> str:
    """Return the git revision, with "-dirty" where files differ, or the content of the file REVISION if there is one."""
    root = Path(__file__).parents[2]
    if (root / "REVISION").is_file():
        return (root / "REVISION").read_text().strip()
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def answers_of(record: dict[str, Any]) -> np.ndarray:
    """Return which answers of a record are correct, bool [questions]."""
    packed = np.frombuffer(base64.b64decode(record["right"]), np.uint8)
    return np.unpackbits(packed, count=record["questions"]).astype(bool)


def read_packed(file: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a packed file by row; empty when there is no such file.

    A packed file is xz-compressed JSON lines, one record a line, in the order that `sort_key` gives.
    """
    return _read_packed(file, file.stat().st_mtime_ns) if file.is_file() else {}


@lru_cache(maxsize=4)
def _read_packed(file: Path, _changed: int) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in lzma.decompress(file.read_bytes()).splitlines()]
    return {record["row"]: record for record in records}


def sort_key(row: str) -> tuple[str, ...]:
    """Return the key by which rows are listed: that of their files in a sorted listing, as earlier tables were."""
    return Path(f"{row}.json").parts


class Store:
    """Records of a study: those packed into FOLDER.jsonl.xz, and one JSON file in FOLDER for each row made since.

    A run writes one file for each row, because several processes write at once and a row must survive the end of its process.
    `pack` moves them into the packed file, which is what the repository keeps.

    Args:
        folder: where new rows are written.
        options: what the recorded command that makes a row again adds to the name of the row.
    """

    def __init__(self, folder: Path = RESULTS / "rows", options: str = "") -> None:
        self.folder, self.options = folder, options

    @property
    def packed(self) -> Path:
        """The file of the packed records."""
        return self.folder.with_name(f"{self.folder.name}.jsonl.xz")

    def file(self, row: Row) -> Path:
        """Where a new record is written."""
        return self.folder / f"{row.name}.json"

    def read(self, row: Row) -> dict[str, Any] | None:
        """Return the record of a row, or None."""
        file = self.file(row)
        return json.loads(file.read_text()) if file.is_file() else read_packed(self.packed).get(row.name)

    def done(self, row: Row) -> bool:
        """Return whether the row was made and did not fail."""
        record = self.read(row)
        return record is not None and "failed" not in record

    def all(self) -> list[dict[str, Any]]:
        """Return every record, by name; a new file replaces the packed record of its row."""
        new = [json.loads(file.read_text()) for file in self.folder.rglob("*.json")]
        records = read_packed(self.packed) | {record["row"]: record for record in new}
        return [records[row] for row in sorted(records, key=sort_key)]

    def write(self, row: Row, **entries: Any) -> None:
        """Write the record whole or not at all."""
        from grace_plugin.export.record import environment

        record = {
            "row": row.name,
            "setting": row.setting,
            "method": row.method,
            "seed": row.seed,
            **entries,
            "environment": environment(),
            "revision": revision(),
            "command": f"python -m benchmarks.accuracy {row.name} --again{self.options}",
        }
        self.put(row, record)

    def put(self, row: Row, record: dict[str, Any]) -> None:
        """Write a record as it is."""
        file = self.file(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(file)

    def pack(self) -> int:
        """Move all records into the packed file and remove the folder; return their number. No other process may be writing."""
        records = self.all()
        text = "".join(json.dumps(record) + "\n" for record in records)
        part = self.packed.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        # The filters are named, so that the bytes do not depend on what a preset means to the installed liblzma.
        part.write_bytes(lzma.compress(text.encode(), filters=FILTERS))
        part.replace(self.packed)
        shutil.rmtree(self.folder, ignore_errors=True)
        return len(records)


def scored(right: np.ndarray, type_: np.ndarray, names: Sequence[str] = TYPES) -> dict[str, Any]:
    """Entries of a record for answers bool [R] to questions of a type, int64 [R], index into `names`."""
    parts = {name: right[type_ == number] for number, name in enumerate(names)}
    by_type = {name: float(part.mean()) for name, part in parts.items() if len(part)}
    return {
        "questions": len(right),
        "accuracy": float(right.mean()),
        "by_type": by_type,
        "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
    }
