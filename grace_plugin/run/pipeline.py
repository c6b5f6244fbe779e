"""`oneshot(pipeline="grace")`: the objective over upstream's calibration loader.

The pipeline trains for the epochs and rate of the recipe's `oneshot` block with the same Trainer as `train`. A loader without
labels supervises every text token. A caller's own modifiers in the recipe run their own pipelines, in the recipe's order;
llm-compressor's are refused (`run.inputs.check_modifiers`).
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from grace_plugin.data.media import DEFAULT_MAX_PIXELS
from grace_plugin.deprecation import renamed_arguments
from grace_plugin.export.plan import checkpoint_bytes
from grace_plugin.export.stage import check_space, rehearse
from grace_plugin.export.write import install_save, save_checkpoint
from grace_plugin.run.grace_run import GraceRun, TrainResult, run_folder
from grace_plugin.run.inputs import grace_modifier, load_processor
from grace_plugin.run.samples import calibration_samples
from grace_plugin.run.summary import checkpoint_lines, say
from grace_plugin.run.trainer import GraceTrainer
from grace_plugin.teacher import GivenTeacher, check_cached_samples
from grace_plugin.upstream import (
    CalibrationPipeline,
    Modifier,
    Recipe,
    active_session,
    keep_processor_files,
    log_pipeline_advice,
    running_output_dir,
    running_processor,
)
from grace_plugin.upstream import oneshot as upstream_oneshot

__all__ = ["GracePipeline", "oneshot", "register_pipeline"]


class GracePipeline(CalibrationPipeline):
    """Calibration pipeline registered as `grace`."""

    @staticmethod
    def __call__(model: nn.Module, dataloader: Any, dataset_args: Any) -> None:
        """Run every modifier of the active recipe, GRACE with training steps.

        Raises:
            ValueError: no calibration data, or a recipe without exactly one GraceModifier or with one that it cannot run with.
            FileExistsError: upstream's `oneshot` would save where something lies.
        """
        # `GraceModifier.on_initialize` has silenced it until this pipeline was chosen
        log_pipeline_advice(True)
        recipe = active_session().lifecycle.recipe
        grace = grace_modifier(recipe)
        modifiers = list(recipe.modifiers)
        try:
            run = GraceRun(recipe, processor=running_processor(), oneshot=True, copies=False)
            run.student = model
            if dataloader is None:
                raise ValueError("GRACE trains on calibration data and none was given; pass dataset= to oneshot")
            destination = running_output_dir()
            if destination is not None:
                check_space(rehearse(destination), checkpoint_bytes(model))
            if grace.export_plan is None:
                run.rehearse()
            for modifier in modifiers:
                # each runs alone: upstream sends the events of a pipeline to every modifier of the session's recipe
                recipe.modifiers = [modifier]
                if modifier is grace:
                    _train(run, dataloader)
                else:
                    CalibrationPipeline.from_modifiers([modifier])(model, dataloader, dataset_args)
        except BaseException:
            grace.release()
            # upstream's next reset would finalize every initialized modifier, and so report a run that trained nothing
            grace.finalized_ = True
            raise
        finally:
            recipe.modifiers = modifiers
        install_save(model, grace)
        keep_processor_files(model)


def _train(run: GraceRun, dataloader: Any) -> None:
    """Make the short training run that the recipe's oneshot block asks for."""
    asked = run.modifier.oneshot
    per_epoch = math.ceil(len(dataloader) / asked.gradient_accumulation_steps)
    total_steps = max(1, math.ceil(asked.epochs * per_epoch))
    with tempfile.TemporaryDirectory(prefix="grace-oneshot-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=total_steps,
            learning_rate=asked.learning_rate,
            lr_scheduler_type=asked.scheduler,
            warmup_steps=round(asked.warmup_share * total_steps),
            per_device_train_batch_size=getattr(getattr(dataloader, "batch_sampler", None), "batch_size", None) or 1,
            gradient_accumulation_steps=asked.gradient_accumulation_steps,
            weight_decay=asked.weight_decay,
            max_grad_norm=asked.max_grad_norm,
            seed=asked.seed,
            optim=asked.optim,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            logging_nan_inf_filter=False,
            logging_steps=10,
        )
        trainer = GraceTrainer(
            model=run.student,
            args=arguments,
            train_loader=dataloader,
            objective=run.begin(total_steps, arguments.device),
            train_dataset=dataloader.dataset,
            scale_rate=run.modifier.scales.learning_rate_multiplier,
        )
        trainer.train()


def register_pipeline() -> None:
    """Make `oneshot(pipeline="grace")` find this pipeline; a second call changes nothing."""
    if "grace" not in CalibrationPipeline.registered_names():
        CalibrationPipeline.register_value(GracePipeline, "grace")


@renamed_arguments(max_bad_rows="max_bad_samples")
def oneshot(
    model: str | os.PathLike[str] | nn.Module,
    *,
    recipe: str | os.PathLike[str] | Recipe | Modifier,
    dataset: Any,
    output_dir: str | os.PathLike[str],
    teacher: GivenTeacher | None = None,
    processor: Any = None,
    max_length: int | None = None,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    max_bad_samples: float = 0.05,
    num_calibration_samples: int = 512,
    batch_size: int = 8,
    special_tokens: Sequence[str] = (),
    probe: Any = None,
    record_paths: bool = False,
) -> TrainResult:
    """llm-compressor's `oneshot` with the `grace` pipeline on conversation samples, ending in a verified checkpoint.

    Upstream's own `llmcompressor.oneshot(..., pipeline="grace", output_dir=...)` runs, verifies and saves the same; this takes
    samples and a checkpoint's path, refuses before anything is loaded, and records the hashes of the processor files. The
    samples drawn are checked as by `train`: those that cannot be used are left out and counted in the result's `data` and in
    `<output_dir>.run`.

    Args:
        model: the BF16 student, a checkpoint or a loaded model with a real `name_or_path`.
        recipe: path, YAML text, Recipe or GraceModifier; its oneshot block gives epochs and rate.
        dataset: samples as for `train`, not a stream, or a ready DataLoader of batches.
        output_dir: where the checkpoint appears; must not hold anything.
        teacher: replaces the recipe's `teacher.model`: a checkpoint, a loaded model or a `grace_plugin.teacher.Teacher`.
        processor: the student's; read from its checkpoint by default.
        max_length: longest sample in tokens; a longer one is not used, nothing is cut.
        max_pixels: largest image in pixels, None for no limit; a sample with a larger one is not used.
        max_bad_samples: largest share of the drawn samples that cannot be used before the run refuses to start.
        num_calibration_samples: samples drawn from the dataset by the seed of the recipe's oneshot block.
        batch_size: samples of a micro-batch.
        special_tokens, probe, record_paths: as for `train`.

    Raises:
        ValueError, FileExistsError: something asked for cannot be done; nothing was written.
        VerificationError: the checkpoint is not what was trained; nothing is left at `output_dir`.
    """
    started = time.monotonic()
    rehearse(output_dir, run_folder(output_dir))
    run = GraceRun(recipe, teacher=teacher, processor=processor, oneshot=True)
    student, modifier = run.load(model), run.modifier
    folder, samples, collator = run_folder(output_dir), None, None
    if isinstance(dataset, DataLoader):
        run.processor = run.processor or load_processor(
            student
        )  # saved with the checkpoint; the batches are made already
    else:
        collator = run.collator(max_length, max_pixels, special_tokens=special_tokens)
    run.rehearse(probe=probe, output_dir=output_dir, record_paths=record_paths)
    if collator is not None:
        samples = calibration_samples(
            dataset,
            collator,
            folder,
            count=num_calibration_samples,
            batch_size=batch_size,
            share=max_bad_samples,
            seed=modifier.oneshot.seed,
        )
        if run.store is not None:
            check_cached_samples(run.store, samples.dataset)
        dataset = DataLoader(samples.dataset, batch_size=batch_size, sampler=samples.sampler, collate_fn=collator)
    save_as_before = vars(student).get("save_pretrained")
    try:
        upstream_oneshot(model=student, recipe=run.recipe, dataset=dataset, processor=run.processor, pipeline="grace")
    except BaseException:
        modifier.release()
        vars(student).pop("save_pretrained", None)
        if save_as_before is not None:
            student.save_pretrained = save_as_before
        raise
    if samples is not None:
        samples.begin(folder)
    verification = save_checkpoint(student, modifier, output_dir)
    say(checkpoint_lines(Path(output_dir), time.monotonic() - started))
    return TrainResult(Path(output_dir), student, verification, data=samples.finish() if samples is not None else {})
