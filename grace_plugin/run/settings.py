"""Check the training arguments of a run before a model is loaded: names, types, ranges, `arguments.py`, and their effect.

Types are those of the installed `transformers.TrainingArguments`, so text (of `--set` or a YAML file) is read as a field asks.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from grace_plugin.data.shown import shown
from grace_plugin.run.arguments import ARGUMENTS, DEFAULTS, NEEDS, SCHEDULE_FREE_DEFAULTS, Rule
from grace_plugin.run.devices import refuse_sharding, use_one_gpu
from grace_plugin.run.field_types import check_name_known, default_of, fields, typed
from grace_plugin.run.memory import check_optimizer

__all__ = [
    "arguments_to_record",
    "check_data_options",
    "read_arguments",
    "training_arguments",
]

_OPTIMIZER_FIELDS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules")


def _check_range(name: str, value: Any, rule: Rule) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value == rule.extra:
        return
    low = (
        f"above {rule.above:g}" if rule.above is not None else f"at least {rule.low:g}" if rule.low is not None else ""
    )
    high = f"at most {rule.high:g}" if rule.high is not None else ""
    bad = not math.isfinite(value)
    bad = bad or (rule.low is not None and value < rule.low) or (rule.above is not None and value <= rule.above)
    if bad or (rule.high is not None and value > rule.high):
        bounds = " and ".join(part for part in (low, high) if part) or "a finite number"
        extra = f", or {rule.extra}" if rule.extra is not None else ""
        raise ValueError(f"{name} must be {bounds}{extra}, got {shown(value)}")


def _check_rule(name: str, value: Any, rule: Rule) -> None:
    if rule.status == "refused":
        allowed = rule.accepted if name in ("remove_unused_columns",) else (default_of(name), *rule.accepted)
        if not any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in allowed):
            said = "..." if name.endswith("token") else shown(value)  # a secret stays out of logs
            raise ValueError(f"{name}={said} cannot be used: {rule.reason}")
    elif isinstance(value, str) and value in rule.values:
        raise ValueError(f"{name}={value} cannot be used: {rule.values[value]}")
    _check_range(name, value, rule)


def _check_needs(given: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse what would do nothing because of another argument.

    given: the user's. asked: with the defaults of train().
    """
    for name, (other, values, wanted) in NEEDS.items():
        if name not in given or given[name] in (None, False, {}):
            continue
        found = asked.get(other, default_of(other))
        held = found if isinstance(found, list) else [found]
        met = (
            any(value in values for value in held)
            if values is not None
            else bool(found) and held not in (["none"], [None])
        )
        if not met:
            raise ValueError(f"{name} needs {wanted}; without it, it does nothing")
    if given.get("max_steps", -1) > 0 and "num_train_epochs" in given:
        raise ValueError(
            "max_steps and num_train_epochs are both given and the second would do nothing; give one of them"
        )
    constant = asked["lr_scheduler_type"] == "constant" and not _schedule_free(asked)
    if constant and given.get("warmup_steps"):
        raise ValueError("warmup_steps does nothing with lr_scheduler_type=constant; take constant_with_warmup")
    if asked["lr_scheduler_type"] in ("constant", "constant_with_warmup") and given.get("lr_scheduler_kwargs"):
        raise ValueError(f"lr_scheduler_kwargs does nothing with lr_scheduler_type={asked['lr_scheduler_type']}")
    if _schedule_free(asked) and 0 < asked["warmup_steps"] < 1:
        raise ValueError(
            f"warmup_steps with optim={asked['optim']} counts steps; a share would multiply the first step's rate"
        )


def _schedule_free(asked: Mapping[str, Any]) -> bool:
    return str(asked.get("optim", "")).startswith("schedule_free")


def _check_reports(value: Any) -> None:
    """Refuse a reporting integration that is unknown or not installed."""
    asked = [name for name in (value if isinstance(value, list) else [value]) if name not in (None, "none", "all")]
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            close = difflib.get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1)
            meant = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(INTEGRATION_TO_CALLBACK)}"
            raise ValueError(f"report_to={shown(name)} is unknown{meant}")
        if name not in get_available_reporting_integrations() and name not in ("flyte", "kubeflow"):
            raise ValueError(f"report_to={name}: its library is not installed")


def read_arguments(given: Mapping[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """Type and check a user's training arguments, and add the defaults of train().

    Args:
        given: by the names of TrainingArguments' fields; values may be text.
        others: names of further arguments, for suggestions.

    Returns:
        What to make TrainingArguments of, `output_dir` aside.

    Raises:
        ValueError: an unknown name, a wrong type or range, a field that GRACE refuses, or one that would do nothing; an engine
            that shards the student.
    """
    refuse_sharding(given.get("fsdp"), given.get("deepspeed"))
    read: dict[str, Any] = {}
    for name, value in given.items():
        check_name_known(name, others)
        rule = ARGUMENTS[name]
        read[name] = value
        if rule.status != "refused":
            read[name] = typed(name, value)
        elif isinstance(value, str):
            with contextlib.suppress(ValueError):  # the refusal says more than the type
                read[name] = typed(name, value)
        _check_rule(name, read[name], rule)
    defaults = DEFAULTS | {"bf16": torch.cuda.is_available() and not read.get("use_cpu")}
    if _schedule_free(read):
        defaults |= SCHEDULE_FREE_DEFAULTS
    asked = {name: value for name, value in (defaults | read).items() if name in fields()}
    _check_needs(read, asked)
    _check_reports(asked["report_to"])
    return asked


def _check_schedule(arguments: TrainingArguments) -> None:
    """Make the learning-rate schedule once, so that keywords it does not take are found here."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kind, given = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs
    try:
        get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=dict(given or {}),
        )
    except (TypeError, ValueError) as error:
        said = str(error).replace("\n", " ")
        raise ValueError(
            f"lr_scheduler_type={kind} does not take lr_scheduler_kwargs={shown(given)}: {said}"
        ) from error


def _check_optimizer_fields(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuse a field of the optimizer that the optimizer does not read."""

    name = arguments.optim.value
    if name.startswith(("galore", "apollo")):
        if not arguments.optim_target_modules:
            raise ValueError(f"optim={name} needs optim_target_modules, for instance all-linear")
        return
    for field in _OPTIMIZER_FIELDS:
        if field not in given or given[field] == default_of(field):
            continue
        try:
            asked = Trainer.get_optimizer_cls_and_kwargs(arguments)
        except ValueError as error:
            raise ValueError(f"optim={name}: cannot use {field}={shown(given[field])}: {error}") from error
        # transformers does not say which fields an optimizer reads: one that gives the same keywords at its default is not read
        without = copy.copy(arguments)
        setattr(without, field, default_of(field))
        if Trainer.get_optimizer_cls_and_kwargs(without) == asked:
            raise ValueError(
                f"{field} does nothing with optim={name}; leave it out, or choose an optimizer that reads it"
            )


def _check_environment(arguments: TrainingArguments) -> None:
    """Refuse what `accelerate launch` asked for and this run would not do."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto", str(arguments.gradient_accumulation_steps)):
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={shown(steps)} in the environment would do nothing; set "
            "gradient_accumulation_steps instead"
        )
    if arguments.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed precision {arguments.mixed_precision} (ACCELERATE_MIXED_PRECISION) cannot be used; take bf16, or no"
        )


def _check_checkpointing(given: Mapping[str, Any]) -> None:
    """Refuse keywords that torch's checkpoint does not have: it would pass them on to the layers, which ignore them."""
    known = set(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"} | {"preserve_rng_state"}
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise ValueError(
            f"gradient_checkpointing_kwargs has no {shown(', '.join(unknown))}; known: {', '.join(sorted(known))}"
        )


def training_arguments(folder: Path, asked: Mapping[str, Any], given: Mapping[str, Any]) -> TrainingArguments:
    """Make the TrainingArguments of a run.

    Args:
        folder: where Trainer's files lie.
        asked: the result of `read_arguments`.
        given: the names that the user gave.

    Raises:
        ValueError: combinations that transformers refuses, a schedule or an optimizer that does not take its arguments.
    """
    _check_checkpointing(asked.get("gradient_checkpointing_kwargs") or {})
    checkpointing = {"use_reentrant": False, **(asked.get("gradient_checkpointing_kwargs") or {})}
    fixed = {"remove_unused_columns": False, "label_names": ["labels"], "gradient_checkpointing_kwargs": checkpointing}
    try:
        arguments = TrainingArguments(output_dir=str(folder), **{"disable_tqdm": None, **asked, **fixed})
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise ValueError(f"transformers refuses these training arguments: {error}") from error
    _check_environment(arguments)
    check_optimizer(arguments)
    _check_schedule(arguments)
    _check_optimizer_fields(arguments, {name: asked[name] for name in given if name in asked})
    return use_one_gpu(arguments)


def arguments_to_record(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training arguments that differ from Trainer's defaults, or from those of train(), as plain values.

    Args:
        asked: the result of `read_arguments`.
    """
    found = {name: value for name, value in asked.items() if name in DEFAULTS or value != default_of(name)}
    # 10 and 10.0 are one value: a run from its run file writes the same file
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in found.items()
    }


def check_data_options(arguments: TrainingArguments, *, stream: bool, scanned: bool) -> None:
    """Refuse an order of samples, or an option of loaders, that the dataset's kind does not have.

    Args:
        arguments: of the run.
        stream: the dataset has no length.
        scanned: every sample is inspected before the run, so that their order is GRACE's own.

    Raises:
        ValueError: names what there is.
    """
    kind, ways = "samples that are made when asked for come", ("random", "sequential")
    if stream:
        kind, ways = "samples of a stream come in its own order,", ("random", "sequential")
    elif scanned:
        kind, ways = (
            "samples of files and lists come in an order by seed, grouped by length,",
            ("random", "group_by_length"),
        )
    strategy = arguments.train_sampling_strategy
    if strategy not in ways:
        raise ValueError(
            f"train_sampling_strategy={strategy} cannot be used: {kind} so only {' or '.join(ways)} is possible"
        )
    if stream and arguments.dataloader_persistent_workers:
        raise ValueError(
            "dataloader_persistent_workers does nothing with a stream, whose workers begin again each epoch"
        )
