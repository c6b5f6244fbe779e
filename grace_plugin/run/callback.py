"""Trainer callback: llm-compressor's training events in their order, skipped steps, the controller's update, the run's log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grace_plugin.run.metrics import MetricsFile
from grace_plugin.upstream import LifecycleCallbacks, active_session

if TYPE_CHECKING:
    from grace_plugin.run.trainer import GraceTrainer

__all__ = ["GraceCallback"]


class GraceCallback(TrainerCallback):
    """BATCH_START, LOSS_CALCULATED, OPTIM_PRE_STEP, OPTIM_POST_STEP, BATCH_END, once per optimizer step each."""

    def __init__(self, trainer: GraceTrainer) -> None:
        self.trainer = trainer
        self._skipped = False
        self._metrics = MetricsFile(Path(trainer.args.output_dir))

    @property
    def _in_session(self) -> bool:
        return bool(active_session().lifecycle.initialized_)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Warm-up, probe and controller follow the length of the run, so it must be the one they were prepared for."""
        prepared = self.trainer.objective.total_steps
        if state.max_steps != prepared:
            raise RuntimeError(
                f"Trainer plans {state.max_steps} optimizer steps, the objective was prepared for {prepared}"
            )
        reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if args.gradient_checkpointing and not reentrant:
            # transformers' hooks, which the reentrant kind alone needs, would send gradients through the frozen vision tower
            student: Any = self.trainer.objective.student
            student.disable_input_require_grads()
        if state.is_world_process_zero:
            self._metrics.begin(state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._metrics.append(state.log_history[-1])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._in_session:
            LifecycleCallbacks.batch_start(global_step=state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Reduce the step's values; a non-finite loss or gradient empties the gradients, so that no optimizer moves."""
        self.trainer.finalize_deferred_grads()
        record = self.trainer.objective.reduce_metrics()
        self._skipped = not (record.finite and self.trainer.grad_norm_finite)
        if self._skipped:
            for parameter in self.trainer.model.parameters():
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
        if (
            state.global_step >= state.max_steps
        ):  # before the last resume state, from which a run is finished without training
            self.trainer.use_averaged_weights()
        self.trainer.objective.end_step(skipped=self._skipped)
        if self._in_session:
            LifecycleCallbacks.batch_end(global_step=state.global_step)
