"""Trainer callback: llm-compressor's training events in their order, the skipped steps and the controller's update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grace_plugin.upstream import LifecycleCallbacks, active_session

if TYPE_CHECKING:
    from grace_plugin.run.trainer import GraceTrainer

__all__ = ["GraceCallback"]


class GraceCallback(TrainerCallback):
    """BATCH_START, LOSS_CALCULATED, OPTIM_PRE_STEP, OPTIM_POST_STEP, BATCH_END, once per optimizer step each."""

    def __init__(self, trainer: GraceTrainer) -> None:
        self.trainer = trainer
        self._skipped = False

    @property
    def _in_session(self) -> bool:
        return bool(active_session().lifecycle.initialized_)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._in_session:
            LifecycleCallbacks.batch_start(global_step=state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Reduce the step's values; a non-finite loss or gradient empties the gradients, so that no optimizer moves."""
        record = self.trainer.objective.measure()
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
        peak = self.trainer.args.learning_rate
        rate = self.trainer.lr_scheduler.get_last_lr()[0]
        self.trainer.objective.step(rate / peak if peak else 0.0, skipped=self._skipped)
        if self._in_session:
            LifecycleCallbacks.batch_end(global_step=state.global_step)
