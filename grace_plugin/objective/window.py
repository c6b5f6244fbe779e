"""The accumulation window of one optimizer step: its micro-batches, and the named sums and counts of all loss terms.

Losses are sums over the window divided by counts over the window: CE by supervised tokens, distillation by the sum of gates,
the relational term by countable images. Counts depend on data and teacher alone, so they are known, over all micro-batches and
ranks, before the student's first forward pass. All counts are reduced in one collective, and so are all sums.

Legend: B batch, S sequence, N supervised positions, M visual tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grace_plugin.objective.async_copy import AsyncHostCopy
from grace_plugin.teacher import Teacher, TeacherStates
from grace_plugin.vlm import VisualTokens

__all__ = ["AccumulationWindow", "MicroBatch", "NamedSums", "StepRecord", "teacher_stream"]


class NamedSums:
    """Named float32 sums on one device, stored in one tensor so that one collective reduces all of them."""

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.values = torch.zeros(len(self.names), dtype=torch.float32, device=device)
        self._views = dict(zip(self.names, self.values.unbind(), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """Return the running sum of that name, a 0-dimensional view."""
        return self._views[name]

    def add(self, **amounts: Tensor | float) -> None:
        """Add detached amounts (0-dimensional tensors on the same device, or numbers) to the sums of their names."""
        for name, amount in amounts.items():
            # `view[...] = number` would copy the number from the host, which stops the device; add_ passes it to the kernel
            self._views[name].add_(amount.detach().float() if isinstance(amount, Tensor) else amount)

    def all_reduce(self) -> None:
        """Sum over the ranks in place. Collective: every rank takes part, whatever it holds."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.values)


@dataclass
class MicroBatch:
    """What is kept of a micro-batch from `begin_step` to its loss."""

    positions: Tensor  # int64 [N], flat positions in [B * S] whose next token is supervised
    targets: Tensor  # int64 [N]
    visual: VisualTokens
    # the batch in host memory, or the batch itself where it is not there
    host: Mapping[str, Any]
    teacher: TeacherStates | None = None
    # by term name: what its `prepare` keeps for its `loss`
    prepared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """Values of one optimizer step over all micro-batches and ranks, as host numbers.

    Attributes:
        metrics: by the keys of the log; losses in nats where they are entropies.
        finite: whether every sum of every term is finite.
    """

    metrics: Mapping[str, float]
    finite: bool

    ce = property(lambda self: self.metrics["loss_ce"])
    gdkd = property(lambda self: self.metrics["loss_gdkd"])
    tckd = property(lambda self: self.metrics["loss_tckd"])
    nckd = property(lambda self: self.metrics["loss_nckd"])
    rcka = property(lambda self: self.metrics["loss_rcka"])
    gate_mean = property(lambda self: self.metrics["gate_mean"])
    tokens = property(lambda self: self.metrics["supervised_tokens"])
    images = property(lambda self: self.metrics["images"])
    images_skipped = property(lambda self: self.metrics["images_skipped"])
    samples_without_images = property(lambda self: self.metrics["samples_without_images"])


@dataclass
class AccumulationWindow:
    """The micro-batches of one optimizer step that have had no loss yet, and the sums of the step."""

    counts: NamedSums
    sums: NamedSums
    # where the counts are still being computed
    stream: torch.cuda.Stream | None = None
    pending: deque[MicroBatch] = field(default_factory=deque)
    reduced: bool = False
    _copy: AsyncHostCopy | None = None

    def join(self) -> None:
        """Have the current stream wait for the side stream; the host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.stream = None

    def copy_to_host(self) -> None:
        """Queue the copy of the values after the last forward pass and before its backward pass.

        With several ranks it is queued in `reduce`, after the collective, which every rank enters whatever its data.
        """
        if not (dist.is_available() and dist.is_initialized()):
            self._copy = AsyncHostCopy(torch.cat([self.sums.values, self.counts.values]))

    def reduce(self) -> dict[str, float]:
        """Return all sums and counts over micro-batches and ranks, by name. Collective and unconditional."""
        self.join()
        self.reduced = True
        self.sums.all_reduce()
        copy = self._copy or AsyncHostCopy(torch.cat([self.sums.values, self.counts.values]))
        return dict(zip((*self.sums.names, *self.counts.names), copy.tolist(), strict=True))

    def is_finite(self, totals: Mapping[str, float]) -> bool:
        """Whether all sums among the totals of `reduce` are finite."""
        return all(math.isfinite(totals[name]) for name in self.sums.names)


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def teacher_stream(
    teacher: Teacher | None, device: torch.device, batches: Sequence[Mapping[str, Any]]
) -> torch.cuda.Stream | None:
    """Return the side stream for a teacher that may run while the student does; None to run it on the current stream.

    The stream waits for all work that is queued now. Memory allocated on it is reused on it alone, after another call of this
    function, when the student has read it.
    """
    if teacher is None or not teacher.side_stream or device.type != "cuda":
        return None
    stream = _stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    for value in (value for batch in batches for value in batch.values()):
        if isinstance(value, Tensor) and value.device == stream.device:
            # batches were allocated on another stream, which would reuse their memory as soon as the caller drops them
            value.record_stream(stream)
    return stream
