"""Run the teacher once over a dataset and write the hidden states that training reads to a cache.

Before the teacher is loaded all samples are checked as for training, the number of bytes is computed exactly from the counts of
supervised positions and visual tokens, and the free space of the disk is compared with it. The longest samples run first, so
that memory runs out at once or never; a few timed batches predict how long the rest will take.

Samples that the folder holds are not run again: a stopped build continues, a longer dataset adds its samples, and the samples
of a damaged file are run again. The processor must be deterministic: random augmentation goes unnoticed, and the states would
belong to other pixels than the student's.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from grace_plugin.data import (
    SAMPLE_KEY,
    ConversationCollator,
    Prepared,
    as_samples,
    is_scannable,
    prepare,
    processor_settings,
)
from grace_plugin.data.media import DEFAULT_MAX_PIXELS
from grace_plugin.deprecation import renamed_arguments
from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher.base import MISSING, supervised_positions
from grace_plugin.teacher.cached import sample_keys, teacher_identity
from grace_plugin.teacher.checkpoint import UnloadedCheckpoint, open_checkpoint
from grace_plugin.teacher.open import check_pair
from grace_plugin.teacher.resident import ResidentTeacher, load_teacher
from grace_plugin.teacher.store import (
    ShardWriter,
    StateStore,
    build_lock,
    check_folder,
    drop_damaged,
    holds_states,
    read_store,
    restore_store,
    write_store,
)
from grace_plugin.vlm import Family, check_depth, context_length, family_of
from grace_plugin.vlm.loading import check_checkpoint, check_finite

__all__ = ["CachePlan", "build_cache"]

TIMED_BATCHES = 4  # the first is a warm-up, the others predict the time of the rest
_HEADER_BYTES = 1024  # upper bound of what a sample adds to a file in addition to its states


@dataclass(frozen=True)
class CachePlan:
    """What a build will do, and what it has done.

    samples: distinct samples of the dataset.
    stored: how many of them are in the folder.
    total_bytes, bytes: of the states of all samples, and of those still to run.
    at_most: whether the bytes are an upper bound, because placeholders of the family may not be visual tokens.
    tokens: to run.
    dropped: names of damaged files that were removed.
    seconds: predicted time of what is to run, None until batches were timed.
    """

    samples: int
    stored: int
    total_bytes: int
    bytes: int
    at_most: bool
    tokens: int
    dropped: tuple[str, ...] = ()
    seconds: float | None = None


def plan_cache(
    samples: Prepared, folder: Path, width: int, visual: bool, family: Family
) -> tuple[CachePlan, list[int]]:
    """Return the plan and the numbers of the samples to run, the longest first. `width`: bytes of a token's state."""
    store = StateStore(folder) if read_store(folder) is not None else ()
    keys = {
        key: number
        for number, key in sample_keys(samples.samples, sorted(set(samples.numbers.tolist())), samples.special_tokens)
    }
    entries = samples.entries
    sizes = {n: width * (entries[n].supervised + (entries[n].visual if visual else 0)) for n in keys.values()}
    # The longest first: a batch that does not fit fails at once instead of after hours.
    missing = sorted((n for key, n in keys.items() if key not in store), key=lambda n: -entries[n].tokens)
    plan = CachePlan(
        samples=len(keys),
        stored=len(keys) - len(missing),
        total_bytes=sum(sizes.values()),
        bytes=sum(sizes[n] for n in missing),
        at_most=visual and type(family).true_tokens is not Family.true_tokens,
        tokens=sum(entries[n].tokens for n in missing),
    )
    return plan, missing


def check_disk(folder: Path, plan: CachePlan) -> None:
    """Refuse a build that does not fit on the disk.

    Raises:
        ValueError: names the bytes needed and the bytes free.
    """
    wanted = plan.bytes + _HEADER_BYTES * (plan.samples - plan.stored)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise ValueError(
            f"the states take {wanted:,} bytes and the disk of {folder} has {free:,} free; give another folder, or "
            "fewer samples"
        )


@renamed_arguments(max_bad_rows="max_bad_samples")
def build_cache(
    model: str | os.PathLike[str],
    *,
    teacher: TeacherRecipe,
    dataset: Any,
    output_dir: str | os.PathLike[str],
    processor: Any = None,
    max_length: int | None = None,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    max_bad_samples: float = 0.05,
    special_tokens: Sequence[str] = (),
    batch_size: int = 8,
    workers: int = 0,
    visual: bool = True,
    shard_bytes: int = 2**29,
    device: str | torch.device | None = None,
    announce: Callable[[CachePlan], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> CachePlan:
    """Write the teacher's states of every usable sample of a dataset to `output_dir`; an existing cache is extended.

    Args:
        model: the student's checkpoint, whose processor makes the batches; its weights are not read.
        teacher: the recipe's block; `model`, `revision` and `dtype` are read.
        dataset: samples as for `grace_plugin.train`, not a stream.
        processor: the student's; read from its checkpoint by default.
        max_length, max_pixels, max_bad_samples, special_tokens: as for `grace_plugin.train`.
        batch_size: samples per forward pass of the teacher.
        workers: processes that check and decode samples.
        visual: keep the states of visual tokens, which the relational term reads.
        shard_bytes: size of a file; a stopped build loses at most so many bytes of states.
        device: where the teacher runs; by default the first CUDA device, or the CPU.
        announce: called with the plan before the teacher is loaded, and again once batches were timed.
        progress: called with (what, done, of).

    Returns:
        The plan, with the seconds the build took.

    Raises:
        ValueError: a teacher that does not fit, samples that cannot be used, a folder with other content or with states of
            another teacher or processor, or too little disk space; nothing was written.
    """
    started, folder = time.monotonic(), Path(output_dir)
    if min(batch_size, shard_bytes) < 1:
        raise ValueError(f"batch_size and shard_bytes are at least 1, got {batch_size} and {shard_bytes}")
    student, source = _open_pair(model, teacher, visual)
    processor = processor or _processor(student)
    limits = _limits(student, source, processor)
    collator = ConversationCollator(
        processor, max_length, max_pixels, keys=True, special_tokens=special_tokens, **limits
    )
    settings, made_by = processor_settings(collator.processor), teacher_identity(source, teacher.dtype)
    identity: dict[str, Any] = {"teacher": made_by, "processor": settings, "visual": visual}
    made_with = {"teacher": teacher.model, "revision": teacher.revision, **_versions()}
    with ExitStack() as held:
        locked = holds_states(folder)
        if locked:
            held.enter_context(build_lock(folder))
            restore_store(folder)
        identity["visual"] = check_folder(folder, identity)
        samples = _checked(dataset, collator, max_bad_samples, workers, progress)

        def planned() -> tuple[CachePlan, list[int]]:
            dropped, width = drop_damaged(folder) if locked else (), source.state_bytes(teacher.dtype)
            plan, missing = plan_cache(samples, folder, width, identity["visual"], family_of(student))
            return replace(plan, dropped=dropped), missing

        plan, missing = planned()
        check_disk(folder, plan)
        if announce is not None:
            announce(plan)
        if missing:
            runner = _Runner(student, source, teacher, device)
            if not locked:  # another build may have started in this folder since it was checked
                held.enter_context(build_lock(folder))
                locked = True
                identity["visual"] = check_folder(folder, identity)
                missing = planned()[1]
            write_store(folder, identity, made_with)
            batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
            with ShardWriter(folder, shard_bytes) as writer:
                _run(runner, samples, batches, collator, workers, writer, plan, announce, progress)
    return replace(plan, seconds=time.monotonic() - started)


def _open_pair(
    model: str | os.PathLike[str], teacher: TeacherRecipe, visual: bool
) -> tuple[UnloadedCheckpoint, UnloadedCheckpoint]:
    """Read the student's and the teacher's checkpoints without loading them."""
    if teacher.model is None:
        raise ValueError(MISSING)
    student = open_checkpoint(os.fspath(model), role="student")
    source = open_checkpoint(teacher.model, teacher.revision)
    # `open_checkpoint` checks as for a cached teacher, which needs the head alone; a build needs all weights.
    check_checkpoint(teacher.model, "teacher", revision=teacher.revision)
    if visual:
        check_depth(source.config, "teacher")
    return student, source


def _limits(student: UnloadedCheckpoint, source: UnloadedCheckpoint, processor: Any) -> dict[str, Any]:
    """Return the collator's limits for a pair of models; refuses a pair with different tokens or pixels."""
    # The shorter context of the two: the teacher reads the same tokens.
    contexts = [length for one in (student, source) if (length := context_length(one.config)) is not None]
    vocabulary = check_pair(student, source, (processor, None), student_rows=student.rows, teacher_rows=source.rows)
    return {"vocabulary": vocabulary, "context": min(contexts, default=None)}


def _checked(
    dataset: Any,
    collator: ConversationCollator,
    max_bad_samples: float,
    workers: int,
    progress: Callable[[str, int, int], None] | None,
) -> Prepared:
    """Check the dataset's samples as for training.

    Raises:
        ValueError: a stream, or too many samples that cannot be used.
    """
    dataset = as_samples(dataset)
    if not is_scannable(dataset):
        raise ValueError("a cache needs samples that can be checked first; save these as parquet and give those")
    return prepare(
        dataset,
        collator,
        max_bad_samples=max_bad_samples,
        workers=workers,
        progress=None if progress is None else lambda done, of: progress("checking samples", done, of),
    )


def _run(
    runner: _Runner,
    samples: Prepared,
    batches: list[list[int]],
    collator: ConversationCollator,
    workers: int,
    writer: ShardWriter,
    plan: CachePlan,
    announce: Callable[[CachePlan], None] | None,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Write the states of the batches, and announce the predicted time once."""
    given: Any = samples.samples  # a sequence, which is all that the loader needs
    loader: Any = DataLoader(given, batch_sampler=batches, collate_fn=collator, num_workers=workers)
    clock, finished = _Clock([sum(samples.entries[number].tokens for number in batch) for batch in batches]), 0
    for numbers, batch in zip(batches, loader, strict=True):
        for key, final, seen in runner(batch):
            writer.add(key, final, seen if writer.visual else None)
        finished += len(numbers)
        if clock.tick() and announce is not None:
            announce(replace(plan, seconds=clock.seconds))
        if progress is not None:
            progress("running the teacher", finished, sum(map(len, batches)))


class _Clock:
    """Predicts how long a build will take: seconds per token of the first batches times the tokens left."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.done, self.seconds = tokens, 0, 0.0
        self._marks = [time.monotonic()]

    def tick(self) -> bool:
        """Count a batch; returns True once, when `seconds` from now to the end is known."""
        self.done += 1
        self._marks.append(time.monotonic())
        if self.done != TIMED_BATCHES or len(self.tokens) <= TIMED_BATCHES:
            return False
        # per token, because the longest samples run first
        rate = (self._marks[-1] - self._marks[1]) / sum(self.tokens[1:TIMED_BATCHES])
        self.seconds = rate * sum(self.tokens[TIMED_BATCHES:])
        return True


class _Runner:
    """The loaded teacher; returns the states of a batch by sample.

    Raises:
        ValueError: the head in memory differs from the one that training would read from the files.
    """

    def __init__(
        self,
        student: UnloadedCheckpoint,
        source: UnloadedCheckpoint,
        asked: TeacherRecipe,
        device: str | torch.device | None,
    ) -> None:
        self.family, self.config = family_of(student), student.config
        loaded_teacher = load_teacher(source.name_or_path, revision=source.revision, dtype=asked.dtype)
        check_finite(dict(loaded_teacher.named_parameters()), "teacher")
        self.teacher = ResidentTeacher(loaded_teacher)
        # Training reads the head from the files alone. A class that changes the head as it loads it would make training compare
        # with another distribution than that of the cached states.
        for loaded, read in zip(self.teacher.head(), source.head(asked.dtype), strict=True):
            same = loaded is None if read is None else loaded is not None and torch.equal(loaded.cpu(), read)
            if not same:
                raise ValueError(
                    f"the head of {source.name_or_path!r} is not stored as the loaded model has it, so it could not be read "
                    "alone for training; use teacher.kind: resident, or save the teacher with save_pretrained"
                )
        self.teacher.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield key, `final` and `visual` of each sample, positions in the order of the sequence."""
        samples, length = batch["labels"].shape
        positions, visual = supervised_positions(batch["labels"]), self.family.visual_tokens(self.config, batch)
        states = self.teacher.states(batch, positions, visual)
        finals = states.final.split(_per_sample(positions, samples, length))
        if not len(
            states.visual
        ):  # no visual token in the batch, or a decoder of one layer, which has no states of them
            yield from zip(batch[SAMPLE_KEY], finals, [states.visual] * samples, strict=True)
            return
        order = visual.index.argsort()  # a batch lists images before videos, a cached sample has them as they come
        seen = states.visual.index_select(0, order).split(_per_sample(visual.index, samples, length))
        yield from zip(batch[SAMPLE_KEY], finals, seen, strict=True)


def _per_sample(index: Tensor, samples: int, length: int) -> list[int]:
    """Count the flat positions of [samples, length] by sample."""
    return torch.bincount(index // length, minlength=samples).tolist()


def _processor(student: UnloadedCheckpoint) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(student.name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the student's processor from {student.name_or_path!r}; pass processor="
        ) from error


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}
