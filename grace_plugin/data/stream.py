"""A stream of rows: too long or too remote to be looked at before the run, so looked at as it comes.

The first rows decide whether the run starts; from then on a row that cannot be used is dropped, counted and listed, and
the run stops when the share of dropped rows exceeds what is allowed. Images are decoded here, in the loader's workers: a
`datasets.IterableDataset` deals its files to them, of any other stream each takes every n-th row. A stream belongs to one
process: ranks would drop different rows and end at different steps, and the first to end would leave the others waiting, so a
run of several processes is refused.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.conversation import read_row
from grace_plugin.data.faults import REASONS, RowError
from grace_plugin.data.measure import Measure
from grace_plugin.data.prepare import REJECTED, REPORT, BadRowsError

__all__ = ["StreamedRows"]

_REASONS = tuple(REASONS)
_WORKERS = 256


class StreamedRows(IterableDataset[Any]):
    """The usable rows of an iterable of rows, their images decoded.

    Args:
        rows: any iterable of rows that can be iterated again, for instance a `datasets.IterableDataset`.
        collator: the run's; its limits decide what is usable.
        folder: where `data_rejected.jsonl` grows; None lists nothing.
        max_bad_rows: largest share of rows that may be dropped.
        first: rows that are looked at before the run.

    Raises:
        BadRowsError (a ValueError): too many of the first rows cannot be used.
        ValueError: no rows at all.
    """

    def __init__(
        self, rows: Any, collator: ConversationCollator, *, folder: Path | None = None, max_bad_rows: float = 0.05,
        first: int = 256,
    ) -> None:  # fmt: skip
        self.rows, self.collator, self.folder = rows, collator, folder
        self.max_bad_rows, self.first = max_bad_rows, first
        self.counts = torch.zeros(_WORKERS, 1 + len(_REASONS), dtype=torch.int64).share_memory_()  # one line per worker
        head = list(itertools.islice(iter(rows), first))
        if not head:
            raise ValueError("the dataset has no rows")
        faults = [entry for entry in map(Measure(collator), head, range(len(head))) if entry.reason]
        if len(faults) > max_bad_rows * len(head):
            raise BadRowsError(
                f"{len(faults)} of the stream's first {len(head)} rows cannot be used, above max_bad_rows = "
                f"{max_bad_rows:.1%}. The first: {'; '.join(entry.message for entry in faults[:5])}"
            )

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a stream that shuffles by it."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        counts = self.counts[info.id if info is not None else 0]
        measure = Measure(self.collator, decode=False)
        for number, row in self._own(info):
            counts[0] += 1
            entry = measure(row, number)
            reason, message = entry.reason, entry.message
            if not reason:
                try:
                    self.collator.check_length(f"row {number}", entry.tokens)
                    read = read_row(row, number, max_pixels=self.collator.max_pixels)
                    yield {"id": read.name.removeprefix("row "), "messages": list(read.messages),
                           "images": list(read.images), "videos": list(read.videos), "fps": read.fps}  # fmt: skip
                    continue
                except RowError as fault:
                    reason, message = fault.reason, str(fault)
            self._drop(counts, number, reason, message)

    def _own(self, info: Any) -> Iterator[tuple[int, Any]]:
        """The rows of this worker, numbered as they were read."""
        from datasets import IterableDataset as Dealt

        numbered = enumerate(self.rows)
        dealt = info is None or isinstance(self.rows, Dealt)
        return numbered if dealt else itertools.islice(numbered, info.id, None, info.num_workers)

    def _drop(self, counts: torch.Tensor, number: int, reason: str, message: str) -> None:
        counts[1 + _REASONS.index(reason)] += 1
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / REJECTED).open("a", encoding="utf-8", errors="backslashreplace") as out:
                out.write(json.dumps({"number": number, "reason": reason, "message": message}) + "\n")
        seen, dropped = int(counts[0]), int(counts[1:].sum())
        if seen >= self.first and dropped > self.max_bad_rows * seen:
            raise BadRowsError(
                f"{dropped} of {seen} rows of the stream could not be used, above max_bad_rows = {self.max_bad_rows:.1%}; "
                f"the latest: {message}"
            )

    def report(self) -> dict[str, Any]:
        """Rows that were read so far (ahead of the run by what the loader prefetched), and the dropped ones by reason."""
        totals = self.counts.sum(dim=0).tolist()
        rejected = {reason: n for reason, n in zip(_REASONS, totals[1:], strict=True) if n}
        return {"stream": True, "rows": totals[0], "usable": totals[0] - sum(rejected.values()), "rejected": rejected,
                "max_bad_rows": self.max_bad_rows}  # fmt: skip

    def write_report(self) -> dict[str, Any]:
        """Write `report` as `data_report.json` and return it."""
        found = self.report()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / REPORT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found
