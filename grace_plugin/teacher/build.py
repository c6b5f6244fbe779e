"""Run the teacher once over a dataset and keep what training reads of it.

The samples are looked at first, as for training; then it is known how many bytes will be written (exactly, from the counts of
supervised positions and visual tokens), and the disk is asked whether it has them. Then the longest samples are run first, so
memory runs out at once or never, and a few timed batches say how long the rest will take.

Samples that the folder holds already are not run again: a stopped build goes on, a longer dataset adds its samples, and a
file that is not what was written is dropped and its samples are run anew.

For processors that make the same pixels every time. One that draws at random is not noticed: the states would belong to
other pixels than the student sees.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
from grace_plugin.teacher.cached import teacher_identity
from grace_plugin.teacher.checkpoint import UnloadedCheckpoint, open_checkpoint
from grace_plugin.teacher.open import check_pair
from grace_plugin.teacher.plan import CachePlan, check_disk, check_folder, drop_damaged, plan_cache
from grace_plugin.teacher.resident import ResidentTeacher, load_teacher
from grace_plugin.teacher.store import (
    ShardWriter,
    building,
    holds_states,
    restore_store,
    write_store,
)
from grace_plugin.vlm import check_depth, context_length, family_of
from grace_plugin.vlm.loading import check_checkpoint, check_finite

__all__ = ["build_cache"]

TIMED = 4  # batches that say how long the rest will take


@renamed_arguments(max_bad_rows="max_bad_samples")
def build_cache(
    model: str | os.PathLike[str], *, teacher: TeacherRecipe, dataset: Any, output_dir: str | os.PathLike[str],
    processor: Any = None, max_length: int | None = None, max_pixels: int | None = DEFAULT_MAX_PIXELS,
    max_bad_samples: float = 0.05, special_tokens: Sequence[str] = (), batch_size: int = 8, workers: int = 0,
    visual: bool = True, shard_bytes: int = 2**29, device: str | torch.device | None = None,
    announce: Callable[[CachePlan], None] | None = None, progress: Callable[[str, int, int], None] | None = None,
) -> CachePlan:  # fmt: skip
    """Write the states of every usable sample of a dataset to `output_dir`, going on with what is there.

    Args:
        model: the student's checkpoint, whose processor makes the samples; its weights are not read.
        teacher: the recipe's block; `model`, `revision` and `dtype` are read.
        dataset: samples as for `grace_plugin.train`, not a stream.
        processor: the student's; read from its checkpoint by default.
        max_length, max_pixels, max_bad_samples, special_tokens: as for `grace_plugin.train`.
        batch_size: samples the teacher runs at a time. workers: processes that look at samples and decode.
        visual: keep the states of visual tokens, which the relational term reads.
        shard_bytes: states in a file; a stopped build loses at most so much.
        device: where the teacher runs; the first CUDA device, or the CPU.
        announce: called with the plan before the teacher is loaded, and again once batches were timed.
        progress: called with (what, done, of).

    Returns:
        The plan, with the seconds it took.

    Raises:
        ValueError: a teacher that does not fit, samples that cannot be used, a folder that holds something else or states of
            another teacher or processor, or a disk without room; nothing was written.
    """
    started, folder = time.monotonic(), Path(output_dir)
    if teacher.model is None:
        raise ValueError(MISSING)
    if min(batch_size, shard_bytes) < 1:
        raise ValueError(f"batch_size and shard_bytes are at least 1, got {batch_size} and {shard_bytes}")
    student = open_checkpoint(os.fspath(model), role="student")
    source = open_checkpoint(teacher.model, teacher.revision)
    check_checkpoint(teacher.model, "teacher", revision=teacher.revision)  # all of it runs here, not the head alone
    if visual:
        check_depth(source.config, "teacher")
    contexts = [length for one in (student, source) if (length := context_length(one.config)) is not None]
    processor = processor or _processor(student)
    shared = check_pair(student, source, (processor, None), student_rows=student.rows, teacher_rows=source.rows)
    collator = ConversationCollator(
        processor, max_length, max_pixels, keys=True, special_tokens=special_tokens, vocabulary=shared,
        context=min(contexts, default=None),
    )  # fmt: skip
    settings = processor_settings(collator.processor)
    identity: dict[str, Any] = {
        "teacher": teacher_identity(source, teacher.dtype),
        "processor": settings,
        "visual": visual,
    }
    made_with = {"teacher": teacher.model, "revision": teacher.revision, **_versions()}
    with ExitStack() as held:
        locked = holds_states(folder)
        if locked:
            held.enter_context(building(folder))
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
            if not locked:  # nothing is written before, and another build may have begun here in the meantime
                held.enter_context(building(folder))
                locked = True
                identity["visual"] = check_folder(folder, identity)
                missing = planned()[1]
            write_store(folder, identity, made_with)
            batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
            with ShardWriter(folder, shard_bytes) as writer:
                _run(runner, samples, batches, collator, workers, writer, plan, announce, progress)
    return replace(plan, seconds=time.monotonic() - started)


def _checked(
    dataset: Any, collator: ConversationCollator, max_bad_samples: float, workers: int,
    progress: Callable[[str, int, int], None] | None,
) -> Prepared:  # fmt: skip
    """The dataset's samples, each checked as for training.

    Raises:
        ValueError: a stream, or too many that cannot be used.
    """
    dataset = as_samples(dataset)
    if not is_scannable(dataset):
        raise ValueError("a cache needs samples that can be looked at first; save these as parquet and give those")
    return prepare(
        dataset, collator, max_bad_samples=max_bad_samples, workers=workers,
        progress=None if progress is None else lambda done, of: progress("looking at every sample", done, of),
    )  # fmt: skip


def _run(
    runner: _Runner, samples: Prepared, batches: list[list[int]], collator: ConversationCollator, workers: int,
    writer: ShardWriter, plan: CachePlan, announce: Callable[[CachePlan], None] | None,
    progress: Callable[[str, int, int], None] | None,
) -> None:  # fmt: skip
    """Write the states of the batches, and say how long the rest will take."""
    given: Any = samples.samples  # a sequence is all that the loader needs
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
    """Says once how long a build will take: the first batches' time a token (the very first warms up) times the tokens left."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.done, self.seconds = tokens, 0, 0.0
        self._marks = [time.monotonic()]

    def tick(self) -> bool:
        """A batch is done; True when `seconds`, from now to the end, was found just now."""
        self.done += 1
        self._marks.append(time.monotonic())
        if self.done != TIMED or len(self.tokens) <= TIMED:
            return False
        rate = (self._marks[-1] - self._marks[1]) / sum(self.tokens[1:TIMED])
        self.seconds = rate * sum(self.tokens[TIMED:])
        return True


class _Runner:
    """The loaded teacher; turns a batch into the states of its samples.

    Raises:
        ValueError: the head in memory is not the one that training would read.
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
        for loaded, read in zip(self.teacher.head(), source.head(asked.dtype), strict=True):
            same = loaded is None if read is None else loaded is not None and torch.equal(loaded.cpu(), read)
            if not same:
                raise ValueError(
                    f"the head of {source.name_or_path!r} is not stored as the loaded model has it, so it could not be read "
                    "alone for training; use teacher.kind: resident, or save the teacher with save_pretrained"
                )
        self.teacher.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Key, `final` and `visual` of each sample, in the order of the sequence."""
        samples, length = batch["labels"].shape
        positions, visual = supervised_positions(batch["labels"]), self.family.visual_tokens(self.config, batch)
        states = self.teacher.states(batch, positions, visual)
        finals = states.final.split(_per_sample(positions, samples, length))
        if not len(
            states.visual
        ):  # no visual token in the batch, or a decoder of one layer, which has no states of them
            yield from zip(batch[SAMPLE_KEY], finals, [states.visual] * samples, strict=True)
            return
        order = visual.index.argsort()
        seen = states.visual.index_select(0, order).split(_per_sample(visual.index, samples, length))
        yield from zip(batch[SAMPLE_KEY], finals, seen, strict=True)


def _per_sample(index: Tensor, samples: int, length: int) -> list[int]:
    """How many flat positions of [samples, length] lie in each sample."""
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
