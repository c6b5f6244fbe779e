"""GraceModifier: GRACE as an llm-compressor modifier. Recipe fields and lifecycle only; the arithmetic lies beside it.

Lifecycle:
    on_initialize   checks everything that can be checked before GPU time is spent, loads the teacher, attaches upstream's
                    schemes and our learned scales
    begin(steps)    called by the training loop, which alone knows the length of the run
    on_finalize     bakes code * scale into the weights, hands the scales to upstream, marks the layers frozen

It refuses schemes whose scales it does not learn, and a run in which nothing was trained: `oneshot` must be called with
`pipeline="grace"`, upstream cannot infer a plugin's pipeline.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from grace_plugin.kernels import check_kernels
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer.attach import Attached, Format, attach, check_layers
from grace_plugin.recipe import (
    ControllerRecipe,
    DistillRecipe,
    OneshotRecipe,
    RelationalRecipe,
    ScalesRecipe,
    ServingRecipe,
    TeacherRecipe,
    TrainingRecipe,
)
from grace_plugin.schemes import check_fused, check_schemes, group_of, stored_dtype
from grace_plugin.teacher import MISSING, load_teacher
from grace_plugin.trainable import lora_layers, raise_masters
from grace_plugin.upstream import Modifier, QuantizationMixin, State, match_named_modules
from grace_plugin.vlm import (
    check_image_processors,
    check_pixels,
    family_of,
    load_image_processor,
    load_tokenizer,
    shared_vocabulary,
)

__all__ = ["GraceModifier"]


class GraceModifier(Modifier, QuantizationMixin):
    """Gated relational distillation inside quantization-aware training with learned scales.

    min L_CE + beta * L_GDKD + omega * L_RCKA, beta by dual ascent on L_GDKD <= tau (arXiv 2601.22709).

    Fields of `QuantizationModifier` (targets, ignore, scheme, config_groups) say what is quantized; the blocks teacher,
    distill, relational, controller, scales, training and oneshot are documented in `grace_plugin.recipe`. With
    `quantize: false` the same objective trains an unquantized student.

        grace_stage:
          grace_modifiers:
            GraceModifier:
              scheme: W4A16
              teacher: {model: Qwen/Qwen2-VL-7B-Instruct}
    """

    ignore: list[str] = Field(default_factory=list)
    quantize: bool = True
    teacher: TeacherRecipe = Field(default_factory=TeacherRecipe)
    distill: DistillRecipe = Field(default_factory=DistillRecipe)
    relational: RelationalRecipe = Field(default_factory=RelationalRecipe)
    controller: ControllerRecipe = Field(default_factory=ControllerRecipe)
    scales: ScalesRecipe = Field(default_factory=ScalesRecipe)
    serving: ServingRecipe = Field(default_factory=ServingRecipe)
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    oneshot: OneshotRecipe = Field(default_factory=OneshotRecipe)

    _objective: GraceObjective | None = PrivateAttr(None)
    _attached: list[Attached] = PrivateAttr(default_factory=list)
    _student: Any = PrivateAttr(None)
    _given_teacher: Any = PrivateAttr(None)
    _teacher_model: Any = PrivateAttr(None)
    _vocabulary: int = PrivateAttr(0)
    _lora_layers: list[str] = PrivateAttr(default_factory=list)
    _dtype: torch.dtype = PrivateAttr(torch.bfloat16)
    _frozen: dict[str, tuple[Tensor, Tensor]] = PrivateAttr(default_factory=dict)

    @field_validator("teacher", mode="before")
    @classmethod
    def _teacher_by_name(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _learnable(self) -> GraceModifier:
        if self.quantize:
            if self.scheme is None and not self.config_groups:
                raise ValueError("GraceModifier: set scheme (for instance W4A16) or config_groups, or quantize: false")
            check_schemes(self.resolved_config)
        elif self.training.method != "full":
            raise ValueError(f"training.method {self.training.method!r} learns scales; it needs quantize: true")
        return self

    @property
    def objective(self) -> GraceObjective:
        """The objective of the running session.

        Raises:
            RuntimeError: before `begin`.
        """
        if self._objective is None:
            raise RuntimeError("GraceModifier has no run yet; call begin(total_steps) after the session is initialized")
        return self._objective

    @property
    def frozen(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes (int8) and scales (stored dtype) of the last training forward by layer name; empty before finalize."""
        return self._frozen

    @property
    def saved_dtype(self) -> torch.dtype:
        """Dtype of weights and scales in the checkpoint, known after initialization."""
        return self._dtype

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        """Plain values only, so that the saved recipe is plain YAML."""
        return super().model_dump(**({"mode": "json"} | kwargs))

    # ---- lifecycle ----------------------------------------------------------------------------------------------------

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the pair and the layers, attach schemes and scales; nothing is changed when a check fails, but that
        experts held as one parameter are linears by then, which compute the same.

        Keyword `processors` (student's, teacher's) replaces the tokenizers read from the models' own folders.

        Raises:
            ValueError: names the offender and the way out.
        """
        model: Any = state.model
        family = family_of(model)
        self._dtype = stored_dtype(model, self.scales.stored_dtype)
        self._student = model
        if self.quantize:
            family.open_experts(model)
            self.ignore = list(dict.fromkeys([*self.ignore, *family.quantization_ignore()]))
        self._resolved_config = None
        raise_masters(model, self.training)  # exact, so nothing is lost when a check below fails
        formats = self._check_layers(model) if self.quantize else {}
        self._load_teacher(state, kwargs.get("processors", (None, None)))
        if self.quantize:
            self._attach(model, formats)
        return True

    def _load_teacher(self, state: State, processors: tuple[Any, Any]) -> None:
        model: Any = state.model
        rows = model.get_output_embeddings().weight.shape[0]
        self._vocabulary = rows
        if not (self.distill.enabled or self.relational.enabled):
            return
        teacher: Any = self._given_teacher if self._given_teacher is not None else state.teacher_model
        if teacher is None:
            if self.teacher.model is None:
                raise ValueError(MISSING)
            teacher = load_teacher(self.teacher.model, revision=self.teacher.revision, dtype=self.teacher.dtype)
        check_pixels(family_of(model), model.config, family_of(teacher), teacher.config)
        own, theirs = processors
        check_image_processors(own or load_image_processor(model), theirs or load_image_processor(teacher))
        self._vocabulary = shared_vocabulary(
            own or load_tokenizer(model, "student"),
            theirs or load_tokenizer(teacher, "teacher"),
            student_rows=rows,
            teacher_rows=teacher.get_output_embeddings().weight.shape[0],
        )
        self._teacher_model = teacher

    def _check_layers(self, model: nn.Module) -> dict[tuple[int, int | None], dict[str, nn.Linear]]:
        matched = dict(match_named_modules(model, self.resolved_targets, self.ignore))
        if not matched:
            raise ValueError(f"no layer matches targets {sorted(self.resolved_targets)} beside ignore {self.ignore}")
        formats = group_of(self.resolved_config, matched)
        check_fused(formats, model)
        for (num_bits, group_size), linears in formats.items():
            check_layers(linears, Format(group_size, num_bits, self._dtype))
        check_kernels(formats, self.serving.tensor_parallel_size)
        if self.training.lora is not None:
            self._lora_layers = lora_layers(self.training.lora, matched)
        return formats

    def _attach(self, model: nn.Module, formats: dict[tuple[int, int | None], dict[str, nn.Linear]]) -> None:
        """Upstream's schemes first, whose forward is then replaced by the one that learns the scales."""
        QuantizationMixin.initialize_quantization(self, model)
        asked, lora = self.scales, self.training.lora
        options: dict[str, Any] = {"candidates": asked.candidates, "low": asked.search_low, "high": asked.search_high}
        for (num_bits, group_size), linears in formats.items():
            self._attached.append(
                attach(linears, group_size=group_size, num_bits=num_bits, stored_dtype=self._dtype, **options)
            )
            if lora is not None:
                chosen = [name for name in linears if name in self._lora_layers]
                self._attached[-1].add_lora(chosen, rank=lora.rank, alpha=lora.alpha, seed=lora.seed)

    def use_teacher(self, teacher: str | os.PathLike[str] | nn.Module | None) -> None:
        """Take another teacher than the recipe's: a checkpoint or a loaded model; None keeps the recipe's."""
        if isinstance(teacher, nn.Module):
            self._given_teacher = teacher
            self.teacher = self.teacher.model_copy(update={"model": getattr(teacher, "name_or_path", None) or None})
        elif teacher is not None:
            self.teacher = self.teacher.model_copy(update={"model": os.fspath(teacher)})

    def teacher_to(self, device: torch.device) -> None:
        """Move the teacher to the device of the run."""
        if self._teacher_model is not None:
            self._teacher_model.to(device)

    def begin(self, total_steps: int) -> GraceObjective:
        """Start a run of `total_steps` optimizer steps and return its objective."""
        objective = GraceObjective(self.distill, self.relational, self.controller, self.training)
        objective.prepare(
            self._student, self._teacher_model, vocabulary=self._vocabulary, total_steps=total_steps,
            attached=self._attached,
        )  # fmt: skip
        self._objective = objective
        return objective

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Bake the codes, hand the scales to upstream's parameters, mark the layers frozen.

        Raises:
            RuntimeError: the session ends without a single training step.
        """
        if self._objective is None or self._objective.steps == 0:
            raise RuntimeError(
                "the session ends but GRACE trained nothing; call oneshot(..., pipeline='grace') with a dataset, or "
                "grace_plugin.train(...)"
            )
        model: Any = state.model
        self._frozen = self._objective.finalize(self._dtype)
        modules = dict(model.named_modules())
        for name, (_, scale) in self._frozen.items():
            modules[name].weight_scale = nn.Parameter(scale.clone(), requires_grad=False)
        for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
            config.dtype = self._dtype  # what the save path writes into config.json
        if self._frozen:
            QuantizationMixin.end_calibration(self, model)
        self._teacher_model = None
        return True
