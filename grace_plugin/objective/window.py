"""The accumulation window of one optimizer step: what is known of it before the first backward pass.

CE is divided by the window's supervised tokens, the gated distillation by its sum of gates, the relation by its countable
images. All three depend only on the data and the teacher, so they are known, over all micro-batches and ranks, before the
student's losses. Kept per micro-batch: positions, targets, the teacher's hidden states there, and the gates, megabytes.
A teacher that shares nothing with the student runs on a stream of its own on CUDA, beside the student's first forward pass.

Legend: B batch, S sequence, N supervised positions, M visual tokens, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.losses.head import teacher_sums
from grace_plugin.losses.relational import countable_images
from grace_plugin.objective.host import Reading
from grace_plugin.recipe import DistillRecipe, RelationalRecipe
from grace_plugin.teacher import Teacher, TeacherStates, supervised_positions
from grace_plugin.vlm import Family, VisualTokens
from grace_plugin.vlm.transfer import single_thread, to_device

__all__ = [
    "AccumulationWindow",
    "MicroBatch",
    "StepRecord",
    "all_reduce_sum",
    "beside",
    "gate_quantiles",
    "labels_of",
    "look",
    "row_numbers",
]


@dataclass(frozen=True)
class StepRecord:
    """Values of one optimizer step over all micro-batches and ranks: losses in nats, host numbers.

    gdkd is the gated mean that the controller reads; tckd and nckd are gated means at temperature T without the factors
    alpha, beta and T^2. images_skipped counts images with fewer than 4 visual tokens or a degenerate centred norm.
    """

    ce: float
    gdkd: float
    tckd: float
    nckd: float
    rcka: float
    tokens: int
    gate_mean: float
    images: int
    images_skipped: int
    samples_without_images: int
    finite: bool


@dataclass
class MicroBatch:
    """What is kept of a micro-batch until its loss is asked for."""

    positions: Tensor  # [N] flat positions in [B * S] whose next token is supervised
    targets: Tensor  # [N]
    visual: VisualTokens
    teacher: TeacherStates | None = None
    gate: Tensor | None = None  # [N]
    known: Tensor | None = None  # [2, N], what the head need not sum again
    host: Mapping[str, Any] | None = None  # the batch in host memory


@dataclass
class AccumulationWindow:
    """Micro-batches still to be used, the divisors and the running sums of one optimizer step."""

    pending: list[MicroBatch] = field(default_factory=list)
    counts: Tensor | None = None  # [4]: tokens, sum of gates, countable images, rows without an image
    sums: Tensor | None = None  # [6]: CE, gated DKD, gated TCKD, gated NCKD, 1 - CKA, skipped images
    reading: Reading | None = None
    stream: torch.cuda.Stream | None = None  # where all of this is still being computed
    measured: bool = False  # `record` was called

    @property
    def unfinished(self) -> bool:
        """Whether a step was begun and its losses were not reduced."""
        return self.counts is not None and not self.measured

    def join(self) -> None:
        """From here on, the current stream may read the window: it waits for the teacher's, the host does not."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.stream = None

    def opened(self) -> tuple[Tensor, Tensor]:
        """counts and sums, which may be read on the current stream.

        Raises:
            RuntimeError: no window was opened for this step.
        """
        if self.counts is None or self.sums is None:
            raise RuntimeError("no window is open; call window() once per optimizer step, before loss()")
        self.join()
        return self.counts, self.sums

    def close(self) -> None:
        """The last forward pass has been queued: send the values to the host behind it, ahead of its backward pass.

        Several ranks add theirs first, in `record`, where every rank takes part.
        """
        if not (dist.is_available() and dist.is_initialized()):
            self.reading = Reading(torch.cat([*reversed(self.opened())]))

    def record(self) -> StepRecord:
        """Means over the window and all ranks; collective and unconditional. The host waits for the values, not for the device.

        Raises:
            RuntimeError: no window was opened for this step.
        """
        counts, sums = self.opened()
        self.measured = True
        all_reduce_sum(sums)
        reading = self.reading or Reading(torch.cat([sums, counts]))
        ce, gdkd, tckd, nckd, rcka, skipped, tokens, gates, images, bare = reading.numbers()
        per_token, per_image = 1.0 / max(tokens, 1.0), 1.0 / max(images, 1.0)
        per_gate = 1.0 / gates if gates > 0 else 0.0
        return StepRecord(
            ce=ce * per_token,
            gdkd=gdkd * per_gate,
            tckd=tckd * per_gate,
            nckd=nckd * per_gate,
            rcka=rcka * per_image,
            tokens=int(tokens),
            gate_mean=gates * per_token,
            images=int(images),
            images_skipped=int(skipped),
            samples_without_images=int(bare),
            finite=all(abs(value) < float("inf") for value in (ce, gdkd, rcka)),
        )


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(
    teacher: Teacher | None, device: torch.device, batches: Sequence[Mapping[str, Any]]
) -> torch.cuda.Stream | None:
    """A stream behind all that is queued now, for a teacher that may run beside the student; None has it run in turn.

    What is allocated there is given out again there alone, behind another call of this: by then the student has read it.
    Batches, of another stream, may be dropped at any time: their memory is not given out while they are read here.
    """
    if teacher is None or not teacher.side_stream or device.type != "cuda":
        return None
    stream = _stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    for value in (value for batch in batches for value in batch.values()):
        if isinstance(value, Tensor) and value.device == stream.device:
            value.record_stream(stream)
    return stream


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum over the ranks in place; every rank takes part, whatever it holds."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)


def gate_quantiles(gates: Tensor | None) -> dict[str, float]:
    """5th, 50th and 95th percentile of gates [N], by name; empty without any."""
    if gates is None or gates.numel() == 0:
        return {}
    levels = torch.tensor([0.05, 0.5, 0.95], device=gates.device, dtype=gates.dtype)
    return dict(zip(("gate_q05", "gate_q50", "gate_q95"), torch.quantile(gates, levels).tolist(), strict=True))


def labels_of(batch: Mapping[str, Any], family: Family, config: Any) -> Tensor:
    """Labels [B, S] of a batch; a batch without any supervises every text token the model reads (calibration text)."""
    if batch.get("labels") is not None:
        return batch["labels"]
    labels = batch["input_ids"].clone()
    if batch.get("attention_mask") is not None:
        labels[batch["attention_mask"] == 0] = IGNORE_INDEX
    for token_id in family.token_ids(config).values():
        labels[labels == token_id] = IGNORE_INDEX
    return labels


def row_numbers(batch: Mapping[str, Any]) -> Tensor:
    """int64 [B * S]: which row of data a token belongs to; of packed rows, one begins wherever positions begin anew."""
    ids = batch["input_ids"]
    if batch.get("attention_mask") is None and batch.get("position_ids") is not None:
        return (batch["position_ids"] == 0).flatten().cumsum(0) - 1
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])


def look(
    batch: Mapping[str, Any],
    host: Mapping[str, Any],
    *,
    family: Family,
    config: Any,
    vocabulary: int,
    teacher: Teacher | None,
    distill: DistillRecipe,
    relational: RelationalRecipe,
    device: torch.device,
) -> tuple[MicroBatch, Tensor]:
    """Find a micro-batch's supervised and visual positions, run the teacher on it, and count [4] for the divisors.

    host: the same batch where it is looked at; in host memory, nothing is read back from the device.

    Raises:
        ValueError: visual tokens that do not fit the family, or a label outside the shared vocabulary.
    """
    with single_thread(device):
        labels = labels_of(host, family, config)
        positions = supervised_positions(labels)
        targets = labels.flatten()[positions + 1]
        if targets.numel() and int(targets.max()) >= vocabulary:
            raise ValueError(
                f"label {int(targets.max())} lies outside the {vocabulary} token ids that teacher and student share; "
                "the data was tokenised with another tokenizer, or the row uses a token only one side knows"
            )
        seen = family.visual_tokens(config, host)
        row = row_numbers(host)
        bare = torch.zeros(row.shape, device=row.device)  # by row; there are fewer rows
        bare.index_fill_(0, row[positions], 1.0)
        bare = bare.index_fill_(0, row[seen.index], 0.0).sum()  # a row of which nothing is learned fills a place
    visual = VisualTokens(to_device(seen.index, device), seen.sizes)
    item = MicroBatch(to_device(positions, device), to_device(targets, device), visual, host=host)
    counts = torch.zeros(4, dtype=torch.float32, device=device)
    counts[0].fill_(positions.numel())  # assigned, a number would be copied from the host
    counts[3] = to_device(bare, device)
    if teacher is not None:
        item.teacher = teacher.states(batch, item.positions, visual, host)
        if distill.enabled:
            weight, bias = teacher.head()
            final, sharpness = item.teacher.final, distill.gate_sharpness
            item.gate, _, item.known = teacher_sums(
                final, weight, bias, item.targets, vocabulary=vocabulary, sharpness=sharpness,
                temperature=distill.temperature, chunk=distill.chunk, softcap=teacher.softcap,
            )  # fmt: skip
            counts[1] = item.gate.sum()
        if relational.enabled:
            counts[2] = countable_images(item.teacher.visual, visual.sizes).sum()
    return item, counts
