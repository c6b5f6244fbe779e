"""Every row of a dataset looked at once, in worker processes, and remembered on disk.

The index is one JSON line per row, in order, appended in chunks: a scan that was stopped goes on behind the last whole
line, and a scan that is complete is only read. Its name is a hash of the dataset's fingerprint and of everything of the
processor that decides tokens, so another model, another template or a changed file starts another index. Pictures that
change without their dataset file are not noticed: remove the index (its path stands in the report) after changing
pictures in place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.measure import Entry, Measure

__all__ = ["cache_folder", "index_file", "scan"]

_CHUNK = 64
_VERSION = 1


def cache_folder() -> Path:
    """Where indexes lie: `$GRACE_CACHE`, or `grace_plugin/index` in the user's cache."""
    if os.environ.get("GRACE_CACHE"):
        return Path(os.environ["GRACE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grace_plugin" / "index"


def index_file(fingerprint: str, collator: ConversationCollator, decode: bool, folder: Path | None = None) -> Path:
    """The index of a dataset for a processor."""
    processor = collator.processor
    parts: list[Any] = [_VERSION, fingerprint, decode, collator.max_pixels, collator.segmenter.template]
    for name in ("image_processor", "video_processor"):
        part = getattr(processor, name, None)
        parts.append(part.to_dict() if part is not None else None)
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # padding and truncation are settings of the last call, not of the tokenizer
        parts.append({k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")})
    else:
        parts.append(sorted(processor.tokenizer.get_vocab().items()))
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return (folder or cache_folder()) / f"{key}.jsonl"


@dataclass
class _Chunks(Dataset[list[Entry]]):
    """The entries of chunk i of the rows behind `start`."""

    rows: Sequence[Any]
    measure: Measure
    start: int

    def __len__(self) -> int:
        return -(-(len(self.rows) - self.start) // _CHUNK)

    def __getitem__(self, chunk: int) -> list[Entry]:
        first = self.start + chunk * _CHUNK
        return [self.measure(self.rows[i], i) for i in range(first, min(first + _CHUNK, len(self.rows)))]


def _quiet_worker(_worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _entries(rows: Sequence[Any], measure: Measure, start: int, workers: int) -> Iterator[list[Entry]]:
    loader = DataLoader(
        _Chunks(rows, measure, start), batch_size=None, shuffle=False, num_workers=workers,
        worker_init_fn=_quiet_worker, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    yield from loader


def _resume(file: Path, rows: int, write: bool) -> list[Entry]:
    """The entries already on disk; a torn last line is cut off, an index of another length is begun anew."""
    if not file.is_file():
        return []
    found, size = [], 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                found.append(Entry(*json.loads(line)))
            except (ValueError, TypeError):
                break
            size += len(line)
    if len(found) > rows:
        found, size = [], 0
    if write:
        os.truncate(file, size)
    return found


def scan(
    rows: Sequence[Any], collator: ConversationCollator, *, workers: int = 0, decode: bool = True, file: Path | None = None,
    write: bool = True, progress: Callable[[int, int], None] | None = None,
) -> list[Entry]:  # fmt: skip
    """Look at every row.

    Args:
        rows: any sequence of rows.
        workers: processes that decode and tokenise; 0 does it here.
        decode: decode every image; False looks at headers only.
        file: the index to go on with and to append to; None keeps nothing.
        write: whether this process appends to the index; one of several should.
        progress: called with (rows done, rows).

    Returns:
        One entry per row, in order.
    """
    entries = _resume(file, len(rows), write) if file is not None else []
    if len(entries) == len(rows):
        return entries
    write = write and file is not None
    if write and file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    for chunk in _entries(rows, Measure(collator, decode), len(entries), workers):
        entries += chunk
        if write and file is not None:
            with file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(list(entry)) + "\n" for entry in chunk)
        if progress is not None:
            progress(len(entries), len(rows))
    return entries
