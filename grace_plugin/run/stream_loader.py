"""Batches of a stream for the Trainer: each process reads its own samples, and all of them make the same steps.

Samples are assigned to ranks where they are read (`grace_plugin.data.StreamedSamples`), so ranks drop different samples and end
at different times. Before every accumulation window the ranks agree, in one collective that each takes part in: how many
micro-batches the fullest rank has, and whether one of them failed. The window is that long on all; a rank with fewer adds
micro-batches of text without supervised tokens, which add 0 to every sum. An epoch ends when no rank has a sample left, so each
usable sample is seen once per epoch, for any number of processes.

A resume state holds the epoch of the stream and the windows read of it; a resumed run reads the samples up to there again and
drops them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from grace_plugin.data import ConversationCollator, StreamedSamples
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.data.workers import bounded
from grace_plugin.digest import tensor_digest, value_digest
from grace_plugin.run.outputs import SideOutput

__all__ = ["StreamLoader", "worker_seconds"]

_FILLER = {"messages": [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]}


def worker_seconds(arguments: Any) -> float:
    """Return the longest wait for a loader's worker: that for a collective (`ddp_timeout`), 0 without workers."""
    return float(arguments.ddp_timeout) if arguments.dataloader_num_workers else 0.0


def _mark(batch: dict[str, Any]) -> list[Any]:
    """Return what tells a batch from another: tokens and shapes by their content, pixels by the sum of their bits."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        # a SHA-256 of the pixels would take as long as a step of a small model
        [name, list(value.shape), int(value.reshape(-1).view(bits[value.element_size()]).sum())]
        if value.is_floating_point()
        else [name, tensor_digest(value)]
        for name, value in sorted(batch.items())
        if isinstance(value, Tensor)
    ]


class StreamLoader:
    """Iterable of a rank's batches for an epoch; knows its place in the stream.

    Attributes:
        epoch, windows: the stream's epoch and the accumulation windows read of it, the same on every rank.
        digest: of this rank's batches in the epoch so far, each hashed together with the digest before it.
    """

    def __init__(self, samples: StreamedSamples, collator: ConversationCollator, arguments: Any) -> None:
        self.samples, self.collator, self.arguments = samples, collator, arguments
        self.epoch = self.windows = 0
        self.digest = ""
        self._expected: str | None = None  # the digest of a resume state, until its batches are read again
        # whether a resumed run has read nothing yet after the windows of the earlier run
        self._resumed = False
        self._batches: Iterator[dict[str, Any]] = iter(())

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream and the digest of what was read up to it."""
        return {"epoch": self.epoch, "windows": self.windows, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any], *, compare: bool = True) -> None:
        """Continue at a place in the stream.

        Args:
            state: of rank 0, which writes it.
            compare: whether the first window is refused where the batches before it are not those of the state.
        """
        self.epoch, self.windows = state["epoch"], state["windows"]
        self._expected = state.get("digest") if compare and self.arguments.process_index == 0 else None

    def write_report(self) -> dict[str, Any]:
        """Return the report on the samples of all ranks so far; collective. The first rank writes it."""
        found = self.samples.report(self.arguments.device)
        SideOutput("the report on the data").write(lambda: self.samples.save_report(found))
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._resumed, self._batches = self.windows > 0, self._begin()
        return self._batches

    def _begin(self) -> Iterator[dict[str, Any]]:
        """Return the batches of the epoch after the windows already read."""
        self.samples.set_epoch(self.epoch)
        asked = self.arguments
        batches = bounded(
            DataLoader(
                self.samples,
                batch_size=asked.train_batch_size,
                collate_fn=self.collator,
                drop_last=asked.dataloader_drop_last,
                num_workers=asked.dataloader_num_workers,
                prefetch_factor=asked.dataloader_prefetch_factor,
                pin_memory=asked.dataloader_pin_memory and torch.cuda.is_available(),
                multiprocessing_context=asked.dataloader_multiprocessing_context,
            ),
            worker_seconds(asked),
        )
        self.digest = ""
        for _ in range(self.windows * asked.gradient_accumulation_steps):
            batch = next(batches, None)
            if batch is None:
                break
            self.digest = value_digest([self.digest, _mark(batch)])
        return batches

    def window(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` batches, as many on every rank; [] when the stream has ended on all of them.

        Several ranks make the last window of an epoch full, because the last micro-batch is the one that sums gradients.

        Raises:
            RuntimeError: another rank could not read its samples; that one raises what it met.
            ValueError: the stream of a resumed run gave other samples before its first window.
        """
        found: list[dict[str, Any]] = []
        failure: Exception | None = None
        try:
            self._compare()
            while len(found) < count and (batch := next(self._batches, None)) is not None:
                found.append(batch)
        except Exception as error:
            # raised below, once the other ranks know: they would wait in the collective for this one
            failure = error
        most, failed = self._agreed(len(found), failure is not None)
        if failure is not None:
            raise failure
        if failed is not None:
            raise RuntimeError(f"rank {failed} could not read its samples of the stream; its own message says why")
        if most == 0:
            self.epoch, self.windows, self.digest = self.epoch + 1, 0, ""
            if not self._resumed:
                return []
            # the earlier run had read the epoch to its end
            self._resumed, self._batches = False, self._begin()
            return self.window(count)
        for batch in found:
            self.digest = value_digest([self.digest, _mark(batch)])
        self.windows, self._resumed = self.windows + 1, False
        if self.arguments.world_size > 1:
            found += [self.filler() for _ in range(count - len(found))]
        return found

    def _compare(self) -> None:
        """Refuse a stream whose batches before the place that was resumed from are not those of the earlier run."""
        expected, self._expected = self._expected, None
        if expected is not None and expected != self.digest:
            raise ValueError(
                f"the stream does not give the samples of the run: the first {self.windows} steps of its epoch {self.epoch} "
                "read others before. Resume with the stream as it was, or allow it: --allow-resume-changes dataset"
            )

    def _agreed(self, count: int, failed: bool) -> tuple[int, int | None]:
        """Return the largest count of all ranks, and a rank that failed; collective and unconditional."""
        rank = self.arguments.process_index
        said = torch.tensor([count, rank + 1 if failed else 0], device=self.arguments.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(said, op=dist.ReduceOp.MAX)
        most, who = said.tolist()
        return most, who - 1 if who else None

    def filler(self) -> dict[str, Any]:
        """Return a batch of one short text of which nothing is supervised."""
        batch = self.collator([_FILLER])
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return batch
