"""GRACE inside somebody else's training loop: a session with the modifier, its objective, and the save at the end.

    with grace_session(student, recipe, teacher=teacher, total_steps=1000) as grace:
        optimizer = torch.optim.AdamW(grace.parameter_groups(1e-5))
        ...                                  # window, loss, measure, step: see grace_plugin.objective
        grace.save("student-int4")

Leaving the block without `save`, by an error or not, ends the session, takes everything of GRACE off the student, whose weights
stay as they are at that moment, and writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from grace_plugin.export.plan import rehearse_save
from grace_plugin.export.processor import source_folder
from grace_plugin.export.ranks import run_on_all_ranks
from grace_plugin.export.stage import check_destination
from grace_plugin.export.write import save_checkpoint
from grace_plugin.modifier import GraceModifier
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer import PARAMETER
from grace_plugin.run.inputs import grace_modifier, load_student, read_recipe
from grace_plugin.teacher import GivenTeacher
from grace_plugin.upstream import Modifier, Recipe, create_session

__all__ = ["GraceSession", "grace_session"]


@dataclass
class GraceSession:
    """A running session: `objective` gives the loss, `parameter_groups` the optimizer's groups, `save` the checkpoint."""

    student: nn.Module
    modifier: GraceModifier
    objective: GraceObjective
    _session: Any
    _ended: bool = False

    def parameter_groups(self, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Two optimizer groups: weights, and scales at `scales.learning_rate_multiplier` times the rate without decay."""
        named = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        rate = learning_rate * self.modifier.scales.learning_rate_multiplier
        return [
            {
                "params": [p for n, p in named if not n.endswith(PARAMETER)],
                "lr": learning_rate,
                "weight_decay": weight_decay,
            },
            {"params": [p for n, p in named if n.endswith(PARAMETER)], "lr": rate, "weight_decay": 0.0},
        ]

    def save(self, output_dir: str | os.PathLike[str], *, optimizer: Any = None) -> dict[str, Any]:
        """End the run and write a verified checkpoint; returns the verification.

        After a failure it can be called again: nothing that was trained is lost, and a run is ended once.

        Args:
            output_dir: where the checkpoint appears; must not hold anything.
            optimizer: yours, where it trains other weights than those to keep (schedule-free optimizers): its `eval()` is
                called before anything is frozen. Without it call that yourself; `save` cannot see an optimizer.

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
                    attached.invalidate()  # weights changed in place under what is quantized of them
            self._session.finalize()
            self._ended = True
        return save_checkpoint(self.student, self.modifier, output_dir)


@contextmanager
def grace_session(
    student: nn.Module,
    recipe: str | os.PathLike[str] | Recipe | Modifier,
    *,
    total_steps: int,
    teacher: GivenTeacher | None = None,
    processor: Any = None,
    teacher_processor: Any = None,
    probe: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    record_paths: bool = False,
) -> Iterator[GraceSession]:
    """Check the pair and the recipe, attach the scales, and hand out the objective for `total_steps` optimizer steps.

    Args:
        student: a loaded model with a real `name_or_path`.
        recipe: path, YAML text, Recipe or GraceModifier.
        teacher: replaces the recipe's `teacher.model`: a checkpoint, a loaded model or a `grace_plugin.teacher.Teacher`.
        processor: what the batches are made with, so what is saved with the checkpoint; the student's own by default.
        teacher_processor: to compare tokenizers; read from the teacher's checkpoint by default.
        probe: samples, or a collated batch, on which the checkpoint is verified and which is published in it; by default seeded
            noise through `processor` with a fixed text (`grace_plugin.export.probe`), nothing of the training data.
        output_dir: where `save` will write, if that is known: destination and free space are tried before the first step.
        record_paths: keep local paths of student and teacher in the checkpoint's recipe and record.

    Raises:
        FileExistsError: something is at `output_dir`.
        ValueError: what the recipe asks for cannot be done, or the checkpoint could not be saved.
    """
    student = load_student(student)
    source_folder(getattr(student, "name_or_path", ""))
    read = read_recipe(recipe)
    modifier = grace_modifier(read)
    modifier.use_teacher(teacher)
    with create_session() as session:
        try:
            session.initialize(recipe=read, model=student, copy_data=False, processors=(processor, teacher_processor))
            rehearse_save(
                student, modifier, processor=processor, output_dir=output_dir, probe=probe, record_paths=record_paths
            )
            modifier.teacher_to(next(student.parameters()).device)
            yield GraceSession(student, modifier, modifier.begin(total_steps), session)
        finally:
            modifier.release()
