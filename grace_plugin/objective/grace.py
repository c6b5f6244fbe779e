"""GRACE as an objective for any training loop (arXiv 2601.22709).

    L = sum CE / N  +  beta * sum g DKD / sum g  +  omega * sum (1 - CKA) / I

The divisors belong to the *optimizer step*: N supervised tokens, the sum of gates, I countable images, over all
micro-batches and all ranks, so value and gradient do not depend on how the batch was cut. The objective owns no trainer:

    grace.prepare(student, teacher, vocabulary=..., total_steps=...)
    for batches in windows:                       # the micro-batches of one optimizer step
        grace.window(batches)
        for batch in batches:
            grace.loss(model, batch).backward()   # model: the student, or its DDP wrapper
        record = grace.measure()                  # collective on every rank
        if record.finite: optimizer.step()
        grace.step(progress=learning_rate / peak_rate, skipped=not record.finite)
        optimizer.zero_grad()
    frozen = grace.finalize(torch.bfloat16)

It refuses hidden states without a gradient (a decoder frozen as a whole), unknown families and labels outside the vocabulary.
Cost beside the student: a teacher forward, the teacher's head once more for the gates; one tensor read back a step (`window`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grace_plugin import controller as dual
from grace_plugin.export.freeze import freeze_model
from grace_plugin.objective.terms import check_gradient, head_term, visual_term
from grace_plugin.objective.window import AccumulationWindow, StepRecord, all_reduce_sum, beside, gate_quantiles, look
from grace_plugin.quantizer.attach import QuantizedLayerGroup
from grace_plugin.recipe import ControllerRecipe, DistillRecipe, RelationalRecipe, TrainingRecipe
from grace_plugin.teacher import MISSING, ResidentTeacher, Teacher, model_inputs
from grace_plugin.trainable import choose_trainable
from grace_plugin.vlm import capture, check_depth, family_of

__all__ = ["GraceObjective"]


class GraceObjective:
    """The GRACE loss of a student with its controller and its quantizer; the module's docstring gives the protocol."""

    def __init__(
        self,
        distill: DistillRecipe | None = None,
        relational: RelationalRecipe | None = None,
        controller: ControllerRecipe | None = None,
        training: TrainingRecipe | None = None,
    ) -> None:
        self.distill = distill or DistillRecipe()
        self.relational = relational or RelationalRecipe()
        self.controller = controller or ControllerRecipe()
        self.training = training or TrainingRecipe()
        self.attached: tuple[QuantizedLayerGroup, ...] = ()
        self.steps = self.nonfinite_steps = 0
        self.record: StepRecord | None = None
        self._window = AccumulationWindow()
        self._gates: Tensor | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether any enabled term reads the teacher."""
        return self.distill.enabled or self.relational.enabled

    def prepare(
        self, student: nn.Module, teacher: nn.Module | Teacher | None, *, vocabulary: int, total_steps: int,
        attached: Sequence[QuantizedLayerGroup] = (), trains: bool = True,
    ) -> None:  # fmt: skip
        """Tie the objective to a student, freeze what does not train, and start the controller.

        Args:
            student: a transformers vision-language model of a known family.
            teacher: a bigger model of the same family, or a `grace_plugin.teacher.Teacher` of any kind; None only when
                distillation and relation are disabled.
            vocabulary: ids both tokenizers define; logits are cut to it.
            total_steps: optimizer steps of the run, from which warm-up, probe and automatic eta follow.
            attached: learned scales put on the student's linears, one entry per format; empty without quantization.
            trains: False where only the end of an earlier run is saved, which needs no teacher.

        Raises:
            ValueError: no teacher where one is needed, one that cannot teach this student, a decoder of one layer with the
                relational term, an unknown family, or fewer than one step.
        """
        if self.needs_teacher and teacher is None and trains:
            raise ValueError(MISSING)
        if total_steps < 1:
            raise ValueError(f"a run needs at least 1 optimizer step, got total_steps={total_steps}")
        if self.relational.enabled and trains:
            for role, model in (("student", student), ("teacher", teacher)):
                check_depth(cast(Any, model).config, role)
        self.student, self.family = student, family_of(student)
        self.config: Any = student.config
        self.vocabulary, self.total_steps, self.attached = vocabulary, total_steps, tuple(attached)
        teacher = ResidentTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.teacher = teacher if self.needs_teacher and trains else None
        self._text_model = self.family.text_model(student)
        choose_trainable(student, self.family, self.training)
        if self.teacher is not None:
            self.teacher.begin(student, self.attached)
        self.controller_state = dual.start(_settings(self.controller))

    @property
    def beta(self) -> float:
        """Weight of the distillation term in the next step."""
        return self.controller_state.beta if self.distill.enabled else 0.0

    @property
    def omega(self) -> float:
        """Weight of the relational term in the next step, warm-up included."""
        asked = self.relational
        factor = dual.warm_up(self.steps, self.total_steps, asked.warmup_steps, asked.warmup_share)
        return asked.weight * factor if asked.enabled else 0.0

    def window(self, batches: Sequence[Mapping[str, Any]], host: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
        """Open the next optimizer step: teacher states, gates and divisors of its micro-batches.

        Every rank calls it once per step, with an empty list if it has no batch; returns the supervised tokens of all ranks.
        `host`: the same batches in host memory, as collated; given, nothing is read back from the device.
        On CUDA a resident teacher may still be running then, on a stream of its own; `loss` has the student's head wait for it.

        Raises:
            RuntimeError: the step before was begun and not measured; a second call, for instance one per micro-batch, would
                divide by the micro-batch alone and sum a multiple of the loss.
            ValueError: visual tokens that do not fit the family, or a label outside the shared vocabulary.
        """
        if self._window.unfinished:
            raise RuntimeError(
                f"a step is open: window() was called, {len(self._window.pending)} of its micro-batches have had no loss, and "
                "measure() was not called. Call window() once per optimizer step with all its micro-batches, then loss() for "
                "each, measure(), the optimizer and step(); cancel_step() drops an open step, for instance after an exception"
            )
        device, pending = next(self.student.parameters()).device, []
        sums, stream = torch.zeros(6, dtype=torch.float32, device=device), beside(self.teacher, device, batches)
        with torch.cuda.stream(stream):
            counts = sums.new_zeros(4)
            for batch, looked in zip(batches, batches if host is None else host, strict=True):
                item, seen = look(
                    batch, looked, family=self.family, config=self.config, vocabulary=self.vocabulary,
                    teacher=self.teacher, distill=self.distill, relational=self.relational, device=device,
                )  # fmt: skip
                pending.append(item)
                counts += seen
            all_reduce_sum(counts)
            gates = [item.gate for item in pending if item.gate is not None]
            self._gates = torch.cat(gates) if gates else None
        self._window = AccumulationWindow(pending, counts, sums, stream=stream)
        tokens = sums.new_full((), sum(item.positions.numel() for item in pending))
        all_reduce_sum(tokens)
        return tokens

    def cancel_step(self) -> None:
        """Drop the step that `window` began, for instance after an exception; nothing is counted.

        Gradients of its backward passes are the caller's: empty them with `zero_grad`.
        """
        self._window = AccumulationWindow()

    def loss(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        """Loss of the window's next micro-batch, in nats; the sum over the window is the step's loss.

        Under data parallelism it is multiplied by the number of ranks, because gradients are averaged over them.

        Raises:
            RuntimeError: more losses than `window` saw batches, or hidden states without a gradient.
        """
        if not self._window.pending:
            raise RuntimeError("loss() was called more often than window() saw batches; call window() once per step")
        item = self._window.pending.pop(0)
        with capture(self._text_model) as caught:
            model(**model_inputs(batch, self.student, item.host), use_cache=False, logits_to_keep=1)
        assert caught.final is not None
        relates = self.relational.enabled and item.visual.sizes
        check_gradient(
            [state for state in (caught.final, caught.penultimate if relates else None) if state is not None]
        )
        head = self.student.get_output_embeddings()  # type: ignore[operator]
        loss = head_term(
            self._window, item, caught.final, head, self.teacher,
            asked=self.distill, vocabulary=self.vocabulary, beta=self.beta, softcap=self.family.softcap(self.config),
        )  # fmt: skip
        if self.relational.enabled:
            assert caught.penultimate is not None  # `prepare` has checked the depth
            loss = loss + visual_term(self._window, item, caught.penultimate, omega=self.omega)
        if not self._window.pending:
            self._window.close()
        return loss * (dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1)

    def measure(self) -> StepRecord:
        """Values of the step over all ranks; collective and unconditional, before the optimizer steps."""
        self.record = self._window.record()
        return self.record

    def step(self, progress: float, *, skipped: bool = False) -> None:
        """One controller update per optimizer step, after `measure` and that step; weights are quantized for the next.

        progress: the learning rate as a share of its peak, in [0, 1]. skipped: the optimizer did not step, because a loss or a
        gradient was not finite.

        Raises:
            FloatingPointError: more such steps than `training.max_nonfinite_steps`.
        """
        assert self.record is not None, "measure() comes before step()"
        self.steps += 1
        self._window = AccumulationWindow()
        if skipped:
            self.nonfinite_steps += 1
            if self.nonfinite_steps > self.training.max_nonfinite_steps:
                raise FloatingPointError(
                    f"{self.nonfinite_steps} optimizer steps had a non-finite loss or gradient, the last at step {self.steps}; "
                    f"training.max_nonfinite_steps allows {self.training.max_nonfinite_steps}: lower the rate or check the data"
                )
        elif self.distill.enabled and self.record.gate_mean > 0.0:
            self.controller_state = dual.update(self.controller_state, self.record.gdkd)
        for attached in self.attached:
            attached.prefetch_quantized_weights()

    def gate_quantiles(self) -> dict[str, float]:
        """5th, 50th and 95th percentile of this rank's gates in the latest window; empty without distillation."""
        self._window.join()
        return gate_quantiles(self._gates)

    def controller_logs(self) -> dict[str, float]:
        """Return ema (nats) and the share of steps with beta at a bound; empty with a constant weight or no distillation."""
        state = self.controller_state
        if not (self.distill.enabled and self.controller.enabled) or state.ema is None:
            return {}
        return {"ema": state.ema, "share_at_bound": state.share_at_bound}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the model's parameters; JSON-serialisable."""
        return {
            "steps": self.steps, "nonfinite_steps": self.nonfinite_steps, "total_steps": self.total_steps,
            "controller": self.controller_state.to_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: the run has another length, so warm-up, probe and eta would differ.
        """
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved run has {state['total_steps']} optimizer steps and this one {self.total_steps}; warm-up and "
                "controller follow the length, resume with the same number of steps or start anew"
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
