"""The Hugging Face Trainer with the GRACE objective as its loss.

What differs from a plain Trainer: the objective inspects the micro-batches of a step before the first backward pass and divides
by all of them; learned scales have their own parameter group (a multiple of the rate, no decay) and their own clip norm; a step
with a non-finite loss or gradient is skipped and counted; resume states hold the raw state dict, so that a resumed run
continues with the same bits.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.data_loader import DataLoaderShard
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import deactivate_neftune
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from grace_plugin.data import SAMPLE_KEY
from grace_plugin.data.workers import bounded
from grace_plugin.objective import GraceObjective
from grace_plugin.objective.async_copy import AsyncHostCopy
from grace_plugin.quantizer import PARAMETER
from grace_plugin.run.callback import GraceCallback
from grace_plugin.run.devices import use_one_gpu
from grace_plugin.run.fingerprint import SCHEDULE_KEYS, check_same_run
from grace_plugin.run.finish import SaveFacts
from grace_plugin.run.interrupt import ResumeCallback
from grace_plugin.run.memory import keep_full_precision_states, offloaded
from grace_plugin.run.outputs import kept_streams
from grace_plugin.run.states import STATE_FILE, WEIGHTS, ResumeStates, has_ended, read_state
from grace_plugin.run.stream_loader import StreamLoader, worker_seconds
from grace_plugin.run.summary import count_tokens, header_line, say, speed_line, throughput
from grace_plugin.vlm import VISUAL_SPANS
from grace_plugin.vlm.transfer import to_device

__all__ = ["STATE_FILE", "GraceTrainer"]

# ways to run that leave the sum over micro-batches in `.grad`, where the quantizer's one backward per step finds it
GRADIENTS_IN_PLACE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class GraceTrainer(Trainer):
    """Trainer whose loss is a prepared `GraceObjective`.

    Args:
        objective: prepared for `args.max_steps` or the epochs' optimizer steps.
        scale_rate: learning rate of the scales over that of the weights.
        fingerprint: what decides the run's result (`grace_plugin.run.fingerprint`); a state of another is not resumed.
        allow_resume_changes: keys of it that may differ.
        save_facts: what `grace export` needs in addition to the weights.
        save_minutes: write a resume state every so many minutes, the newest kept; None for none by the clock.
        save_on_signal: end after the running step on SIGINT or SIGTERM, with a resume state.
        train_loader: a ready DataLoader, instead of a dataset and a collator.
        epoch_sampler: the order of the samples, instead of Trainer's own.
        stream: the batches of a stream, which ranks read apart.
        activation_offloading: keep in host memory what the student's forward pass saves for backward.
    """

    def __init__(
        self,
        *args: Any,
        objective: GraceObjective,
        scale_rate: float,
        fingerprint: Mapping[str, Any] | None = None,
        allow_resume_changes: Sequence[str] = (),
        save_facts: SaveFacts | None = None,
        save_minutes: float | None = None,
        save_on_signal: bool = False,
        train_loader: Any = None,
        epoch_sampler: Any = None,
        stream: StreamLoader | None = None,
        activation_offloading: bool = False,
        **kwargs: Any,
    ) -> None:
        self.objective, self.scale_rate = objective, scale_rate
        self.train_loader, self.epoch_sampler, self.stream = train_loader, epoch_sampler, stream
        self.activation_offloading = activation_offloading
        self.fingerprint, self.allow_resume_changes, self.save_facts = fingerprint, allow_resume_changes, save_facts
        self.changed: set[str] = set()
        if (given := kwargs.get("args")) is not None:
            asked = kwargs["args"] = use_one_gpu(copy.copy(given))
            if asked.ddp_find_unused_parameters is None:
                # a rank without images leaves its projector unused
                asked.ddp_find_unused_parameters = True
            if stream is not None:
                asked.ignore_data_skip = True  # a stream finds its place itself
        self.config_use_cache = getattr(getattr(kwargs.get("model"), "config", None), "use_cache", None)
        self.tokens_seen = 0
        self.throughput: dict[str, float] = {}
        super().__init__(*args, **kwargs)
        # the objective divides by the window itself; Trainer must not
        self.model_accepts_loss_kwargs = True
        self.grad_norm_finite = True
        self.states = ResumeStates(self, automatic=save_minutes is not None)
        if self.args.gradient_accumulation_steps > 1 and self.accelerator.distributed_type in GRADIENTS_IN_PLACE:
            for attached in objective.attached:
                attached.defer_grads()
        self.add_callback(
            GraceCallback(
                objective,
                Path(self.args.output_dir),
                gradient_is_finite=lambda: self.grad_norm_finite,
                # the last resume state is one from which a run is finished without training
                before_last_step_ends=self.use_averaged_weights,
            )
        )
        self.interrupts = ResumeCallback(self, on_signal=save_on_signal, minutes=save_minutes)
        self.add_callback(self.interrupts)

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None, **kwargs: Any) -> Any:
        """Train as Trainer does, then restore what Trainer and accelerate leave on the model.

        A resume state of a run that has trained to its end is restored, and nothing is trained.

        Raises:
            ValueError: no whole resume state to go on from, or one of another run.
        """
        state = self.states.choose(resume_from_checkpoint) if resume_from_checkpoint else None
        started, self.tokens_seen = time.monotonic(), 0
        try:
            if state is not None and has_ended(state):
                self._load_from_checkpoint(str(state))
                self.state = read_state(state)[1]
                return TrainOutput(self.state.global_step, math.nan, {})
            # Trainer's bar would begin on the same line
            say(header_line(self, self.objective.total_steps), self.args)
            # Trainer prints its log, and its progress
            with kept_streams(), self.interrupts.watching():
                output = super().train(resume_from_checkpoint=None if state is None else str(state), **kwargs)
            self.use_averaged_weights()  # of a run that a callback ended, too
            self.throughput = throughput(self, time.monotonic() - started, self.tokens_seen)
            say(speed_line(self, self.throughput), self.args)
            return output
        finally:
            if self.is_in_train and self.neftune_noise_alpha is not None and hasattr(self, "neftune_hook_handle"):
                # Trainer removes its hook only where training ends without an error
                deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
            # Trainer sets use_cache to False, and the checkpoint's config would say so
            if self.config_use_cache is not None:
                self.model.config.use_cache = self.config_use_cache
            elif "use_cache" in vars(self.model.config):
                del self.model.config.use_cache
            # accelerate leaves autocast around the forward of mixed-precision runs
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            if getattr(model.__dict__.get("forward"), "__func__", None) is type(model).forward:
                del model.__dict__["forward"]

    def use_averaged_weights(self) -> None:
        """Put the weights that are to be kept into the student, where an optimizer trains others (schedule-free optimizers).

        For any other optimizer, and a second time, nothing changes.
        """
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.optimizer is None or not callable(getattr(inner, "eval", None)):
            return
        self.optimizer.eval()
        for attached in self.objective.attached:
            # weights changed in place under what is quantized of them
            attached.invalidate()

    def get_train_dataloader(self) -> Any:
        """Return the stream, the given loader or Trainer's own; batches stay in host memory, where the objective reads them."""
        if self.stream is not None:
            return self.stream
        if self.train_loader is None:
            loader = super().get_train_dataloader()
        else:
            loader = self.accelerator.prepare(self.train_loader)
        if isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.epoch_sampler is None else self.epoch_sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of a step, as Trainer does, and begin the objective's step with them.

        A stream that ends inside a window gets empty micro-batches for the rest: Trainer steps only after a full count where
        it does not know the length of the data, and the gradients would join the next epoch's first window.
        """
        if self.stream is not None:
            host = self.stream.window(num_batches)
        else:
            seconds = worker_seconds(self.args) if self.train_loader is None else 0.0
            host = list(itertools.islice(bounded(epoch_iterator, seconds), num_batches))
        # the stream has ended, and the epoch with it
        if not host:
            self.control.should_epoch_stop = True
            return [], None
        self.tokens_seen += sum(map(count_tokens, host))
        place = self.args.device
        queued = [{k: to_device(v, place) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in host]
        batches = [self._prepare_inputs(batch) for batch in queued]
        tokens = self.objective.begin_step(batches, host)
        return batches + [{}] * (num_batches - len(batches)), tokens

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run Trainer's forward and backward pass; nothing for an empty micro-batch of a short window."""
        if not inputs:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's loss in training, the model's own cross-entropy in evaluation."""
        if not model.training:
            inputs = {key: value for key, value in inputs.items() if key not in (SAMPLE_KEY, VISUAL_SPANS)}
            return super().compute_loss(model, inputs, return_outputs, None)
        return self.objective.compute_loss(offloaded(model) if self.activation_offloading else model, inputs)

    def _scales(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the trainable parameters as (scales, others)."""
        scales: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (scales if name.endswith(PARAMETER) else others).append(parameter)
        return scales, others

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return Trainer's optimizer, with the scales moved to a group of their own."""
        if self.optimizer is not None:
            return self.optimizer
        super().create_optimizer(model)
        assert self.optimizer is not None
        scales = {id(p) for p in self._scales(self.model)[0]}
        moved: list[nn.Parameter] = []
        for group in self.optimizer.param_groups:
            moved += [p for p in group["params"] if id(p) in scales]
            group["params"] = [p for p in group["params"] if id(p) not in scales]
        if moved:
            rate = self.args.learning_rate * self.scale_rate
            self.optimizer.add_param_group({"params": moved, "weight_decay": 0.0, "lr": rate})
            keep_full_precision_states(self.optimizer, moved)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip weights and scales separately; returns the norm of the weights' gradient before clipping."""
        self.objective.finalize_deferred_grads()
        scales, others = self._scales(model)
        limit = self.args.max_grad_norm
        norms = [self.accelerator.clip_grad_norm_(group, limit) for group in (others, scales) if group]
        self.grad_norm_finite = all(map(math.isfinite, AsyncHostCopy(torch.stack(norms)).tolist()))
        return norms[0]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm to log; without clipping it is computed here, and checked."""
        self.objective.finalize_deferred_grads()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is None and norm is not None:
            self.grad_norm_finite = math.isfinite(norm)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a resume state completely or not at all; Trainer would write into the folder that a resumed run reads."""
        self.store_flos()
        folder, best = Path(self.args.output_dir), self.state.best_global_step
        if best and ((known := folder / f"{PREFIX_CHECKPOINT_DIR}-{best}").exists() or best == self.state.global_step):
            self.state.best_model_checkpoint = str(known)
        self.states.save()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write raw parameters under their own names, and what GRACE adds; nothing is renamed or compressed."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / WEIGHTS), metadata={"format": "pt"})
        state = {
            "objective": self.objective.state_dict(),
            "fingerprint": self.fingerprint,
        }
        if self.save_facts is not None:
            state["save"] = self.save_facts.write(folder)
        if self.stream is not None:
            state["stream"] = self.stream.state_dict()
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load as Trainer does, on any device."""
        if checkpoint is None:
            return
        # torch.load knows the device "cpu", not the "cpu:0" of a rank on the CPU
        place = self.args.device if self.args.world_size > 1 and self.args.device.type != "cpu" else "cpu"
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        rates = list(getattr(self.lr_scheduler, "base_lrs", ()))
        for name, held in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
            held.load_state_dict(torch.load(Path(checkpoint) / name, map_location=place, weights_only=True))
        # a loaded state brings the rates of its own run with it
        if self.changed & SCHEDULE_KEYS:
            self._take_new_rates(fresh, rates)

    def _take_new_rates(self, fresh: list[dict[str, Any]], rates: list[float]) -> None:
        """Put this run's values into optimizer and schedule, at the step that was resumed from."""
        schedule = self.lr_scheduler
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={self.args.lr_scheduler_type} keeps its values in the resume state; resume with those"
            )
        assert self.optimizer is not None
        schedule.base_lrs = list(rates)
        now = [rate * at(schedule.last_epoch) for rate, at in zip(rates, schedule.lr_lambdas, strict=True)]
        for group, new, rate in zip(self.optimizer.param_groups, fresh, now, strict=True):
            group.update({**new, "lr": rate})
        schedule._last_lr = list(now)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore `_save`.

        Raises:
            ValueError: the state belongs to a run of another recipe, other arguments, models or samples.
        """
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / STATE_FILE).read_text())
        if self.fingerprint is not None and state["fingerprint"] is not None:
            self.changed = check_same_run(
                state["fingerprint"], self.fingerprint, self.allow_resume_changes, state=folder
            )
        load_model(self.model, str(folder / WEIGHTS))
        self.objective.load_state_dict(state["objective"])
        if self.stream is not None:
            same = not self.changed and "dataset" not in self.allow_resume_changes
            self.stream.load_state_dict(state["stream"], compare=same)
        for attached in self.objective.attached:
            attached.invalidate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with everything that the objective logs."""
        if "loss" in logs and self.objective.record is not None:
            logs |= self.objective.logs()
        super().log(logs, start_time)
