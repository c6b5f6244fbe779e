"""GraceModifier: GRACE as an llm-compressor modifier. Recipe fields and lifecycle; the arithmetic is in the objective.

Lifecycle:
    on_initialize   checks everything that can be checked before GPU time is spent, loads the teacher, attaches upstream's
                    schemes and our learned scales
    begin(steps)    called by the training loop, which alone knows the length of the run
    on_finalize     bakes code * scale into the weights, hands the scales to upstream, marks the layers frozen

It refuses schemes whose scales it does not learn, and a run without training: upstream's `oneshot` wants `pipeline="grace"`.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from grace_plugin.export.freeze import set_upstream_scales
from grace_plugin.objective import GraceObjective
from grace_plugin.objective.terms import build_terms, check_terms
from grace_plugin.presets import apply_preset
from grace_plugin.quantizer import QuantFormat, QuantizedLayerGroup, attach, check_layers
from grace_plugin.recipe import (
    CheckedKeys,
    ControllerRecipe,
    DistillRecipe,
    OneshotRecipe,
    RelationalRecipe,
    ScalesRecipe,
    ServingRecipe,
    TeacherRecipe,
    TrainingRecipe,
    check_pattern,
)
from grace_plugin.schemes import (
    check_fused,
    check_groups,
    check_patterns,
    check_preset,
    clear_schemes,
    layers_by_format,
    read_formats,
    stored_dtype,
)
from grace_plugin.teacher import GivenTeacher, StateStore, Teacher, check_pair, open_store, open_teacher
from grace_plugin.trainable import lora_layers, release_masters, upcast_to_fp32
from grace_plugin.upstream import (
    Modifier,
    QuantizationMixin,
    State,
    log_pipeline_advice,
    match_named_modules,
    running_pipeline,
)
from grace_plugin.vllm_constraints import check_kernels
from grace_plugin.vlm import check_depth, family_of
from grace_plugin.vlm.loading import check_finite, check_model

__all__ = ["GraceModifier"]

_VOID = ("start", "end", "update", "weight_observer", "input_observer", "output_observer", "observer")


class GraceModifier(CheckedKeys, Modifier, QuantizationMixin):
    """Gated relational distillation inside quantization-aware training with learned scales.

    min L_CE + beta * L_GDKD + omega * L_RCKA (arXiv 2601.22709); beta is constant, or follows dual ascent on L_GDKD <= tau.

    Fields of `QuantizationModifier` (targets, ignore, scheme, config_groups) say what is quantized; `grace_plugin.recipe`
    documents the blocks. `preset: paper` sets every constant as published; keys given
    next to it win. With `quantize: false` the same objective trains an unquantized student.

        grace_stage:
          grace_modifiers:
            GraceModifier:
              scheme: W4A16
              teacher: {model: Qwen/Qwen2-VL-7B-Instruct}
    """

    refused_keys: ClassVar[tuple[str, ...]] = (*_VOID, "kv_cache_scheme")

    preset: str | None = None
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
    terms: dict[str, Any] = Field(default_factory=dict)

    _objective: GraceObjective | None = PrivateAttr(None)
    _objective_kind: type[GraceObjective] = PrivateAttr(GraceObjective)
    _attached: list[QuantizedLayerGroup] = PrivateAttr(default_factory=list)
    _student: Any = PrivateAttr(None)
    _trainable: list[nn.Parameter] | None = PrivateAttr(None)  # of the caller's, once the model is about to be changed
    _given_teacher: Any = PrivateAttr(None)
    _trains: bool = PrivateAttr(True)
    _teacher: Teacher | None = PrivateAttr(None)
    _store: StateStore | None = PrivateAttr(None)
    _vocabulary: int = PrivateAttr(0)
    _lora_layers: list[str] = PrivateAttr(default_factory=list)
    _dtype: torch.dtype = PrivateAttr(torch.bfloat16)
    _frozen: dict[str, tuple[Tensor, Tensor]] = PrivateAttr(default_factory=dict)
    _export_plan: Any = PrivateAttr(None)  # what the save needs, prepared before the first step

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        return apply_preset(given) if isinstance(given, dict) else given

    _known_scheme = field_validator("scheme", mode="before")(check_preset)
    _typed_groups = field_validator("config_groups", mode="before")(check_groups)
    _known_terms = field_validator("terms")(check_terms)

    @field_validator("targets", "ignore")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        return [check_pattern(name) for name in value]

    @model_validator(mode="after")
    def _has_effect(self) -> GraceModifier:
        # upstream's fields that nothing here reads: a run lasts as long as its loop says, and scales are learned
        void = [name for name in _VOID if getattr(self, name) is not None]
        if void:
            raise ValueError(f"{', '.join(void)} has no effect on a GraceModifier; remove it from the recipe")
        return self

    @model_validator(mode="after")
    def _learnable(self) -> GraceModifier:
        if self.quantize:
            if self.scheme is None and not self.config_groups:
                raise ValueError("GraceModifier: set scheme (for instance W4A16) or config_groups, or quantize: false")
            read_formats(self.resolved_config)
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
        """Codes (int8) and scales (stored dtype) of the forward pass with the final weights; empty before finalize."""
        return self._frozen

    @property
    def saved_dtype(self) -> torch.dtype:
        """Dtype of weights and scales in the checkpoint, known after initialization."""
        return self._dtype

    # a property, because pydantic takes no assignment to a name that is no field
    @property
    def export_plan(self) -> Any:
        """What `grace_plugin.export.rehearse_save` prepared for the save; None before."""
        return self._export_plan

    @export_plan.setter
    def export_plan(self, plan: Any) -> None:
        self._export_plan = plan

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        """Plain values only, so that the saved recipe is plain YAML."""
        return super().model_dump(**({"mode": "json"} | kwargs))

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the pair and the layers, then attach schemes and scales.

        Nothing is changed when a check fails, except that experts held as one parameter are linears by then, which compute
        the same.

        Args:
            state: of the session, with the student as `model`.
            kwargs: `processors` (student's, teacher's) replaces the tokenizers read from the models' own folders.

        Raises:
            ValueError: names the offender and how to fix it.
        """
        model: Any = state.model
        check_model(model, "student")
        family = family_of(model)
        if self.reads_visual_states:
            check_depth(model.config, "student")
        check_finite(dict(model.named_parameters()), "student")
        self._dtype = stored_dtype(model, self.scales.stored_dtype)
        self.scales = self.scales.model_copy(update={"stored_dtype": str(self._dtype).removeprefix("torch.")})
        self._student = model
        if self.quantize:
            family.unfuse_experts(model)
            self.ignore = list(dict.fromkeys([*self.ignore, *family.quantization_ignore()]))
        self._resolved_config = None
        # bfloat16 to float32 is exact, so nothing is lost when a check below fails
        upcast_to_fp32(model, self.training)
        self._check_patterns(model)
        formats = self._check_layers(model) if self.quantize else {}
        self._load_teacher(state, kwargs.get("processors", (None, None)))
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.quantize:
            self._attach(model, formats)
        # upstream chooses the pipeline next, and would recommend `datafree`, which trains nothing
        if running_pipeline() == "grace":
            log_pipeline_advice(False)
        return True

    def _load_teacher(self, state: State, processors: tuple[Any, Any]) -> None:
        model: Any = state.model
        self._vocabulary = rows = model.get_output_embeddings().weight.shape[0]
        if not self.needs_teacher:
            return
        given = self._given_teacher if self._given_teacher is not None else state.teacher_model
        teacher = open_teacher(self.teacher, model, given, self.open_store())
        if self.reads_visual_states:
            check_depth(teacher.config, "teacher")
        teacher_rows = teacher.head()[0].shape[0]
        self._vocabulary = check_pair(model, teacher, processors, student_rows=rows, teacher_rows=teacher_rows)
        self._teacher = teacher

    def _check_patterns(self, model: nn.Module) -> None:
        asked = {"training.freeze": self.training.freeze}
        if self.quantize:
            asked |= {"targets": tuple(sorted(self.resolved_targets)), "ignore": tuple(self.ignore)}
        if self.training.lora is not None:
            asked["training.lora.targets"] = self.training.lora.targets
        check_patterns(asked, model)

    def _check_layers(self, model: nn.Module) -> dict[QuantFormat, dict[str, nn.Linear]]:
        matched = dict(match_named_modules(model, self.resolved_targets, self.ignore))
        if not matched:
            raise ValueError(f"no layer matches targets {sorted(self.resolved_targets)} outside ignore {self.ignore}")
        formats = layers_by_format(self.resolved_config, matched, self._dtype)
        check_fused(formats, model)
        for fmt, linears in formats.items():
            check_layers(linears, fmt)
        check_kernels(formats, self.serving.tensor_parallel_size, family_of(model).row_parallel)
        if self.training.lora is not None:
            self._lora_layers = lora_layers(self.training.lora, matched)
        return formats

    def _attach(self, model: nn.Module, formats: dict[QuantFormat, dict[str, nn.Linear]]) -> None:
        """Attach upstream's schemes and our learned scales."""
        # upstream's schemes first: they replace the layers' forward, and ours has to be the last
        QuantizationMixin.initialize_quantization(self, model)
        asked, lora = self.scales, self.training.lora
        options: dict[str, Any] = {"candidates": asked.candidates, "low": asked.search_low, "high": asked.search_high}
        for fmt, linears in formats.items():
            attached = attach(linears, fmt, **options)
            self._attached.append(attached)
            if lora is not None:
                chosen = linears.keys() & set(self._lora_layers)
                attached.add_lora(sorted(chosen), rank=lora.rank, alpha=lora.alpha, seed=lora.seed)

    def copied(self) -> GraceModifier:
        """Return a modifier of the same recipe for another run, with the objective and the teacher this one was given."""
        # every value, not only those that were set: a list may have been changed in place, and a preset is already filled in
        states = {"initialized_", "finalized_", "started_", "ended_"}
        copy = type(self)(**self.model_dump(exclude=states))
        copy._objective_kind, copy._given_teacher = self._objective_kind, self._given_teacher
        return copy

    def use_teacher(self, teacher: GivenTeacher | None) -> None:
        """Take another teacher than the recipe's: a checkpoint, a loaded model or a `Teacher`; None keeps the recipe's."""
        if isinstance(teacher, (nn.Module, Teacher)):
            self._given_teacher = teacher
            self.teacher = self.teacher.model_copy(update={"model": getattr(teacher, "name_or_path", None) or None})
        elif teacher is not None:
            self.teacher = self.teacher.model_copy(update={"model": os.fspath(teacher)})

    def without_teacher(self) -> None:
        """Load no teacher: the session only saves what an earlier one has trained, and makes no step."""
        self._trains = False

    def use_objective(self, kind: type[GraceObjective]) -> None:
        """Take another objective than `GraceObjective`, for a baseline: a class with the same constructor and protocol."""
        self._objective_kind = kind

    @property
    def named_teacher(self) -> str | None:
        """The teacher's checkpoint where the run will read one by name; None where it needs none or was given a model."""
        reads = self.needs_teacher and self.teacher.kind != "self" and self._given_teacher is None
        return self.teacher.model if reads else None

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss term reads a teacher, in a session that trains."""
        return self._trains and self._new_objective().needs_teacher

    @property
    def reads_visual_states(self) -> bool:
        """Whether a loss term reads the hidden states of visual tokens."""
        return any(term.reads_visual_states for term in self._new_objective().terms if term.enabled)

    def open_store(self) -> StateStore | None:
        """Return the store of a cached teacher, opened and checked once, without loading a model; None for another kind.

        Raises:
            ValueError: no store, or not the one that the recipe asks for.
        """
        if self._store is None and self.teacher.kind == "cached" and self.needs_teacher:
            self._store = open_store(self.teacher, visual=self.reads_visual_states)
        return self._store

    def teacher_to(self, device: torch.device) -> None:
        """Move the teacher to the device of the run."""
        if self._teacher is not None:
            self._teacher.to(device)

    def _new_objective(self) -> GraceObjective:
        blocks = (self.distill, self.relational, self.controller, self.training)
        return self._objective_kind(*blocks, terms=build_terms(self.terms))

    def begin(self, total_steps: int) -> GraceObjective:
        """Start a run of `total_steps` optimizer steps and return its objective."""
        objective = self._new_objective()
        sizes: dict[str, Any] = {"vocabulary": self._vocabulary, "total_steps": total_steps, "trains": self._trains}
        objective.prepare(self._student, self._teacher, attached=self._attached, **sizes)
        self._objective = objective
        return objective

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Write the quantized weights, give the scales to upstream's parameters, mark the layers frozen.

        Raises:
            RuntimeError: the session ends without a single training step, or the forward pass multiplies by other weights.
        """
        if self._objective is None or self._objective.steps == 0:
            self.release()
            raise RuntimeError(
                "the session ends but GRACE trained nothing; call oneshot(..., pipeline='grace') with a dataset, or "
                "grace_plugin.train(...)"
            )
        self._frozen = self._objective.finalize(self._dtype)
        set_upstream_scales(state.model, self._frozen, self._dtype)
        if self._frozen:
            QuantizationMixin.end_calibration(self, state.model)
        self._teacher = None
        return True

    def release(self) -> None:
        """Give back the model of a run that was not finalized: remove scales, schemes and hooks, keep the weights.

        A finalized model, one that was refused, and a second call change nothing.
        """
        if self.finalized_ or self._trainable is None:
            return
        log_pipeline_advice(True)
        for attached in self._attached:
            attached.detach()
        release_masters(self._student)
        if self.quantize:
            clear_schemes(self._student, self.resolved_targets, self.ignore)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self._student = self._teacher = self._objective = self._trainable = None
