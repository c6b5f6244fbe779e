"""Trainer callback: llm-compressor's training events in their order, skipped steps, the objective's steps, the run's log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grace_plugin.objective import GraceObjective
from grace_plugin.run.metrics import MetricsFile
from grace_plugin.upstream import LifecycleCallbacks, active_session

__all__ = ["GraceCallback"]


class GraceCallback(TrainerCallback):
    """Send BATCH_START, LOSS_CALCULATED, OPTIM_PRE_STEP, OPTIM_POST_STEP and BATCH_END once per optimizer step.

    Args:
        objective: of the run.
        folder: where `metrics.jsonl` is written.
        gradient_is_finite: whether the norm of the step's gradient is finite.
        before_last_step_ends: called after the last optimizer step, before its resume state is written.
    """

    def __init__(
        self,
        objective: GraceObjective,
        folder: Path,
        *,
        gradient_is_finite: Callable[[], bool],
        before_last_step_ends: Callable[[], None],
    ) -> None:
        self.objective = objective
        self.gradient_is_finite, self.before_last_step_ends = gradient_is_finite, before_last_step_ends
        self._skipped = False
        self._metrics = MetricsFile(folder)

    @property
    def _in_session(self) -> bool:
        return bool(active_session().lifecycle.initialized_)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuse a run of another length than the objective's, from which its warm-up follows."""
        prepared = self.objective.total_steps
        if state.max_steps != prepared:
            raise RuntimeError(
                f"Trainer plans {state.max_steps} optimizer steps, the objective was prepared for {prepared}"
            )
        reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if args.gradient_checkpointing and not reentrant:
            # transformers' hooks, which the reentrant kind alone needs, would send gradients through the frozen vision tower
            self.objective.student.disable_input_require_grads()
        if state.is_world_process_zero:
            self._metrics.begin(state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._metrics.append(state.log_history[-1])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._in_session:
            LifecycleCallbacks.batch_start(global_step=state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Reduce the step's values; a non-finite loss or gradient empties the gradients, so that no optimizer moves."""
        self.objective.finalize_deferred_grads()
        record = self.objective.reduce_metrics()
        self._skipped = not (record.finite and self.gradient_is_finite())
        if self._skipped:
            # Trainer calls optimizer.step() whatever a callback says; parameters without a gradient stay as they are
            for parameter in model.parameters():
                parameter.grad = None
        if self._in_session:
            LifecycleCallbacks.loss_calculated(loss=record.ce, global_step=state.global_step)
            LifecycleCallbacks.optim_pre_step(global_step=state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._in_session:
            LifecycleCallbacks.optim_post_step(global_step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            self.before_last_step_ends()
        self.objective.end_step(skipped=self._skipped)
        if self._in_session:
            LifecycleCallbacks.batch_end(global_step=state.global_step)
