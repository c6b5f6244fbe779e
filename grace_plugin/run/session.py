"""GRACE in a training loop of your own: a session with the objective, and the save at the end.

with grace_session(student, recipe, teacher=teacher, total_steps=1000) as grace:
    optimizer = torch.optim.AdamW(grace.parameter_groups(1e-5))
    ...                                  # begin_step, compute_loss, reduce_metrics, end_step: see grace_plugin.objective
    grace.save("student-int4")
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from grace_plugin.run.grace_run import GraceRun, GraceSession
from grace_plugin.teacher import GivenTeacher
from grace_plugin.upstream import Modifier, Recipe

__all__ = ["GraceSession", "grace_session"]


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
    """Check the pair and the recipe, attach the scales, and give the objective for `total_steps` optimizer steps.

    Leaving the block without `save`, by an error or not, ends the session, removes everything of GRACE from the student, whose
    weights stay as they are at that moment, and writes nothing.

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
    run = GraceRun(recipe, teacher=teacher, processor=processor, teacher_processor=teacher_processor)
    run.load(student)
    with run.session(total_steps, probe=probe, output_dir=output_dir, record_paths=record_paths) as session:
        yield session
