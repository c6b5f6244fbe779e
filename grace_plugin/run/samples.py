"""The samples of a run: inspected before it where possible, in an order that only seed and epoch decide."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_plugin.data import (
    ConversationCollator,
    EpochSampler,
    Prepared,
    StreamedSamples,
    as_samples,
    check_samples,
    draw_samples,
    is_scannable,
    prepare,
)
from grace_plugin.run.outputs import SideOutput
from grace_plugin.run.stream_loader import StreamLoader

__all__ = ["TrainingSamples", "calibration_samples", "training_samples"]

logger = logging.getLogger(__name__)
CHECKED = 256  # first samples of a dataset that makes its samples when asked for


@dataclass
class TrainingSamples:
    """dataset: what Trainer gets. count: its samples, None for a stream. sampler: its order, None for Trainer's own.

    stream: the batches of a stream, None for samples that can be counted.
    """

    dataset: Any
    count: int | None
    sampler: EpochSampler | None = None
    stream: StreamLoader | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def begin(self, folder: Path) -> None:
        """Write the report, now that the run begins and nothing can be refused any more; one process should."""
        if isinstance(self.dataset, Prepared):
            prepared = self.dataset
            SideOutput(f"the report on the data in {folder}").write(lambda: prepared.write_report(folder))

    def finish(self) -> dict[str, Any]:
        """Return the report at the end of the run; a stream is counted only now, over all ranks, each of which takes part."""
        return self.stream.write_report() if self.stream is not None else self.report


def _check_videos(kept: Prepared, collator: ConversationCollator, batch_size: int, batch_of_one: str) -> None:
    """Refuse batches of videos that the model's processor cannot put side by side.

    Raises:
        ValueError: the shortest and the longest video do not fit into one batch.
    """
    videos = sorted((e.video_frames, n) for n, e in enumerate(kept.entries) if e.video_frames and not e.reason)
    if batch_size < 2 or not videos or videos[0][0] == videos[-1][0]:
        return
    ends = [kept.samples[videos[place][1]] for place in (0, -1)]
    try:
        collator(ends)
    except Exception as error:  # processors raise what they like
        names, said = " and ".join(str(videos[place][1]) for place in (0, -1)), str(error).partition("\n")[0]
        raise ValueError(
            f"the model's processor cannot put videos of different length into one batch (samples number {names}: {said}); set "
            f"{batch_of_one} instead, or give every video the same frames"
        ) from error


def _warn(kept: Prepared, folder: Path) -> None:
    """Say which samples are left out, and that the relational term is absent where nothing is seen."""
    report = kept.report
    if report["rejected"]:
        logger.warning(
            "%d of %d samples are not used; see %s", report["samples"] - report["usable"], report["samples"], folder
        )
    if report["unused_fields"]:
        named = ", ".join(f"{name} ({count})" for name, count in list(report["unused_fields"].items())[:20])
        logger.warning("fields of samples that nothing reads (samples that have them): %s", named)
    if report["spelled_special_tokens"]:
        named = ", ".join(f"{name} ({count})" for name, count in list(report["spelled_special_tokens"].items())[:20])
        logger.warning("special tokens that samples spell and that stay text (special_tokens= allows some): %s", named)
    if not report["images_and_videos"]:
        logger.warning("no sample has an image or a video: the relational term is absent from this run")


def calibration_samples(
    dataset: Any, collator: ConversationCollator, folder: Path, *, count: int, batch_size: int, share: float, seed: int
) -> TrainingSamples:
    """Draw `count` samples of a dataset by `seed`, inspect each as before a training, and order them as a training does.

    Args:
        dataset: samples as for `training_samples`, not a stream.
        folder: where unusable samples are listed.
        share: largest share of the drawn samples that cannot be used.

    Raises:
        BadSamplesError (a ValueError): more than `share` of the drawn samples cannot be used.
        ValueError: a stream, no samples, or a count or batch size below 1.
    """
    dataset = as_samples(dataset)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "oneshot draws its samples and a stream cannot be drawn from; take samples of it first, for instance "
            "list(itertools.islice(stream, 512)), or use train"
        )
    if min(count, batch_size) < 1:
        raise ValueError(f"num_calibration_samples and batch_size are at least 1, got {count} and {batch_size}")
    drawn = draw_samples(dataset, count, seed)
    kept = prepare(drawn if is_scannable(dataset) else drawn[:], collator, folder=folder, max_bad_samples=share)
    _check_videos(kept, collator, batch_size, "batch_size=1")
    _warn(kept, folder)
    sampler = EpochSampler(len(kept), seed, lengths=kept.lengths, batch_size=batch_size)
    return TrainingSamples(kept, len(kept), sampler, report=kept.report)


def training_samples(
    dataset: Any, collator: ConversationCollator, arguments: Any, folder: Path, share: float
) -> TrainingSamples:
    """Inspect a dataset before the run.

    Samples in files, lists and `datasets.Dataset`s are all inspected, and those that cannot be used are dropped and listed in
    `folder`; a stream is inspected as it comes; of any other sequence the first samples are checked.

    Raises:
        BadSamplesError (a ValueError): more than `share` of the samples cannot be used.
        ValueError: no samples, or a first sample that cannot be used.
    """
    dataset = as_samples(dataset)
    if not hasattr(dataset, "__len__"):
        samples = StreamedSamples(
            dataset,
            collator,
            folder=folder,
            max_bad_samples=share,
            rank=arguments.process_index,
            world_size=arguments.world_size,
        )
        if not samples.with_media:
            logger.warning(
                "none of the stream's first %d samples has an image or a video: the relational term is absent until one comes",
                samples.inspected,
            )
        return TrainingSamples(samples, None, stream=StreamLoader(samples, collator, arguments))
    if not is_scannable(dataset):
        check_samples(dataset[i] for i in range(min(len(dataset), CHECKED)))
        return TrainingSamples(dataset, len(dataset))
    with arguments.main_process_first(local=False, desc="inspecting every sample"):
        kept = prepare(
            dataset,
            collator,
            folder=folder,
            max_bad_samples=share,
            workers=arguments.dataloader_num_workers,
            write=arguments.process_index == 0,
        )
    _check_videos(
        kept, collator, arguments.train_batch_size, "per_device_train_batch_size=1 and gradient_accumulation_steps"
    )
    _warn(kept, folder)
    seed = arguments.data_seed if arguments.data_seed is not None else arguments.seed
    sampler = EpochSampler(len(kept), seed, lengths=kept.lengths, batch_size=arguments.train_batch_size)
    return TrainingSamples(kept, len(kept), sampler, report=kept.report)
