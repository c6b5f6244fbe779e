"""From a dataset to what a run trains on: every row accounted for, the unusable ones listed, too many of them refused.

`prepare` looks at every row (see `index.py`), drops what cannot be used, writes `data_report.json` (counts by reason,
lengths in tokens, the first 100 rows that repeat an id with other content) and `data_rejected.jsonl` (one line per dropped
row: number, set, reason, sentence), and stops the run when more than a stated share was dropped. A stream cannot be looked
at ahead: its first rows decide, and later ones are dropped and counted as they come.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.errors import RowError
from grace_plugin.data.given import as_samples
from grace_plugin.data.index import index_file, number_of, scan
from grace_plugin.data.measure import Entry
from grace_plugin.data.mix import Rows
from grace_plugin.data.order import shuffled
from grace_plugin.data.shown import shown

__all__ = ["BadRowsError", "Prepared", "is_scannable", "prepare"]

_SHOWN = 20  # refused rows that an error names without writing a file
_REPEATED = 100  # rows with a repeated id that a report lists
REPORT, REJECTED = "data_report.json", "data_rejected.jsonl"


class BadRowsError(ValueError):
    """More rows cannot be used than the run allows."""


@dataclass
class Prepared(Sequence[Any]):
    """The rows a run trains on, each as often as its set's weight asks for.

    rows: what was given. numbers: int64 [n], which of them. lengths: int64 [n], their tokens. report: counts and lengths.
    rejected: one object per dropped row. special_tokens: those that samples may write.
    """

    rows: Sequence[Any]
    numbers: np.ndarray
    lengths: np.ndarray
    report: dict[str, Any]
    entries: list[Entry] = field(default_factory=list, repr=False)
    rejected: list[dict[str, Any]] = field(default_factory=list, repr=False)
    special_tokens: tuple[str, ...] = ()

    def write_report(self, folder: Path) -> None:
        """Write `data_report.json` and `data_rejected.jsonl`."""
        _write(folder, self.report, self.rejected)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.rows[int(self.numbers[index])]


def is_scannable(dataset: Any) -> bool:
    """Whether every row of a dataset can be looked at before a run: rows in files, in a list or in a `datasets.Dataset`.

    Rows that are made when asked for (any other sequence) are not: making them all first would take the run's time twice.
    """
    if isinstance(dataset, (Rows, list, tuple)):
        return True
    import datasets

    return isinstance(dataset, datasets.Dataset)


def _duplicates(entries: list[Entry], rows: Sequence[Any]) -> tuple[list[Entry], list[tuple[int, int]]]:
    """Entries with later rows of the same id and content marked as duplicates, and rows that repeat an id otherwise.

    The second is (row, the first row of its id), places in `rows`.
    """
    first: dict[tuple[str, str], int] = {}
    marks: dict[str, int] = {}
    repeated, found = [], []
    for number, entry in enumerate(entries):
        if entry.mark and not entry.reason:
            earlier = first.setdefault((entry.mark, entry.digest), number)
            if earlier != number:
                places = number_of(rows, number), number_of(rows, earlier)
                named = f"row {shown(rows[number]['id'])} (number {places[0]})"
                message = f"{named} repeats row number {places[1]}; drop one of them"
                entry = entry._replace(reason="duplicate", message=message)
            elif entry.mark in marks:
                repeated.append((number, marks[entry.mark]))
            marks.setdefault(entry.mark, number)
        found.append(entry)
    return found, repeated


def _listed(repeated: list[tuple[int, int]], rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The first rows that repeat an id, for the report."""
    return [
        {"id": _plain(rows[number]["id"]), "number": number_of(rows, number), "first": number_of(rows, earlier)}
        for number, earlier in repeated[:_REPEATED]
    ]


def _plain(value: Any) -> Any:
    """An id as JSON can hold it, cut where it is long."""
    if isinstance(value, str):
        return value if len(value) <= 80 else shown(value)
    return value if isinstance(value, int) and value.bit_length() <= 64 else shown(value)


def _within_limits(entry: Entry, number: int, collator: ConversationCollator) -> Entry:
    """The entry, with the reason if its row is outside the run's own limits, which no index knows."""
    try:
        collator.check_length(f"row {number}", entry.tokens)
        collator.check_ids(f"row {number}", entry.highest)
    except RowError as fault:
        return entry._replace(reason=fault.reason, message=str(fault))
    return entry


def _counted(lines: Iterable[str]) -> dict[str, int]:
    """How often each line occurs, most frequent first."""
    return dict(Counter(line for text in lines for line in text.splitlines()).most_common())


def spread(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Smallest, median, 95th percentile, largest, mean and sum of token counts (all 0 for none)."""
    array = np.asarray(values, dtype=np.int64)
    if not array.size:
        return dict.fromkeys(("min", "median", "p95", "max", "mean", "sum"), 0)
    quantiles = np.percentile(array, [0, 50, 95, 100])
    return {
        **dict(zip(("min", "median", "p95", "max"), (float(q) for q in quantiles), strict=True)),
        "mean": round(float(array.mean()), 2), "sum": int(array.sum()),
    }  # fmt: skip


def _set_names(rows: Any) -> tuple[list[str], Callable[[int], int], list[float], list[int]]:
    """Names, set of a row, weights and seeds; a plain sequence is one set."""
    if isinstance(rows, Rows):
        return (
            [one.name for one in rows.sets],
            rows.set_of,
            [one.weight for one in rows.sets],
            list(range(len(rows.sets))),
        )
    return ["rows"], lambda _number: 0, [1.0], [0]


def _passes(kept: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Row numbers of a set as often as its weight asks for."""
    whole, part = int(weight), weight - int(weight)
    drawn = np.sort(kept[shuffled(len(kept), seed, 2)[: round(part * len(kept))]])
    return np.concatenate([*[kept] * whole, drawn])


def _counted_rows(given: Any) -> Sequence[Any]:
    """A dataset that has a length, at least 1."""
    rows = as_samples(given)
    if not hasattr(rows, "__len__"):
        raise ValueError("the dataset is a stream, whose samples cannot be inspected ahead; take a list of them")
    if len(rows) == 0:
        raise ValueError("the dataset has no rows")
    return rows


def prepare(
    rows: Sequence[Any], collator: ConversationCollator, *, folder: Path | None = None, max_bad_rows: float = 0.05,
    workers: int = 0, decode: bool = True, cache: Path | None = None, write: bool = True, allow_empty: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:  # fmt: skip
    """Look at every row, report, and keep those that can be used.

    Args:
        rows: a `Rows`, a list or a `datasets.Dataset`, or what `as_samples` makes one of.
        folder: where report and list are written when the dataset is refused for more rows than an error can name; of a
            dataset that is taken, `write_report` writes them.
        max_bad_rows: largest share of rows that may be dropped, 0 for none.
        workers, decode, progress: as for `scan`.
        cache: folder of indexes, by default the user's cache; only rows with a fingerprint are indexed.
        write: whether this process writes; one of several should.
        allow_empty: give back a dataset of which nothing can be used, instead of refusing it.

    Raises:
        BadRowsError (a ValueError): names counts, the first rows and the files.
        ValueError: no rows at all.
    """
    rows = _counted_rows(rows)
    if not 0.0 <= max_bad_rows <= 1.0:
        raise ValueError(f"max_bad_rows is a share of the rows between 0 and 1, got {max_bad_rows}")
    mark = getattr(rows, "fingerprint", None) if isinstance(rows, Rows) else getattr(rows, "_fingerprint", None)
    file = index_file(mark, collator, decode, cache) if mark is not None else None
    entries = scan(rows, collator, workers=workers, decode=decode, file=file, write=write, progress=progress)
    entries = [
        e if e.reason else _within_limits(e, number_of(rows, number), collator) for number, e in enumerate(entries)
    ]
    entries, repeated = _duplicates(entries, rows)
    names, set_of, weights, seeds = _set_names(rows)
    owner = np.array([set_of(number) for number in range(len(rows))])
    good = np.array([not entry.reason for entry in entries])
    numbers = [_passes(np.flatnonzero(good & (owner == s)), weights[s], seeds[s]) for s in range(len(names))]
    taken = np.concatenate(numbers).astype(np.int64)
    used = [entry for entry in entries if not entry.reason]
    report = {
        "rows": len(rows), "usable": len(used), "usable_share": round(len(used) / len(rows), 6),
        "rejected": dict(Counter(entry.reason for entry in entries if entry.reason).most_common()),
        "unused_fields": _counted(e.unused for e in used), "spelled_special_tokens": _counted(e.spelled for e in used),
        "repeated_ids": len(repeated), "repeated": _listed(repeated, rows),
        "rows_without_images": sum(entry.pictures == 0 for entry in used),
        "images_and_videos": sum(entry.pictures for entry in used), "rows_per_epoch": len(taken),
        "sets": {
            f"{s}:{name}" if names.count(name) > 1 else name: {
                "rows": int((owner == s).sum()), "usable": int((good & (owner == s)).sum()), "weight": weights[s],
                "rows_per_epoch": len(numbers[s]),
            }
            for s, name in enumerate(names)
        },
        "tokens": spread([e.tokens for e in used]), "visual_tokens": spread([e.visual for e in used]),
        "supervised_tokens": spread([e.supervised for e in used]), "max_bad_rows": max_bad_rows,
        "index": str(file) if file is not None else None,
    }  # fmt: skip
    rejected = [
        {"number": number_of(rows, n), "set": names[owner[n]], "reason": e.reason, "message": e.message}
        for n, e in enumerate(entries)
        if e.reason
    ]
    if len(rejected) > max_bad_rows * len(rows) or not (len(taken) or allow_empty):
        listed = folder is not None and len(rejected) > _SHOWN
        if listed and write and folder is not None:
            _write(folder, report, rejected)
        raise BadRowsError(_refusal(report, rejected, max_bad_rows, folder if listed else None))
    lengths = np.array([entries[n].tokens for n in taken], dtype=np.int64)
    return Prepared(rows, taken, lengths, report, entries, rejected, collator.segmenter.special_tokens)


def _write(folder: Path, report: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with (folder / REJECTED).open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.writelines(json.dumps(line) + "\n" for line in rejected)


def _refusal(report: dict[str, Any], rejected: list[dict[str, Any]], allowed: float, folder: Path | None) -> str:
    reasons = (
        ", ".join(f"{count} {reason}" for reason, count in report["rejected"].items()) or "no row is left to train on"
    )
    first = "; ".join(line["message"] for line in rejected[: 5 if folder is not None else _SHOWN])
    listed = f" All are listed in {folder / REJECTED}." if folder is not None else ""
    return (
        f"{len(rejected)} of {report['rows']} rows cannot be used, {len(rejected) / report['rows']:.1%}, above max_bad_rows = "
        f"{allowed:.1%} ({reasons}). The first: {first}.{listed} Mend or drop them, or raise max_bad_rows"
    )
