"""The end of a run: the last resume state, the save of the checkpoint, and `export`, which repeats the save alone.

The resume state contains what the save needs in addition to the weights: the student's source, the recipe and, where they were
passed as objects, the processor and the probe. So `grace export RUN_FOLDER` finishes a run whose save failed or was killed,
without its dataset and its teacher.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_model
from torch import nn

from grace_plugin.export.plan import ExportPlan
from grace_plugin.export.probe import read_probe, write_probe
from grace_plugin.export.processor import ProcessorFiles
from grace_plugin.export.stage import check_destination
from grace_plugin.run.grace_run import GraceRun, GraceSession, TrainResult
from grace_plugin.run.inputs import load_processor
from grace_plugin.run.outputs import kept_streams
from grace_plugin.run.resume import remove_state, states
from grace_plugin.run.states import WEIGHTS, choose_state, has_ended, is_automatic, read_state

if TYPE_CHECKING:
    from grace_plugin.run.trainer import GraceTrainer

__all__ = ["SaveFacts", "export", "save_facts", "save_finished"]

PROCESSOR, PROBE = "processor", "probe.safetensors"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveFacts:
    """What a save needs in addition to the weights.

    model: folder or hub id of the student. recipe: YAML. device: "cpu" or "cuda", where the logits of the probe are computed.
    provenance: what the record says of student and teacher, and run.yaml. processor: files of one that is not the student's
    own, contents by name. probe: a batch that was given for verification, in host memory.
    """

    model: str
    recipe: str
    output_dir: str
    device: str
    record_paths: bool
    provenance: Mapping[str, Any]
    processor: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    probe: Mapping[str, Any] | None = field(default=None, repr=False)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write processor and probe next to a state's files; returns the plain values for its JSON file."""
        for name, content in self.processor.items():
            (folder / PROCESSOR / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / PROCESSOR / name).write_bytes(content)
        if self.probe is not None:
            batch = dict(self.probe)
            write_probe(folder / PROBE, batch, batch["input_ids"].new_zeros(1))
        return {name: getattr(self, name) for name in ("model", "recipe", "output_dir", "device", "record_paths")} | {
            "provenance": dict(self.provenance)
        }


def save_facts(
    arguments: Any, student: Any, recipe: str, output_dir: str | os.PathLike[str], plan: ExportPlan
) -> SaveFacts:
    """Return the facts of a run; `recipe` is the YAML text of before the session, `plan` the modifier's."""
    processor = plan.processor.files if plan.processor.kind == "given" else {}
    given = dict(plan.probe.batch) if plan.probe.kind == "given" else None
    known = {"student": plan.student, "teacher": plan.teacher, "run_file": plan.run_file}
    model, device = str(getattr(student, "name_or_path", "")), str(arguments.device.type)
    source = os.path.abspath(model) if os.path.isdir(model) else model
    return SaveFacts(source, recipe, os.path.abspath(output_dir), device, plan.record_paths, known, processor, given)


def save_finished(trainer: GraceTrainer, session: GraceSession, output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the last resume state of a run by the clock, then the checkpoint; returns the verification.

    States by the clock are removed once the checkpoint is verified; those of `save_strategy` stay.
    """
    keeper = trainer.states
    if keeper.automatic:
        # before session.save, which freezes the weights: a state written after it would hold codes times scales
        keeper.save(ended=True, weights_only=True)
    try:
        verification = session.save(output_dir)
    except BaseException:
        if trainer.args.process_index == 0:
            if keeper.kept is not None:
                how = f"Once the cause is gone, finish it without training by: grace export {keeper.folder}"
                logger.error("the run has trained to its end and its save failed; %s is kept. %s", keeper.kept, how)
            else:
                logger.error("the run has trained to its end, its save failed, and it holds no resume state")
        raise
    finally:
        keeper.release()
    if trainer.args.should_save:
        for state in states(keeper.folder):
            if is_automatic(state):
                remove_state(state)
    return verification


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        logger.warning("the run was on CUDA and there is none here: the probe's logits are computed on the CPU")
        return "cpu"
    return wanted


@kept_streams()
def export(
    run_folder: str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
) -> Any:
    """Write and verify the checkpoint of a run that has trained to its end, without training.

    Args:
        run_folder: `<output_dir>.run` of the run.
        output_dir: folder of the checkpoint, by default the run's.
        model: the student's source, where it was moved; its config and processor are used, not its weights.

    Returns:
        A `TrainResult`, its history the log of the run.

    Raises:
        ValueError, FileExistsError: no complete resume state of a run that has trained to its end, or a bad destination.
        VerificationError: the checkpoint is not what was trained; nothing is left at `output_dir`.
    """
    folder = Path(run_folder)
    state = choose_state(True, folder)
    held, log = read_state(state)
    if not has_ended(state):
        raise ValueError(
            f"{state} has trained {log.global_step} of {log.max_steps} steps; go on with the same train command and "
            "--resume_from_checkpoint, export only saves"
        )
    facts = held.get("save")
    if facts is None:
        raise ValueError(
            f"{state} was written by a loop of one's own and does not say what to save; use session.save there"
        )
    destination = Path(output_dir) if output_dir is not None else Path(facts["output_dir"])
    check_destination(destination)
    own = state / PROCESSOR
    files = {path.relative_to(own).as_posix(): path.read_bytes() for path in sorted(own.rglob("*")) if path.is_file()}
    run = GraceRun(facts["recipe"], processor=load_processor(str(own)) if files else None, trains=False)
    student, modifier = run.load(model if model is not None else facts["model"]), run.modifier
    student.to(_device(facts["device"]))
    run.processor = run.processor or load_processor(student)
    probe = read_probe(state / PROBE)[0] if (state / PROBE).is_file() else None
    with run.session(
        held["objective"]["total_steps"], probe=probe, output_dir=destination, record_paths=facts["record_paths"]
    ) as session:
        plan = replace(modifier.export_plan, **facts["provenance"])  # neither has to be where it was
        modifier.export_plan = replace(plan, processor=ProcessorFiles("given", files)) if files else plan
        load_model(student, str(state / WEIGHTS))
        session.objective.load_state_dict(held["objective"])
        for attached in session.objective.attached:
            attached.invalidate()
        verification = session.save(destination)
    for one in states(folder):
        if is_automatic(one):
            remove_state(one)
    return TrainResult(destination, student, verification, list(log.log_history))
