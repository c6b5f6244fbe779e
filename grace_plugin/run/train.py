"""`train`: one call from a student, a teacher, a recipe and a dataset to a verified checkpoint.

The destination, the recipe, the pair, the layers and the samples of files and lists are checked before the first step; a
decoder frozen as a whole, a label outside the shared vocabulary and a stream's samples show in a step. Trainer's own files
(checkpoints to resume from, logs) lie in `<output_dir>.run`; `output_dir` appears only when the checkpoint in it is complete
and verified.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from grace_plugin.data import ConversationCollator, as_samples, is_scannable
from grace_plugin.data.media import DEFAULT_MAX_PIXELS
from grace_plugin.data.shown import shown
from grace_plugin.deprecation import renamed_arguments
from grace_plugin.export.stage import rehearse
from grace_plugin.modifier import GraceModifier
from grace_plugin.run.fingerprint import describe_run
from grace_plugin.run.finish import save_facts, save_finished
from grace_plugin.run.grace_run import GraceRun, GraceSession, TrainResult, run_folder
from grace_plugin.run.manifest import RunInputs, changed, run_text, started_with, without_paths, write_run_file
from grace_plugin.run.outputs import kept_streams
from grace_plugin.run.resume import states
from grace_plugin.run.samples import TrainingSamples, training_samples
from grace_plugin.run.settings import check_data_options, read_arguments, training_arguments
from grace_plugin.run.states import check_resume_options
from grace_plugin.run.summary import checkpoint_lines, say
from grace_plugin.run.trainer import GraceTrainer
from grace_plugin.teacher import GivenTeacher, StateStore, check_cached_samples
from grace_plugin.upstream import Modifier, Recipe

__all__ = ["train"]

# arguments of `train` that are none of TrainingArguments', for suggestions
_OWN = """
    max_length max_pixels max_bad_samples packing activation_offloading resume_from_checkpoint callbacks processor
    teacher_processor teacher special_tokens probe allow_resume_changes save_minutes save_on_signal
""".split()


def _arguments(
    folder: Path, resume: bool | str, offload: bool, given: Mapping[str, Any], asked: Mapping[str, Any]
) -> Any:
    """Return the TrainingArguments of a run, checked; see `grace_plugin.run.settings`."""
    if offload and not asked.get("gradient_checkpointing"):
        raise ValueError("activation_offloading needs gradient_checkpointing=True")
    if not resume and folder.exists() and states(folder):
        raise FileExistsError(
            f"{folder} holds resume states of an earlier run; pass resume_from_checkpoint=True to go on, or remove it"
        )
    return training_arguments(folder, asked, given)


def _check_limits(max_length: int | None, max_pixels: int | None, max_bad_samples: float) -> None:
    """Refuse limits that no sample can meet or exceed."""
    for name, limit in (("max_length", max_length), ("max_pixels", max_pixels)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, got {shown(limit)}")
    if not 0.0 <= max_bad_samples <= 1.0:
        raise ValueError(f"max_bad_samples is a share of the samples between 0 and 1, got {shown(max_bad_samples)}")


def _check_dataset(given: Any, arguments: Any) -> Any:
    """Return the samples; options that their kind does not have, and a stream without a number of steps, are refused."""
    dataset = as_samples(given)
    stream = not hasattr(dataset, "__len__")
    check_data_options(arguments, stream=stream, scanned=not stream and is_scannable(dataset))
    if stream:
        _total_steps(arguments, None)
    return dataset


def _total_steps(arguments: Any, samples: int | None) -> int:
    """Return the optimizer steps of the run, as Trainer will count them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    if samples is None:
        raise ValueError("the dataset has no length; pass max_steps=")
    batches = samples / (arguments.train_batch_size * max(1, arguments.world_size))
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * per_epoch)


def _samples(
    dataset: Any,
    collator: ConversationCollator,
    arguments: Any,
    folder: Path,
    max_bad_samples: float,
    store: StateStore | None,
) -> TrainingSamples:
    """Return the samples that can be used, after a first batch of them was made and all were found in the teacher's cache."""
    samples = training_samples(dataset, collator, arguments, folder, max_bad_samples)
    if store is not None and arguments.local_process_index == 0:
        check_cached_samples(store, samples.dataset)
    if samples.count is not None:
        collator([samples.dataset[i] for i in range(min(samples.count, arguments.train_batch_size))])
    return samples


def _trainer(
    session: GraceSession, arguments: Any, samples: TrainingSamples, collator: ConversationCollator, **options: Any
) -> GraceTrainer:
    """Return the trainer of a session; options are further arguments of `GraceTrainer`."""
    objective, modifier = session.objective, session.modifier
    if collator.packed and objective.teacher is not None:
        objective.teacher.family.check_packing()
    modifier.teacher_to(arguments.device)
    return GraceTrainer(
        model=session.student,
        args=arguments,
        train_dataset=samples.dataset,
        data_collator=collator,
        objective=objective,
        scale_rate=modifier.scales.learning_rate_multiplier,
        stream=samples.stream,
        epoch_sampler=samples.sampler,
        **(options | {"callbacks": list(options["callbacks"])}),
    )


#: arguments of `train`: that are no plain values; that GraceTrainer takes; that do not decide the run's result
_OBJECTS = ("processor", "teacher_processor", "probe", "callbacks")
_OF_TRAINER = "callbacks activation_offloading allow_resume_changes save_on_signal".split()
_APART = "model recipe dataset output_dir teacher resume_from_checkpoint allow_resume_changes given".split()


def _inputs(
    passed: Mapping[str, Any], read: Recipe, dataset: Any, asked: Mapping[str, Any], arguments: Any
) -> RunInputs:
    """What `run.yaml` is made of; `passed` are all arguments of `train` by name, so that none is forgotten."""
    plain = {
        name: tuple(v) if isinstance(v, list) else v for name, v in passed.items() if name not in (*_OBJECTS, *_APART)
    }
    objects = {name: passed[name] for name in _OBJECTS if passed[name]}
    return RunInputs(
        passed["model"], read, dataset, asked, passed["teacher"], objects, changed(train, **plain), arguments.world_size
    )


def _keep_run_file(
    modifier: GraceModifier, folder: Path, content: dict[str, Any], *, resumed: bool, record_paths: bool
) -> dict[str, Any]:
    """Have the save write what the run was started with into the checkpoint; returns it.

    Without local paths, unless they are asked for, and without callbacks, which are of the run and not of its result.
    """
    content = started_with(folder, content, resumed=resumed)
    kept = {name: value for name, value in content.items() if name != "callbacks"}
    modifier.export_plan = replace(
        modifier.export_plan, run_file=run_text(kept if record_paths else without_paths(kept))
    )
    return content


def _result(
    checkpoint: Path, trainer: GraceTrainer, verification: dict[str, Any], data: dict[str, Any], seconds: float
) -> TrainResult:
    """Print what the run took, and return what it made."""
    say(checkpoint_lines(checkpoint, seconds), trainer.args)
    student, history = trainer.objective.student, list(trainer.state.log_history)
    return TrainResult(checkpoint, student, verification, history, data, dict(trainer.throughput))


def _fit(
    trainer: GraceTrainer, output_dir: Any, samples: TrainingSamples, content: Mapping[str, Any], resume: bool | str
) -> None:
    """Write what the run was given, and train.

    Raises:
        KeyboardInterrupt, Terminated (a SystemExit): a signal ended the run after a step.
    """
    folder = run_folder(output_dir)
    trainer.states.check_space(trainer.objective.total_steps, trainer.args.save_strategy != "no", output_dir)
    if trainer.args.process_index == 0:
        samples.begin(folder)
        write_run_file(folder, content)
    try:
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.interrupts.end()
    except BaseException:
        trainer.states.release()
        raise


@renamed_arguments(max_bad_rows="max_bad_samples")
@kept_streams()
def train(
    model: str | os.PathLike[str] | nn.Module,
    *,
    recipe: str | os.PathLike[str] | Recipe | Modifier,
    dataset: Sequence[Mapping[str, Any]] | Any,
    output_dir: str | os.PathLike[str],
    teacher: GivenTeacher | None = None,
    processor: Any = None,
    teacher_processor: Any = None,
    max_length: int | None = None,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    max_bad_samples: float = 0.05,
    packing: bool = False,
    special_tokens: Sequence[str] = (),
    resume_from_checkpoint: bool | str = False,
    activation_offloading: bool = False,
    callbacks: Sequence[Any] = (),
    probe: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    record_paths: bool = False,
    allow_resume_changes: Sequence[str] = (),
    save_minutes: float | None = 10.0,
    save_on_signal: bool = True,
    **given: Any,
) -> TrainResult:
    """Run GRACE with the Hugging Face Trainer and write a verified checkpoint.

    Args:
        model: the BF16 student, a checkpoint or a loaded model with a real `name_or_path`.
        recipe: path, YAML text, Recipe or GraceModifier.
        dataset: samples in one of the formats of `grace_plugin.data.formats`: a list, a path or `load_samples(...)`, a
            `datasets.Dataset` or `DatasetDict`, a pandas DataFrame, a dict of lists, any other sequence, or a stream. A
            generator is refused, since it can be read only once.
        output_dir: where the checkpoint appears; must not hold anything.
        teacher: replaces the recipe's `teacher.model`: a checkpoint, a loaded model or a `grace_plugin.teacher.Teacher`.
        processor: the student's; read from its checkpoint by default.
        teacher_processor: the teacher's, to compare tokenizers; read from its checkpoint by default.
        max_length: longest sample in tokens; a longer one is not used, nothing is cut.
        max_pixels: largest image in pixels, None for no limit; a sample with a larger one is not used.
        max_bad_samples: largest share of samples that cannot be used before the run refuses to start; they are listed in
            `<output_dir>.run`.
        packing: the samples of a micro-batch in one sequence without padding, kept apart by position; refused for families
            whose positions do not allow it.
        special_tokens: special tokens that samples may write, for instance the marks of boxes; any other that a sample spells
            stays text and is counted in the report.
        resume_from_checkpoint: True for the newest whole resume state in `<output_dir>.run`, or one by its folder. A run that
            has trained to its end is saved without training.
        activation_offloading: keep in host memory what gradient checkpointing saves for backward (the value is the same).
        callbacks: further TrainerCallbacks.
        probe: samples, or a collated batch, on which the checkpoint is verified and which is published in it; by default seeded
            noise through the processor with a fixed text, so that nothing of the training data is in the checkpoint.
        record_paths: keep local paths of student and teacher in the checkpoint's recipe and record, which else hold their names
            and fingerprints.
        allow_resume_changes: keys in which a resumed run may differ from the one it goes on with, as a refusal names them.
        save_minutes: where `save_strategy` is not given, write a resume state every so many minutes and at the end, keep the
            newest, and remove it once the checkpoint is verified; less often where one takes more than 2 % of that time. None
            for none.
        save_on_signal: on Ctrl-C or SIGTERM end the running step, write a resume state and say how to go on; a second signal
            ends at once. The exit status is 130 or 143.
        given: fields of `transformers.TrainingArguments`; what GRACE does with each, and the defaults that differ from
            Trainer's, is in `grace_plugin.run.arguments`.

    Raises:
        ValueError, FileExistsError: something asked for cannot be done; nothing was written.
        FloatingPointError: more non-finite steps than the recipe allows.
        VerificationError: the checkpoint is not what was trained; nothing is left at `output_dir`.
    """
    passed = dict(locals())  # before any other name is bound
    folder, started = run_folder(output_dir), time.monotonic()
    asked = read_arguments(given, others=_OWN)
    rehearse(output_dir, folder)
    _check_limits(max_length, max_pixels, max_bad_samples)
    check_resume_options(bool(resume_from_checkpoint), allow_resume_changes, save_minutes)
    run = GraceRun(recipe, teacher=teacher, processor=processor, teacher_processor=teacher_processor)
    modifier, written = run.modifier, run.recipe.yaml()
    arguments = _arguments(folder, resume_from_checkpoint, activation_offloading, given, asked)
    dataset = _check_dataset(dataset, arguments)
    inputs = _inputs(passed, run.recipe, dataset, asked, arguments)
    student = run.load(model)
    collator = run.collator(max_length, max_pixels, packed=packing, special_tokens=special_tokens)
    samples = _samples(dataset, collator, arguments, folder, max_bad_samples, run.store)
    steps, content = _total_steps(arguments, samples.count), inputs.content
    fingerprint = describe_run(
        arguments, student, modifier, collator, samples.dataset, content, teacher=teacher, total_steps=steps
    )
    with run.session(steps, probe=probe, output_dir=output_dir, record_paths=record_paths) as session:
        resumed = bool(resume_from_checkpoint) and not allow_resume_changes
        content = _keep_run_file(modifier, folder, content, resumed=resumed, record_paths=record_paths)
        trainer = _trainer(
            session,
            arguments,
            samples,
            collator,
            fingerprint=fingerprint,
            save_minutes=None if "save_strategy" in given else save_minutes,
            save_facts=save_facts(arguments, student, written, output_dir, modifier.export_plan),
            **{name: passed[name] for name in _OF_TRAINER},
        )
        _fit(trainer, output_dir, samples, content, resume_from_checkpoint)
        verification = save_finished(trainer, session, output_dir)
    return _result(Path(output_dir), trainer, verification, samples.finish(), time.monotonic() - started)
