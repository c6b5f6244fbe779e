"""GRACE as an objective for any training loop (arXiv 2601.22709).

    L = sum CE / N  +  beta * sum g DKD / sum g  +  omega * sum (1 - CKA) / I

The divisors belong to the *optimizer step*: N supervised tokens, the sum of gates, I countable images, over all micro-batches
and all ranks, so value and gradient do not depend on how the batch is cut. The objective owns no trainer:

    grace.prepare(student, teacher, vocabulary=..., total_steps=...)
    for batches in windows:                       # the micro-batches of one optimizer step
        grace.begin_step(batches)
        for batch in batches:
            grace.compute_loss(model, batch).backward()   # model: the student, or its DDP wrapper
        record = grace.reduce_metrics()           # collective on every rank
        if record.finite: optimizer.step()
        grace.end_step(skipped=not record.finite)
        optimizer.zero_grad()
    frozen = grace.finalize(torch.bfloat16)

In addition to the student's step it costs the teacher's forward pass, the teacher's head once more for the gates, and one read
from the device. The terms of the sum are in `grace_plugin.objective.terms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grace_plugin import controller as dual
from grace_plugin.deprecation import deprecated_method, warn_renamed
from grace_plugin.export.freeze import freeze_model
from grace_plugin.objective.micro_batch import SAMPLES_WITHOUT_IMAGES, prepare_micro_batch
from grace_plugin.objective.terms import HeadTerm, LossTerm, RunContext, VisualRelationTerm, check_names
from grace_plugin.objective.window import AccumulationWindow, NamedSums, StepRecord, teacher_stream
from grace_plugin.quantizer import QuantizedLayerGroup
from grace_plugin.recipe import ControllerRecipe, DistillRecipe, RelationalRecipe, TrainingRecipe
from grace_plugin.teacher import MISSING, ResidentTeacher, Teacher, model_inputs
from grace_plugin.trainable import choose_trainable
from grace_plugin.vlm import Capture, capture, check_depth, family_of

__all__ = ["GraceObjective"]


class GraceObjective:
    """The GRACE loss of a student with its controller and its quantizer; the module's docstring shows how to call it.

    Args:
        distill, relational, controller, training: blocks of the recipe; the defaults without.
        terms: further loss terms, added to cross-entropy, distillation and the relational term.

    Attributes:
        head_term: class of the first term; a baseline with another distillation replaces it.
    """

    head_term: ClassVar[type[HeadTerm]] = HeadTerm

    def __init__(
        self,
        distill: DistillRecipe | None = None,
        relational: RelationalRecipe | None = None,
        controller: ControllerRecipe | None = None,
        training: TrainingRecipe | None = None,
        *,
        terms: Sequence[LossTerm] = (),
    ) -> None:
        self.distill = distill or DistillRecipe()
        self.relational = relational or RelationalRecipe()
        self.controller = controller or ControllerRecipe()
        self.training = training or TrainingRecipe()
        self.terms = (self.head_term(self.distill), VisualRelationTerm(self.relational), *terms)
        check_names(self.terms)
        self.attached: tuple[QuantizedLayerGroup, ...] = ()
        self.context: RunContext
        self.controller_state: dual.ControllerState
        self.steps = self.nonfinite_steps = 0
        self.record: StepRecord | None = None
        self.forward_proof: dict[str, int] = {}
        self._window: AccumulationWindow | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether any enabled term reads the teacher."""
        return any(term.needs_teacher for term in self.terms if term.enabled)

    @property
    def student(self) -> Any:
        """The model that trains."""
        return self.context.student

    @property
    def teacher(self) -> Teacher | None:
        """What the terms learn from; None where none of them reads a teacher."""
        return self.context.teacher

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.context.total_steps

    def prepare(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None,
        *,
        vocabulary: int,
        total_steps: int,
        attached: Sequence[QuantizedLayerGroup] = (),
        trains: bool = True,
    ) -> None:
        """Tie the objective to a student, freeze what does not train, and start the controller.

        Args:
            student: a transformers vision-language model of a registered family.
            teacher: a bigger model of the same family, or a `grace_plugin.teacher.Teacher` of any kind; None only when no
                enabled term reads one.
            vocabulary: token ids that both tokenizers define; logits are cut to it.
            total_steps: optimizer steps of the run, from which warm-up follows.
            attached: learned scales on the student's linears, one group per format; empty without quantization.
            trains: False to save the end of an earlier run, which needs no teacher.

        Raises:
            ValueError: no teacher where one is needed, one that cannot teach this student, a decoder of one layer with a term
                that reads visual states, an unknown family, or fewer than one step.
        """
        if self.needs_teacher and teacher is None and trains:
            raise ValueError(MISSING)
        if total_steps < 1:
            raise ValueError(f"a run needs at least 1 optimizer step, got total_steps={total_steps}")
        teacher = ResidentTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        teacher = teacher if self.needs_teacher and trains else None
        if trains:
            self._check_depths(student, teacher)
        family = family_of(student)
        self.context = RunContext(student, family, teacher, vocabulary, total_steps)
        self.attached = tuple(attached)
        choose_trainable(student, family, self.training)
        if teacher is not None:
            # after choose_trainable: a self-teacher keeps copies of what trains
            teacher.begin(student, self.attached)
        for term in self.terms:
            term.bind(self.context)
        self.controller_state = dual.start(_settings(self.controller))

    def _check_depths(self, student: Any, teacher: Teacher | None) -> None:
        """Refuse a decoder without a layer L-2 where a term reads it."""
        reading = [term for term in self.terms if term.enabled and term.reads_visual_states]
        if reading:
            check_depth(student.config, "student")
        if teacher is not None and any(term.needs_teacher for term in reading):
            check_depth(teacher.config, "teacher")

    @property
    def beta(self) -> float:
        """Weight of the distillation term in the next step."""
        return self.controller_state.beta if self.distill.enabled else 0.0

    @property
    def omega(self) -> float:
        """Weight of the relational term in the next step, warm-up included."""
        return self.terms[1].weight(self.steps)

    def begin_step(self, batches: Sequence[Mapping[str, Any]], host: Sequence[Mapping[str, Any]] | None = None) -> int:
        """Begin the next optimizer step: teacher states, gates and divisors of its micro-batches.

        Every rank calls it once per step, with an empty list if it has no batch. On CUDA a resident teacher may still be
        running on a side stream when this returns; `compute_loss` has the student's head wait for it.

        Args:
            batches: all micro-batches of the step, on the student's device.
            host: the same batches in host memory, as collated; given, nothing is read back from the device.

        Returns:
            Supervised tokens of this rank's micro-batches.

        Raises:
            RuntimeError: the step before was begun and not reduced. A call for each micro-batch would divide by that
                micro-batch alone and so sum a multiple of the loss.
            ValueError: visual tokens that do not fit the family, or a label outside the shared vocabulary.
        """
        if self._window is not None and not self._window.reduced:
            raise RuntimeError(
                f"a step is open: begin_step() was called, {len(self._window.pending)} of its micro-batches have had no loss, "
                "and reduce_metrics() was not called. Call begin_step() once per optimizer step with all its micro-batches, "
                "then compute_loss() for each, reduce_metrics(), the optimizer and end_step(); cancel_step() drops an open "
                "step, for instance after an exception"
            )
        # every term's names, enabled or not: the ranks reduce one tensor, and metrics read 0 where a term is off
        device = next(self.student.parameters()).device
        terms = [term for term in self.terms if term.enabled]
        sums = NamedSums((name for term in self.terms for name in term.sums), device)
        stream = teacher_stream(self.teacher, device, batches)
        with torch.cuda.stream(stream):
            names = (SAMPLES_WITHOUT_IMAGES, *(name for term in self.terms for name in term.counts))
            window = AccumulationWindow(NamedSums(names, device), sums, stream)
            for term in terms:
                term.begin_step()
            for batch, in_host in zip(batches, batches if host is None else host, strict=True):
                window.pending.append(prepare_micro_batch(batch, in_host, self.context, terms, window.counts))
            window.counts.all_reduce()
        self._window = window
        return sum(micro_batch.positions.numel() for micro_batch in window.pending)

    def cancel_step(self) -> None:
        """Drop the step that `begin_step` began, for instance after an exception; nothing is counted.

        Gradients of its backward passes are the caller's: empty them with `zero_grad`.
        """
        self._window = None

    def compute_loss(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of the next micro-batch; the sum over the window is the step's loss.

        Under data parallelism it is multiplied by the number of ranks, because gradients are averaged over them.

        Args:
            model: the student or a wrapper of it, called with the batch's tensors.
            batch: the next one of those that `begin_step` was called with.

        Raises:
            RuntimeError: more losses than `begin_step` had batches, or hidden states without a gradient.
        """
        window = self._window
        if window is None or not window.pending:
            raise RuntimeError(
                "compute_loss() was called more often than begin_step() had batches; call begin_step() once per step"
            )
        micro_batch = window.pending.popleft()
        with capture(self.context.family.text_model(self.student)) as states:
            model(**model_inputs(batch, self.student, micro_batch.host), use_cache=False, logits_to_keep=1)
        terms = [term for term in self.terms if term.enabled]
        visual = any(term.reads_visual_states for term in terms) and bool(micro_batch.visual.sizes)
        _check_gradient(states, visual=visual)
        # the student's forward pass is queued by now, so a teacher on a side stream has run at the same time
        window.join()
        losses = [term.loss(micro_batch, states, window, self._weight(term)) for term in terms]
        if not window.pending:
            window.copy_to_host()
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        # DDP averages gradients over the ranks, and the divisors are those of all ranks already
        return sum(losses[1:], losses[0]) * world_size

    def _weight(self, term: LossTerm) -> float:
        return self.beta if term is self.terms[0] else term.weight(self.steps)

    def reduce_metrics(self) -> StepRecord:
        """Return the values of the step over all ranks; collective and unconditional, before the optimizer steps.

        Raises:
            RuntimeError: no step was begun.
        """
        if self._window is None:
            raise RuntimeError("no step is open; call begin_step() once per optimizer step, before compute_loss()")
        totals = self._window.reduce()
        metrics: dict[str, float] = {"samples_without_images": int(totals[SAMPLES_WITHOUT_IMAGES])}
        for term in self.terms:
            metrics |= term.metrics(totals)
        self.record = StepRecord(metrics, self._window.is_finite(totals))
        return self.record

    def end_step(self, *, skipped: bool = False) -> None:
        """Update the controller after `reduce_metrics` and the optimizer's step, and quantize the weights for the next.

        Args:
            skipped: the optimizer did not step, because a loss or a gradient was not finite.

        Raises:
            FloatingPointError: more such steps than `training.max_nonfinite_steps`.
        """
        assert self.record is not None, "reduce_metrics() comes before end_step()"
        self.steps += 1
        self._window = None
        if skipped:
            self.nonfinite_steps += 1
            if self.nonfinite_steps > self.training.max_nonfinite_steps:
                raise FloatingPointError(
                    f"{self.nonfinite_steps} optimizer steps had a non-finite loss or gradient, the last at step {self.steps}; "
                    f"training.max_nonfinite_steps allows {self.training.max_nonfinite_steps}: lower the rate or check the data"
                )
        # without a supervised token GDKD is 0 / 0, which says nothing about the constraint
        elif self.distill.enabled and self.record.gate_mean > 0.0:
            self.controller_state = dual.update(self.controller_state, self.record.gdkd)
        for attached in self.attached:
            attached.prefetch_quantized_weights()

    loss = deprecated_method("GraceObjective", "loss", "compute_loss")
    measure = deprecated_method("GraceObjective", "measure", "reduce_metrics")

    def window(self, batches: Sequence[Mapping[str, Any]], host: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
        """Old name of `begin_step`; it returned the supervised tokens of all ranks, as a tensor."""
        warn_renamed("GraceObjective.window", "begin_step")
        tokens = torch.tensor(float(self.begin_step(batches, host)), device=next(self.student.parameters()).device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(tokens)
        return tokens

    def step(self, progress: float | None = None, *, skipped: bool = False) -> None:
        """Old name of `end_step`; the share of the learning rate is not used any more."""
        warn_renamed("GraceObjective.step", "end_step")
        self.end_step(skipped=skipped)

    def finalize_deferred_grads(self) -> None:
        """Compute the gradients that were deferred over the window's backward passes; a second call changes nothing."""
        for attached in self.attached:
            attached.finalize_deferred_grads()

    def logs(self) -> dict[str, float]:
        """Return what a training loop logs: metrics of the latest step, weights, controller, gates, share of clipped weights.

        Raises:
            RuntimeError: no step was reduced yet.
        """
        if self.record is None:
            raise RuntimeError("no step was reduced yet; call reduce_metrics() first")
        logs: dict[str, float] = dict(self.record.metrics)
        logs |= {"beta": self.beta, "nonfinite_steps": self.nonfinite_steps, **self.controller_logs()}
        if self._window is not None:
            self._window.join()
        for term in self.terms:
            logs |= term.logs(self.steps)
        clipped = [attached.clip_share() for attached in self.attached]
        if clipped:
            logs["clip_share"] = float(torch.stack(clipped).mean())
        return logs

    def gate_quantiles(self) -> dict[str, float]:
        """Return the 5th, 50th and 95th percentile of this rank's gates in the latest step; empty without distillation."""
        if self._window is not None:
            self._window.join()
        return self.terms[0].logs(self.steps)

    def controller_logs(self) -> dict[str, float]:
        """Return ema (nats) and the share of steps with beta at a bound; empty with a constant weight or no distillation."""
        state = self.controller_state
        if not (self.distill.enabled and self.controller.enabled) or state.ema is None:
            return {}
        return {"ema": state.ema, "share_at_bound": state.share_at_bound}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs in addition to the model's parameters, as JSON can carry it."""
        return {
            "steps": self.steps,
            "nonfinite_steps": self.nonfinite_steps,
            "total_steps": self.total_steps,
            "controller": self.controller_state.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: the run has another length, and so another warm-up.
        """
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved run has {state['total_steps']} optimizer steps and this one {self.total_steps}; the "
                "warm-up follows from the length, so resume with the same number of steps or start again"
            )
        self.steps, self.nonfinite_steps = state["steps"], state["nonfinite_steps"]
        self.controller_state = dual.ControllerState.from_dict(state["controller"])

    def finalize(self, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """End the run: write `code * scale` into the weights, cast every parameter to `dtype`, remove the scales.

        Returns:
            Codes (int8 [out, in]) and scales ([out, groups], stored dtype) by layer name.

        Raises:
            RuntimeError: the forward pass multiplies by other weights; see `grace_plugin.export.freeze`.
        """
        frozen, self.forward_proof = freeze_model(self.student, self.attached, dtype)
        return frozen


def _settings(asked: ControllerRecipe) -> dual.ControllerSettings:
    values = asked.model_dump(exclude={"enabled"})
    return dual.ControllerSettings(**values if asked.enabled else values | {"tau": None})


def _check_gradient(states: Capture, *, visual: bool) -> None:
    """Refuse to differentiate a loss of hidden states without a gradient.

    Raises:
        RuntimeError: says why there may be none.
    """
    read = [states.final, *([states.penultimate] if visual else [])]
    if torch.is_grad_enabled() and not all(state is not None and state.requires_grad for state in read):
        raise RuntimeError(
            "the decoder's hidden states carry no gradient; leave some of the decoder trainable (training.freeze), and use "
            "non-reentrant activation checkpointing (gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
