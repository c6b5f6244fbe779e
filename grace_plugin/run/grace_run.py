"""One driver for every way to run GRACE: it owns the order from a recipe to a verified checkpoint.

    GraceRun(recipe)     the recipe is read, and the modifier of this run is made from it
    .load(model)         stored states, then the files of both models, are checked before the student is loaded
    .collator(...)       the processor, with the limits that both models set to samples
    .session(steps)      the pair and the layers are checked, scales are attached, the save is rehearsed, the objective begins
    session.save(...)    the quantizer is frozen, the checkpoint written and verified

`train`, `oneshot`, `grace_session` and `export` go through these steps; what differs is who makes the optimizer's steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace_plugin.data import ConversationCollator
from grace_plugin.data.shown import shown
from grace_plugin.export.plan import rehearse_save
from grace_plugin.export.processor import source_folder
from grace_plugin.export.ranks import run_on_all_ranks
from grace_plugin.export.stage import check_destination
from grace_plugin.export.write import save_checkpoint
from grace_plugin.modifier import GraceModifier
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer import PARAMETER
from grace_plugin.run.inputs import (
    check_models,
    copy_recipe,
    grace_modifier,
    load_processor,
    load_student,
    open_cache,
    read_recipe,
)
from grace_plugin.run.limits import sample_limits
from grace_plugin.teacher import GivenTeacher, StateStore
from grace_plugin.upstream import Modifier, Recipe, create_session
from grace_plugin.vlm import family_of

__all__ = ["GraceRun", "GraceSession", "TrainResult", "run_folder"]


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back.

    Attributes:
        checkpoint: the verified folder.
        model: the student as saved.
        verification: the proofs, the same on every rank.
        history: Trainer's log, one dict per logging step, losses in nats.
        data: what became of the dataset's samples.
        throughput: seconds of training, tokens of all ranks, tokens per second, peak memory in bytes; empty where nothing was
            trained.
    """

    checkpoint: Path
    model: nn.Module
    verification: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)


def run_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Return the folder of Trainer's files, `<output_dir>.run`.

    Raises:
        ValueError: `output_dir` has no name of its own, as "", "." and "..".
    """
    path = Path(output_dir)
    if path.name in ("", ".."):
        raise ValueError(
            f"output_dir={shown(os.fspath(output_dir))} is no name of a new folder; take for instance student-int4"
        )
    return path.with_name(f"{path.name}.run")


@dataclass
class GraceSession:
    """A running session: `objective` gives the loss, `parameter_groups` the optimizer's groups, `save` the checkpoint."""

    student: nn.Module
    modifier: GraceModifier
    objective: GraceObjective
    _session: Any
    _ended: bool = False

    def parameter_groups(self, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return two optimizer groups: weights, and scales at `scales.learning_rate_multiplier` times the rate, undecayed."""
        named = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        weights, scales = ([p for n, p in named if n.endswith(PARAMETER) is wanted] for wanted in (False, True))
        return [
            {"params": weights, "lr": learning_rate, "weight_decay": weight_decay},
            # decay would pull the logarithm of a scale to 0, the scale to 1
            {
                "params": scales,
                "lr": learning_rate * self.modifier.scales.learning_rate_multiplier,
                "weight_decay": 0.0,
            },
        ]

    def save(self, output_dir: str | os.PathLike[str], *, optimizer: Any = None) -> dict[str, Any]:
        """End the run and write a verified checkpoint; returns the verification.

        After a failure it can be called again: nothing that was trained is lost, and a run is ended once.

        Args:
            output_dir: where the checkpoint appears; must not hold anything.
            optimizer: yours, where it trains other weights than those to keep (schedule-free optimizers): its `eval()` is
                called before anything is frozen.

        Raises:
            RuntimeError: no optimizer step was made, or the forward pass multiplies by other weights than those to be saved.
            FileExistsError: the destination is not empty; the run goes on.
            VerificationError: a proof failed; nothing is left at the destination.
        """
        run_on_all_ranks(lambda: check_destination(output_dir), next(self.student.parameters()).device)
        if not self._ended:
            if callable(getattr(optimizer, "eval", None)):
                optimizer.eval()
                for attached in self.objective.attached:
                    # the optimizer wrote into the weights in place, which does not end the life of their quantized copies
                    attached.invalidate()
            self._session.finalize()
            self._ended = True
        return save_checkpoint(self.student, self.modifier, output_dir)


class GraceRun:
    """One run. The recipe is given here once, the model in `load`; neither is changed.

    Args:
        recipe: path, YAML text, Recipe or GraceModifier.
        teacher: replaces the recipe's teacher.
        processor: the student's; read from its checkpoint by default.
        teacher_processor: the teacher's, to compare tokenizers; read from its checkpoint by default.
        oneshot: whether each modifier of the recipe runs a pipeline of its own.
        trains: False to save the end of an earlier run, which needs no teacher.
        copies: False where the recipe is that of a session which upstream has initialized: its modifiers hold the state.

    Raises:
        ValueError: the recipe cannot be used.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | Recipe | Modifier,
        *,
        teacher: GivenTeacher | None = None,
        processor: Any = None,
        teacher_processor: Any = None,
        oneshot: bool = False,
        trains: bool = True,
        copies: bool = True,
    ) -> None:
        read = read_recipe(recipe, oneshot=oneshot)
        self.recipe = copy_recipe(read) if copies else read
        self.modifier = grace_modifier(self.recipe)
        self.modifier.use_teacher(teacher)
        if not trains:
            self.modifier.without_teacher()
        self.teacher, self.processor, self.teacher_processor = teacher, processor, teacher_processor
        self.student: Any = None
        self.store: StateStore | None = None

    def load(self, model: str | os.PathLike[str] | nn.Module) -> Any:
        """Return the student, loaded after everything that can be read from files is checked.

        Raises:
            ValueError: a model, a store of teacher states or a processor that cannot be used.
        """
        # the cheapest check first: a store is a few small files, a model's headers more, a model gigabytes
        self.store = open_cache(self.modifier, model, self.processor)
        check_models(self.modifier, model)
        self.student = load_student(model, self.modifier.training.method)
        source_folder(getattr(self.student, "name_or_path", ""))  # the save copies its files
        return self.student

    def collator(
        self,
        max_length: int | None,
        max_pixels: int | None,
        *,
        packed: bool = False,
        special_tokens: Sequence[str] = (),
    ) -> ConversationCollator:
        """Return the collator of the run, with the limits that both models set to samples.

        Raises:
            ValueError: packing that the student's positions do not allow, or a pair that does not share tokens or pixels.
        """
        if packed:
            family_of(self.student).check_packing()
        self.processor = self.processor or load_processor(self.student)
        limits = sample_limits(self.student, self.modifier, self.teacher, self.processor, self.teacher_processor)
        return ConversationCollator(
            self.processor,
            max_length,
            max_pixels,
            packed=packed,
            keys=self.store is not None,
            special_tokens=special_tokens,
            **limits._asdict(),
        )

    def rehearse(self, **options: Any) -> None:
        """Prepare everything that the save will need, so that it is refused before the first step and not after the last.

        options: `probe`, `output_dir` and `record_paths` of `session`.
        """
        rehearse_save(self.student, self.modifier, processor=self.processor, **options)

    def begin(self, total_steps: int, device: torch.device) -> GraceObjective:
        """Return the objective of a run of `total_steps` optimizer steps, the teacher on the student's device."""
        self.modifier.teacher_to(device)
        return self.modifier.begin(total_steps)

    @contextmanager
    def session(
        self,
        total_steps: int,
        *,
        probe: Any = None,
        output_dir: str | os.PathLike[str] | None = None,
        record_paths: bool = False,
    ) -> Iterator[GraceSession]:
        """Check pair and layers, attach the scales, rehearse the save and begin; afterwards give the student back.

        Raises:
            ValueError, FileExistsError: something that the recipe asks for cannot be done, or the checkpoint not be saved.
        """
        with create_session() as session:
            try:
                processors = (self.processor, self.teacher_processor)
                session.initialize(recipe=self.recipe, model=self.student, copy_data=False, processors=processors)
                self.rehearse(probe=probe, output_dir=output_dir, record_paths=record_paths)
                objective = self.begin(total_steps, next(self.student.parameters()).device)
                yield GraceSession(self.student, self.modifier, objective, session)
            finally:
                # nothing to do after a save; without one the caller's model gets its own layers back
                self.modifier.release()
