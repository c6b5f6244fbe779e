"""The blocks of a `GraceModifier` recipe as frozen pydantic models.

Every default is the decision recorded in the method (arXiv 2601.22709 and the project's own measurements). Unknown keys are
refused, values are checked on reading, before any model is loaded. The models hold no tensors and import nothing heavy, so a
recipe can be read and checked in a process without a GPU.

    GraceModifier:
      targets: [Linear]
      scheme: W4A16
      teacher: {model: path/or/hub-id, kind: resident}
      distill: {temperature: 2.0, alpha: 1.0, beta: 4.0}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "CheckedKeys",
    "ControllerRecipe",
    "DistillRecipe",
    "LoraRecipe",
    "OneshotRecipe",
    "RelationalRecipe",
    "ScalesRecipe",
    "ServingRecipe",
    "TeacherRecipe",
    "TrainingRecipe",
    "check_pattern",
    "problems",
    "shown",
]

_PATTERN_LENGTH, _LISTED, _SHOWN = 1000, 8, 80


def shown(value: Any) -> str:
    """Return a value as a message shows it: cut, and on one line."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print a long one
        return "an integer of more than 77 digits"
    text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _no_boolean(value: Any) -> Any:
    # YAML reads yes, no, on and off as booleans, and pydantic would read a boolean as 1 or 0; as a word it is no number
    return shown(value) if isinstance(value, bool) else value


def _no_auto(value: Any) -> Any:
    if value == "auto":
        raise ValueError(
            "must be a number; 'auto' was removed, because it held the weight within 0.41 to 0.56 of a constant 0.5: "
            "leave the block out for that constant"
        )
    return value


def check_pattern(pattern: str) -> str:
    """Refuse a name or "re:" pattern that matches nothing or is no regular expression.

    How long a pattern takes depends on the names it is matched with, so that is measured where they are known, by
    `grace_plugin.schemes.check_patterns`.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not pattern.strip() or pattern == "re:":
        raise ValueError("must not hold an empty name")
    if len(pattern) > _PATTERN_LENGTH:
        raise ValueError(f"must hold names of at most {_PATTERN_LENGTH:,} characters, got {shown(pattern)}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"must hold regular expressions, and {shown(pattern)} is none: {error}") from None
    return pattern


Positive = Annotated[float, Field(gt=0.0, le=1.0e9, allow_inf_nan=False), BeforeValidator(_no_boolean)]
NonNegative = Annotated[float, Field(ge=0.0, le=1.0e9, allow_inf_nan=False), BeforeValidator(_no_boolean)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False), BeforeValidator(_no_boolean)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(_no_boolean)]
Steps = Annotated[int, Field(ge=0, le=2**31 - 1), BeforeValidator(_no_boolean)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), BeforeValidator(_no_boolean)]  # what every generator takes
Pattern = Annotated[str, AfterValidator(check_pattern)]


class Block(BaseModel):
    """A block of the recipe: immutable, and an unknown key is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_keys(given: Mapping[Any, Any], model: type[BaseModel], where: str, inside: str = "") -> None:
    known = [name for name in model.model_fields if not name.endswith("_")]  # the others are upstream's own state
    listed = [name for name in known if name not in getattr(model, "refused_keys", ())]
    for key, value in given.items():
        if key not in known:
            near = "".join(f"did you mean {name!r}? " for name in difflib.get_close_matches(str(key), listed, 1))
            raise ValueError(f"unknown key {shown(key)} in {where}; {near}known: {', '.join(listed)}")
        kind = model.model_fields[key].annotation
        for block in (kind, *get_args(kind)):
            if isinstance(value, Mapping) and isinstance(block, type) and issubclass(block, Block):
                _check_keys(value, block, inside + key, f"{inside}{key}.")


class CheckedKeys:
    """Before a pydantic model's bases: what is wrong with its values is a ValueError of a sentence or a list, with the keys.

    An unknown key, also a block's, is named with the nearest that is known.

    Attributes:
        refused_keys: fields of the bases that are refused when they are set; a message does not suggest them.
    """

    refused_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **given: Any) -> None:
        name = type(self).__name__
        _check_keys(given, cast("type[BaseModel]", type(self)), name)
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ValueError(problems(error, given)) from None
        except (TypeError, AttributeError, KeyError, NotImplementedError, OverflowError) as error:
            # compressed-tensors' validators compare and call values before their type was checked
            raise ValueError(
                f"{name}: compressed-tensors cannot use what scheme, config_groups or kv_cache_scheme holds: {_cut(str(error))}"
            ) from error


_WANTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "a string",
    "finite_number": "a finite number",
    **dict.fromkeys(("model", "dict"), "a mapping"),
    **dict.fromkeys(("list", "tuple"), "a list"),
}


def problems(error: ValidationError, given: Mapping[Any, Any]) -> str:
    """Return what pydantic found in `given` in plain words: a sentence, or a list with a line for each key."""
    # a value that fits no part of a union has an error for each part
    wanted: dict[str, tuple[list[str], str]] = {}
    told: list[str] = []
    for one in error.errors(include_url=False):
        path, kind = _path(one["loc"], given), one["type"]
        if kind in ("value_error", "assertion_error"):
            text = _cut(one["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, "))
            named = not path or path.split(".")[0] in text
            told.append(text if named else f"{path} {text}" if text.startswith("must ") else f"{path}: {text}")
        elif kind == "extra_forbidden":
            told.append(f"unknown key {path}")
        elif kind == "missing":
            told.append(f"{path} has no {one['loc'][-1]}".strip())
        else:
            word = _WANTED.get(kind) or _WANTED.get(re.sub("_(attributes_)?(type|parsing|from_float)$", "", kind))
            word = word or _cut(one["msg"].removeprefix("Input should be "))
            words, got = wanted.setdefault(path, ([], f", got {shown(one['input'])}"))
            words.append(word)
            if kind in ("literal_error", "enum") and isinstance(one["input"], str):
                near = difflib.get_close_matches(one["input"], re.findall("'([^']*)'", word), 1)
                wanted[path] = words, got + "".join(f"; did you mean {name!r}?" for name in near)
    told += [f"{path} must be {' or '.join(dict.fromkeys(words))}{got}" for path, (words, got) in wanted.items()]
    told = list(dict.fromkeys(told))
    if len(told) == 1:
        return told[0]
    more = [f"and {len(told) - _LISTED} more"] if len(told) > _LISTED else []
    return "\n".join([f"{len(told)} values cannot be used:", *(f"  {one}" for one in told[:_LISTED] + more)])


def _path(parts: Iterable[int | str], given: Any) -> str:
    """Return the keys of an error's location, without what pydantic adds for the parts of a union."""
    path = ""
    for part in parts:
        if isinstance(given, Mapping) and part in given:
            given, path = given[part], f"{path}.{_cut(str(part), 60)}"
        elif isinstance(given, list | tuple) and isinstance(part, int) and part < len(given):
            given, path = given[part], f"{path}[{part}]"
    return path.removeprefix(".")


def _cut(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


class TeacherRecipe(Block):
    """Where the teacher's hidden states come from.

    kind: "resident" keeps the teacher in memory next to the student; "offload" keeps it in host memory and streams its layers;
        "cached" reads states that `grace teacher cache` wrote, and loads the teacher's head alone; "self" takes the student's
        own unquantized weights, for runs that learn scales and leave the quantized layers' weights as they are.
    model: folder or hub id of the teacher's checkpoint; not needed when a loaded teacher is passed to the entry point. A
        block that is only a name is this field.
    dtype: "auto" keeps the checkpoint's dtype; the teacher is never trained.
    cache: folder of the written states, for "cached" alone.
    check_cache: compare every file of the cache with its checksum before the run, which reads the whole cache once.
    """

    kind: Literal["resident", "offload", "cached", "self"] = "resident"
    model: str | None = None
    revision: str = "main"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    cache: str | None = None
    check_cache: bool = True

    @model_validator(mode="after")
    def _fits_its_kind(self) -> TeacherRecipe:
        if self.kind == "cached" and self.cache is None:
            raise ValueError("teacher.kind: cached needs teacher.cache, the folder that `grace teacher cache` wrote")
        if self.kind != "cached" and self.cache is not None:
            raise ValueError(
                f"teacher.cache is read by kind: cached alone, not by {self.kind}; set the kind or drop cache"
            )
        if self.kind == "self" and self.model is not None:
            raise ValueError(
                f"teacher.kind: self takes the student's own weights and cannot take teacher.model ({self.model}) as well; "
                "drop one of them"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class DistillRecipe(Block):
    """Confidence-gated decoupled distillation (paper, GDKD): `(alpha * TCKD + beta * NCKD) * T^2`, gated by g^k.

    chunk: supervised positions whose logits exist at one time (memory only; the value does not depend on it); by default as
        many as 209 MiB of logits hold.
    """

    enabled: bool = True
    temperature: Positive = 2.0
    alpha: Positive = 1.0
    beta: Positive = 4.0
    gate_sharpness: NonNegative = 1.0
    chunk: Count | None = None

    @model_validator(mode="after")
    def _weight_order(self) -> DistillRecipe:
        if self.beta <= self.alpha:
            raise ValueError(
                f"distill.beta ({self.beta}) must exceed distill.alpha ({self.alpha}): decoupled distillation weighs the "
                "other classes above the target class; raise beta or lower alpha"
            )
        return self


class RelationalRecipe(Block):
    """Relational CKA over visual tokens: weight omega, with a linear warm-up in optimizer steps.

    The warm-up takes `warmup_steps`, or `warmup_share` of the run if that is shorter.
    """

    enabled: bool = True
    weight: NonNegative = 3.0
    warmup_steps: Steps = 400
    warmup_share: Share = 0.05


class ControllerRecipe(Block):
    """Weight of the distillation term (beta): constant by default, or the paper's projected dual ascent on L_GDKD <= tau.

    enabled: False keeps beta at `beta_start`; the other keys then have no effect and are refused.
    tau: bound of L_GDKD, nats. eta: change of beta per optimizer step and nat of violation. Both defaults, and the bounds of
        beta, are those of the authors' published training script for a 2B student.
    """

    enabled: bool = False
    beta_start: NonNegative = 0.5
    beta_min: NonNegative = 0.1
    beta_max: Positive = 1.0
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False), BeforeValidator(_no_boolean)] = 0.99
    tau: Annotated[Positive, BeforeValidator(_no_auto)] = 3.0
    eta: Annotated[Positive, BeforeValidator(_no_auto)] = 0.003

    @model_validator(mode="after")
    def _bounds(self) -> ControllerRecipe:
        if not self.enabled:
            fields = type(self).model_fields
            # compared with the defaults, because a saved recipe lists every key
            void = [name for name in list(fields)[2:] if getattr(self, name) != fields[name].default]
            if void:
                raise ValueError(
                    f"controller.{void[0]} has an effect with controller.enabled: true alone; add that for the paper's "
                    f"controller, or drop {', '.join(void)} for the constant weight beta_start"
                )
        elif not self.beta_min <= self.beta_start <= self.beta_max:
            raise ValueError(
                f"controller.beta_start ({self.beta_start}) must lie in [beta_min, beta_max] = "
                f"[{self.beta_min}, {self.beta_max}]"
            )
        return self


class ScalesRecipe(Block):
    """Learned step sizes (LSQ): start value by search, own learning rate, rounded to the stored dtype in every forward.

    stored_dtype: dtype of weights and scales in the written checkpoint; "auto" is the source checkpoint's dtype.
    """

    learning_rate_multiplier: Positive = 10.0
    candidates: Annotated[int, Field(ge=2, le=10_000), BeforeValidator(_no_boolean)] = 20
    search_low: Positive = 0.3
    search_high: Positive = 1.2
    stored_dtype: Literal["auto", "bfloat16", "float16"] = "auto"

    @model_validator(mode="after")
    def _range(self) -> ScalesRecipe:
        if self.search_low >= self.search_high:
            raise ValueError(f"scales.search_low ({self.search_low}) must be below search_high ({self.search_high})")
        return self


class ServingRecipe(Block):
    """What the checkpoint is meant to be served on, so that shapes no kernel takes are refused before training."""

    tensor_parallel_size: Count = 1


class LoraRecipe(Block):
    """Low-rank update (LoRA, arXiv 2106.09685) under fake quantization: what is quantized is `W + alpha / rank * B A`.

    targets: names or "re:" patterns of quantized layers that get an update; all of them when empty.
    seed: of the start values of A (B starts at zero); the same in every process.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: tuple[Pattern, ...] = ()
    seed: Seed = 0


class TrainingRecipe(Block):
    """What trains, and when a run that goes wrong stops.

    method: "full" trains projector, decoder and scales; "scales" the scales alone; "lora" scales and low-rank updates. With the
        last two every other weight keeps its value and the dtype it was loaded in.
    norms: train the normalization layers in addition to scales or LoRA ("full" trains them anyway).
    lora: the low-rank updates; the default block is written in for method "lora".
    freeze: extra module-name patterns ("re:..." or exact) kept frozen, on top of the family's vision tower.
    master_weights: "float32" trains float32 copies whatever dtype was loaded (BF16 weights do not move at small rates);
        "keep" trains the loaded dtype. Scales and low-rank updates are float32 either way.
    max_nonfinite_steps: optimizer steps with a non-finite loss or gradient that are skipped before the run stops.
    """

    method: Literal["full", "scales", "lora"] = "full"
    norms: bool = False
    lora: LoraRecipe | None = None
    freeze: tuple[Pattern, ...] = ()
    master_weights: Literal["float32", "keep"] = "float32"
    max_nonfinite_steps: Steps = 10

    @model_validator(mode="before")
    @classmethod
    def _default_lora(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("method") == "lora" and given.get("lora") is None:
            return given | {"lora": {}}
        return given

    @model_validator(mode="after")
    def _lora_is_asked_for(self) -> TrainingRecipe:
        if self.lora is not None and self.method != "lora":
            raise ValueError(
                f"training.lora is given but training.method is {self.method!r}; set method: lora or drop it"
            )
        return self


class OneshotRecipe(Block):
    """The short run that `oneshot(pipeline="grace")` makes over the calibration loader; `optim` as in TrainingArguments."""

    epochs: Positive = 1.0
    learning_rate: Positive = 1.0e-5
    warmup_share: Share = 0.05
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    gradient_accumulation_steps: Count = 1
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    seed: Seed = 0
    optim: Literal["adamw_torch_fused", "adamw_torch", "adafactor"] = "adamw_torch_fused"
