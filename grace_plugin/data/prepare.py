"""Inspect all samples of a dataset before a run, drop those that cannot be used, and report them.

`prepare` writes `data_report.json` (counts by reason, lengths in tokens, the first 100 samples that repeat an id with other
content) and `data_rejected.jsonl` (one line per dropped sample: number, set, reason, message). A run does not start if more
than a stated share of the samples was dropped. Streams are inspected while they are read (`stream.py`).
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
from grace_plugin.data.errors import SampleError
from grace_plugin.data.index import index_file, number_of, scan
from grace_plugin.data.measure import Entry
from grace_plugin.data.mix import Samples
from grace_plugin.data.order import shuffled
from grace_plugin.data.shown import shown
from grace_plugin.data.sources import as_samples
from grace_plugin.deprecation import renamed_arguments

__all__ = ["BadSamplesError", "Prepared", "is_scannable", "prepare"]

# refused samples that an error names without writing a file
_SHOWN = 20
# samples with a repeated id that a report lists
_REPEATED = 100
REPORT, REJECTED = "data_report.json", "data_rejected.jsonl"


class BadSamplesError(ValueError):
    """More samples cannot be used than the run allows."""


@dataclass
class Prepared(Sequence[Any]):
    """The samples a run trains on, each as often as its set's weight asks for.

    samples: what was given. numbers: int64 [n], which of them. lengths: int64 [n], their tokens. report: counts and lengths.
    rejected: one object per dropped sample. special_tokens: those that samples may write.
    """

    samples: Sequence[Any]
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
        return self.samples[int(self.numbers[index])]


def is_scannable(dataset: Any) -> bool:
    """Return whether every sample of a dataset can be inspected before a run: samples in files, in a list or in a
    `datasets.Dataset`.

    Samples that are made when asked for (any other sequence) are not: making them all first would take the run's time twice.
    """
    if isinstance(dataset, (Samples, list, tuple)):
        return True
    import datasets

    return isinstance(dataset, datasets.Dataset)


def _duplicates(entries: list[Entry], samples: Sequence[Any]) -> tuple[list[Entry], list[tuple[int, int]]]:
    """Return entries with later samples of the same id and content marked as duplicates, and samples that repeat an id
    otherwise.

    The second is (sample, the first sample of its id), places in `samples`.
    """
    first: dict[tuple[str, str], int] = {}
    marks: dict[str, int] = {}
    repeated, found = [], []
    for number, entry in enumerate(entries):
        if entry.mark and not entry.reason:
            earlier = first.setdefault((entry.mark, entry.digest), number)
            if earlier != number:
                places = number_of(samples, number), number_of(samples, earlier)
                named = f"sample {shown(samples[number]['id'])} (number {places[0]})"
                message = f"{named} repeats sample number {places[1]}; drop one of them"
                entry = entry._replace(reason="duplicate", message=message)
            elif entry.mark in marks:
                repeated.append((number, marks[entry.mark]))
            marks.setdefault(entry.mark, number)
        found.append(entry)
    return found, repeated


def _listed(repeated: list[tuple[int, int]], samples: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the first samples that repeat an id, for the report."""
    return [
        {
            "id": _plain(samples[number]["id"]),
            "number": number_of(samples, number),
            "first": number_of(samples, earlier),
        }
        for number, earlier in repeated[:_REPEATED]
    ]


def _plain(value: Any) -> Any:
    """Return an id as JSON can hold it, cut where it is long."""
    if isinstance(value, str):
        return value if len(value) <= 80 else shown(value)
    return value if isinstance(value, int) and value.bit_length() <= 64 else shown(value)


def _within_limits(entry: Entry, number: int, collator: ConversationCollator) -> Entry:
    """Return the entry, with the reason if its sample is outside the run's own limits, which no index knows."""
    try:
        collator.check_length(f"sample {number}", entry.tokens)
        collator.check_ids(f"sample {number}", entry.highest)
    except SampleError as error:
        return entry._replace(reason=error.reason, message=str(error))
    return entry


def _counted(lines: Iterable[str]) -> dict[str, int]:
    """Return how often each line occurs, most frequent first."""
    return dict(Counter(line for text in lines for line in text.splitlines()).most_common())


def spread(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return smallest, median, 95th percentile, largest, mean and sum of token counts (all 0 for none)."""
    array = np.asarray(values, dtype=np.int64)
    if not array.size:
        return dict.fromkeys(("min", "median", "p95", "max", "mean", "sum"), 0)
    quantiles = np.percentile(array, [0, 50, 95, 100])
    return {
        **dict(zip(("min", "median", "p95", "max"), (float(q) for q in quantiles), strict=True)),
        "mean": round(float(array.mean()), 2),
        "sum": int(array.sum()),
    }


def _set_names(samples: Any) -> tuple[list[str], Callable[[int], int], list[float], list[int]]:
    """Return names, set of a sample, weights and seeds; a plain sequence is one set."""
    if isinstance(samples, Samples):
        return (
            [one.name for one in samples.sets],
            samples.set_of,
            [one.weight for one in samples.sets],
            list(range(len(samples.sets))),
        )
    return ["samples"], lambda _number: 0, [1.0], [0]


def _passes(kept: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Sample numbers of a set as often as its weight asks for."""
    whole, part = int(weight), weight - int(weight)
    # key 2 of the hash, so that the samples drawn for a weight are independent of those kept by a cap with the same seed
    drawn = np.sort(kept[shuffled(len(kept), seed, 2)[: round(part * len(kept))]])
    return np.concatenate([*[kept] * whole, drawn])


def _counted_samples(given: Any) -> Sequence[Any]:
    """Return a dataset that has a length, at least 1."""
    samples = as_samples(given)
    if not hasattr(samples, "__len__"):
        raise ValueError("the dataset is a stream, whose samples cannot be inspected ahead; take a list of them")
    if len(samples) == 0:
        raise ValueError("the dataset has no samples")
    return samples


@renamed_arguments(max_bad_rows="max_bad_samples", rows="samples")
def prepare(
    samples: Sequence[Any],
    collator: ConversationCollator,
    *,
    folder: Path | None = None,
    max_bad_samples: float = 0.05,
    workers: int = 0,
    decode: bool = True,
    cache: Path | None = None,
    write: bool = True,
    allow_empty: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Inspect every sample, report, and keep those that can be used.

    Args:
        samples: a `Samples`, a list or a `datasets.Dataset`, or what `as_samples` makes one of.
        folder: where report and list are written when the dataset is refused for more samples than an error can name; of a
            dataset that is taken, `write_report` writes them.
        max_bad_samples: largest share of samples that may be dropped, 0 for none.
        workers, decode, progress: as for `scan`.
        cache: folder of indexes, by default the user's cache; only samples with a fingerprint are indexed.
        write: whether this process writes; one of several should.
        allow_empty: give back a dataset of which nothing can be used, instead of refusing it.

    Raises:
        BadSamplesError (a ValueError): names counts, the first samples and the files.
        ValueError: no samples at all.
    """
    samples = _counted_samples(samples)
    if not 0.0 <= max_bad_samples <= 1.0:
        raise ValueError(f"max_bad_samples is a share of the samples between 0 and 1, got {max_bad_samples}")
    mark = getattr(samples, "fingerprint" if isinstance(samples, Samples) else "_fingerprint", None)
    file = index_file(mark, collator, decode, cache) if mark is not None else None
    entries = scan(samples, collator, workers=workers, decode=decode, file=file, write=write, progress=progress)
    entries = [
        e if e.reason else _within_limits(e, number_of(samples, number), collator) for number, e in enumerate(entries)
    ]
    entries, repeated = _duplicates(entries, samples)
    names, set_of, weights, seeds = _set_names(samples)
    owner = np.array([set_of(number) for number in range(len(samples))])
    good = np.array([not entry.reason for entry in entries])
    numbers = [_passes(np.flatnonzero(good & (owner == s)), weights[s], seeds[s]) for s in range(len(names))]
    taken = np.concatenate(numbers).astype(np.int64)
    report = {
        **_report(samples, entries, repeated),
        "samples_per_epoch": len(taken),
        "sets": {
            f"{s}:{name}" if names.count(name) > 1 else name: {
                "samples": int((owner == s).sum()),
                "usable": int((good & (owner == s)).sum()),
                "weight": weights[s],
                "samples_per_epoch": len(numbers[s]),
            }
            for s, name in enumerate(names)
        },
        "max_bad_samples": max_bad_samples,
        "index": str(file) if file is not None else None,
    }
    rejected = [
        {"number": number_of(samples, n), "set": names[owner[n]], "reason": e.reason, "message": e.message}
        for n, e in enumerate(entries)
        if e.reason
    ]
    if len(rejected) > max_bad_samples * len(samples) or not (len(taken) or allow_empty):
        listed = folder is not None and len(rejected) > _SHOWN
        if listed and write and folder is not None:
            _write(folder, report, rejected)
        raise BadSamplesError(_refusal(report, rejected, max_bad_samples, folder if listed else None))
    lengths = np.array([entries[n].tokens for n in taken], dtype=np.int64)
    return Prepared(samples, taken, lengths, report, entries, rejected, collator.segmenter.special_tokens)


def _report(samples: Sequence[Any], entries: list[Entry], repeated: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the counts and lengths of all sets together."""
    used = [entry for entry in entries if not entry.reason]
    return {
        "samples": len(samples),
        "usable": len(used),
        "usable_share": round(len(used) / len(samples), 6),
        "rejected": dict(Counter(entry.reason for entry in entries if entry.reason).most_common()),
        "unused_fields": _counted(e.unused for e in used),
        "spelled_special_tokens": _counted(e.spelled for e in used),
        "repeated_ids": len(repeated),
        "repeated": _listed(repeated, samples),
        "samples_without_images": sum(entry.media == 0 for entry in used),
        "images_and_videos": sum(entry.media for entry in used),
        "tokens": spread([e.tokens for e in used]),
        "visual_tokens": spread([e.visual for e in used]),
        "supervised_tokens": spread([e.supervised for e in used]),
    }


def _write(folder: Path, report: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with (folder / REJECTED).open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.writelines(json.dumps(line) + "\n" for line in rejected)


def _refusal(report: dict[str, Any], rejected: list[dict[str, Any]], allowed: float, folder: Path | None) -> str:
    reasons = (
        ", ".join(f"{count} {reason}" for reason, count in report["rejected"].items())
        or "no sample is left to train on"
    )
    first = "; ".join(line["message"] for line in rejected[: 5 if folder is not None else _SHOWN])
    listed = f" All are listed in {folder / REJECTED}." if folder is not None else ""
    return (
        f"{len(rejected)} of {report['samples']} samples cannot be used, {len(rejected) / report['samples']:.1%}, above "
        f"max_bad_samples = {allowed:.1%} ({reasons}). The first: {first}.{listed} Correct or drop them, or "
        "raise max_bad_samples"
    )
