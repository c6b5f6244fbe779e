"""A stream of samples, inspected while it is read.

The first samples decide whether the run starts. After that a sample that cannot be used is dropped, counted and listed, and the
run stops when the share of dropped samples exceeds `max_bad_samples`. Images are decoded here, in the loader's workers.

Samples are assigned to ranks, and those of a rank to its workers, by their place alone. A `datasets.IterableDataset` assigns
whole files where their number allows it and every n-th sample otherwise (`split_dataset_by_node`; shuffle it with a fixed
seed); any other stream is split into every n-th sample. So an epoch has the same samples for every number of processes, each
once. Ranks drop different samples and end at different places; `run/stream_loader.py` makes their steps the same.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.conversation import read_sample
from grace_plugin.data.errors import REASONS, SampleError
from grace_plugin.data.measure import Measure
from grace_plugin.data.prepare import REJECTED, REPORT, BadSamplesError
from grace_plugin.deprecation import renamed_arguments

__all__ = ["StreamedSamples"]

_REASONS = tuple(REASONS)
_WORKERS = 256


def _splits_itself(samples: Any) -> bool:
    """Return whether the stream splits its samples over ranks and workers itself."""
    import datasets

    return isinstance(samples, datasets.IterableDataset)


class StreamedSamples(IterableDataset[Any]):
    """The usable samples of an iterable of samples, their images decoded.

    Args:
        samples: any iterable of samples that can be iterated again, for instance a `datasets.IterableDataset`.
        collator: the run's; its limits decide what is usable.
        folder: where `data_rejected.jsonl` grows; None lists nothing.
        max_bad_samples: largest share of samples that may be dropped.
        first: samples that are inspected before the run, the same ones on every rank.
        rank, world_size: whose samples these are, of how many.

    Attributes:
        inspected, with_media: how many samples were inspected before the run, and how many of them have an image or a video.

    Raises:
        BadSamplesError (a ValueError): too many of the first samples cannot be used.
        ValueError: no samples at all.
    """

    @renamed_arguments(max_bad_rows="max_bad_samples", rows="samples")
    def __init__(
        self,
        samples: Any,
        collator: ConversationCollator,
        *,
        folder: Path | None = None,
        max_bad_samples: float = 0.05,
        first: int = 256,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.collator, self.folder, self.rank, self.world_size = collator, folder, rank, world_size
        self.max_bad_samples, self.first = max_bad_samples, first
        # workers of the loader are processes, so the counts are in shared memory, one line per worker without locks
        self.counts = torch.zeros(_WORKERS, 1 + len(_REASONS), dtype=torch.int64).share_memory_()  # one line per worker
        head = list(itertools.islice(iter(samples), first))
        if not head:
            raise ValueError("the dataset has no samples")
        entries = list(map(Measure(collator), head, range(len(head))))
        errors = [entry for entry in entries if entry.reason]
        self.inspected, self.with_media = len(head), sum(entry.media > 0 for entry in entries if not entry.reason)
        if len(errors) > max_bad_samples * len(head):
            raise BadSamplesError(
                f"{len(errors)} of the stream's first {len(head)} samples cannot be used, above max_bad_samples = "
                f"{max_bad_samples:.1%}. The first: {'; '.join(entry.message for entry in errors[:5])}"
            )
        self.splits_itself = _splits_itself(samples)
        self.samples = (
            split_dataset_by_node(samples, rank, world_size) if self.splits_itself and world_size > 1 else samples
        )

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a stream that shuffles by it."""
        if hasattr(self.samples, "set_epoch"):
            self.samples.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        counts = self.counts[info.id if info is not None else 0]
        measure = Measure(self.collator, decode=False)
        for number, sample in self._own(info):
            counts[0] += 1
            entry = measure(sample, number)
            reason, message = entry.reason, entry.message
            if not reason:
                try:
                    self.collator.check_length(f"sample {number}", entry.tokens)
                    self.collator.check_ids(f"sample {number}", entry.highest)
                    read = read_sample(sample, number, max_pixels=self.collator.max_pixels)
                    yield read.as_sample()
                    continue
                except SampleError as error:
                    reason, message = error.reason, str(error)
            self._drop(counts, number, reason, message)

    def _own(self, info: Any) -> Iterator[tuple[int, Any]]:
        """Return the samples of this worker of this rank, numbered as they were read."""
        if self.splits_itself:
            return enumerate(self.samples)
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        return itertools.islice(
            enumerate(self.samples), self.rank + self.world_size * worker, None, self.world_size * workers
        )

    def _drop(self, counts: torch.Tensor, number: int, reason: str, message: str) -> None:
        counts[1 + _REASONS.index(reason)] += 1
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / self.rejected_file).open("a", encoding="utf-8", errors="backslashreplace") as out:
                out.write(json.dumps({"number": number, "reason": reason, "message": message}) + "\n")
        seen, dropped = int(counts[0]), int(counts[1:].sum())
        if seen >= self.first and dropped > self.max_bad_samples * seen:
            raise BadSamplesError(
                f"{dropped} of {seen} samples of the stream could not be used, above max_bad_samples = "
                f"{self.max_bad_samples:.1%}; the latest: {message}"
            )

    @property
    def rejected_file(self) -> str:
        """The list of dropped samples: `data_rejected.jsonl`, and of another rank than the first with its number."""
        return REJECTED if self.rank == 0 else REJECTED.replace(".jsonl", f".{self.rank}.jsonl")

    def report(self, device: torch.device | None = None) -> dict[str, Any]:
        """Return samples that all ranks read (ahead of the run by what the loader prefetched), and the dropped ones by reason.

        device: where the ranks' counts are summed; every rank of several takes part.
        """
        summed = self.counts.sum(dim=0).to(device or torch.device("cpu"))
        # every rank takes part, also one that dropped nothing: a collective that depends on a local condition hangs the others
        if self.world_size > 1 and dist.is_initialized():
            dist.all_reduce(summed)
        totals = summed.tolist()
        rejected = {reason: n for reason, n in zip(_REASONS, totals[1:], strict=True) if n}
        return {
            "stream": True,
            "samples": totals[0],
            "usable": totals[0] - sum(rejected.values()),
            "rejected": rejected,
            "max_bad_samples": self.max_bad_samples,
        }

    def write_report(self, device: torch.device | None = None) -> dict[str, Any]:
        """Write `report` as `data_report.json`, on the first rank, and return it."""
        found = self.report(device)
        self.save_report(found)
        return found

    def save_report(self, found: dict[str, Any]) -> None:
        """Write what `report` gave, on the first rank."""
        if self.folder is not None and self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / REPORT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
