"""What decides the result of a run, as plain values by key; a run is resumed only under the values it was started with.

Compared are the training arguments that change a step, the number of steps and processes, limits of samples, the recipe, the
content and order of the dataset, weights and config of student and teacher, and the processor. Other versions or another device
are a warning, because they may change the last bits. Not compared is what changes no value: the number of loader workers,
gradient checkpointing, logging, saving. The samples of a stream are compared by `StreamLoader`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from grace_plugin.data import ConversationCollator, Prepared
from grace_plugin.data.key import processor_settings
from grace_plugin.digest import model_digest, value_digest
from grace_plugin.export.record import checkpoint_digest, environment
from grace_plugin.modifier import GraceModifier
from grace_plugin.teacher import Teacher

__all__ = ["SCHEDULE_KEYS", "check_same_run", "dataset_fingerprint", "describe_run"]

logger = logging.getLogger(__name__)

#: fields of TrainingArguments that change what a step does
_ARGUMENTS = tuple(
    """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args optim_target_modules
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm per_device_train_batch_size gradient_accumulation_steps
    dataloader_drop_last train_sampling_strategy seed data_seed bf16 fp16 tf32 full_determinism torch_compile
    torch_compile_backend torch_compile_mode use_liger_kernel neftune_noise_alpha label_smoothing_factor
    ignore_data_skip""".split()
)

#: keys whose change puts the new values into optimizer and schedule
SCHEDULE_KEYS = set(
    """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2
    adam_epsilon recipe.scales.learning_rate_multiplier""".split()
)

_NEW_VALUE = "the steps from here on use the new value"
_NEW_ORDER = (
    "samples of the running epoch are counted in the new batches and order, so some are seen twice or not at all in it"
)
_NEVER = {
    "max_steps": "the warm-up follows the number of steps",
    "optim": "its states are another optimizer's",
    "recipe.controller": "the resume state holds the weight of distillation",
    "recipe.scheme": "the resume state holds other scales",
    "recipe.config_groups": "the resume state holds other scales",
    "recipe.targets": "the resume state holds other scales",
    "recipe.ignore": "the resume state holds other scales",
    "recipe.quantize": "the resume state holds other parameters",
    "recipe.training": "the resume state holds other parameters",
}
_ORDER_KEYS = """per_device_train_batch_size gradient_accumulation_steps world_size dataloader_drop_last seed data_seed
    train_sampling_strategy dataset max_length max_pixels""".split()
_EFFECTS = {
    **dict.fromkeys(_ORDER_KEYS, _NEW_ORDER),
    "student": "weights come from the resume state, config and processor from the new student",
    "teacher": "the steps from here on learn from the new teacher",
    "processor": "the steps from here on see other tokens or pixels, and the new processor is saved",
}


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back, keys in their order, which is the order of listed differences."""
    return json.loads(json.dumps(value, default=str))


def dataset_fingerprint(dataset: Any, samples: str | None) -> dict[str, Any]:
    """Return the number of used samples, a digest of those that were given, and one of the order of the used ones.

    Args:
        dataset: what the run trains on.
        samples: digest of the dataset as it was given, None for a stream.
    """
    count = len(dataset) if hasattr(dataset, "__len__") else None
    used = value_digest(dataset.numbers) if isinstance(dataset, Prepared) else None
    return {"samples": count, "content": samples, "used": used}


def _teacher(modifier: GraceModifier, given: Any) -> Any:
    """Return what identifies the teacher."""
    asked = modifier.teacher
    if isinstance(given, Teacher):
        return {"class": type(given).__name__, "name": str(getattr(given, "name_or_path", ""))}
    if isinstance(given, nn.Module):
        return {"weights": model_digest(given)}
    store = modifier.open_store()
    if store is not None:
        return {"cache": value_digest(_plain(store.identity))}
    if asked.model is None or not modifier.needs_teacher:
        return {"kind": asked.kind}
    found = checkpoint_digest(asked.model, asked.revision)
    # weights in another format than safetensors have no digest: the name alone identifies them
    return {"model": asked.model} if found is None else {"files": found}


def _flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), one)
    else:
        yield name, value


def describe_run(
    arguments: Any,
    student: Any,
    modifier: GraceModifier,
    collator: ConversationCollator,
    dataset: Any,
    recorded: Mapping[str, Any],
    *,
    teacher: Any,
    total_steps: int,
) -> dict[str, Any]:
    """Return all that decides a run's result, plain values by key.

    Args:
        arguments: TrainingArguments.
        student: as loaded, before the session.
        modifier: of the recipe, before the session.
        collator: the run's, with its processor and limits.
        dataset: what the run trains on.
        recorded: `RunInputs.content`, with the digests of the files that were given.
        teacher: as it was passed.
        total_steps: optimizer steps.
    """
    recipe = modifier.model_dump(exclude={"index", "initialized_", "finalized_", "started_", "ended_"})
    recipe["teacher"] = {k: v for k, v in recipe["teacher"].items() if k not in ("model", "cache", "check_cache")}
    asked = {name: getattr(arguments, name, None) for name in _ARGUMENTS}
    values = {
        **{name: getattr(value, "value", value) for name, value in asked.items()},
        "max_steps": total_steps,
        "world_size": arguments.world_size,
        "max_length": collator.max_length,
        "max_pixels": collator.max_pixels,
        "packing": collator.packed,
        "special_tokens": sorted(collator.segmenter.special_tokens),
        "dataset": dataset_fingerprint(dataset, recorded["dataset"]["fingerprint"]),
        "student": {
            **_weights(student, recorded["model"].get("fingerprint")),
            "config": value_digest(_known_config(student)),
            "attention": getattr(student.config, "_attn_implementation", None),
        },
        "teacher": _teacher(modifier, teacher),
        "processor": processor_settings(collator.processor),
        "recipe": recipe,
        "environment": environment(),
    }
    return dict(_flat("", _plain(values)))


def _weights(student: nn.Module, files: str | None) -> dict[str, Any]:
    """Return the digest of the student's files, or of its tensors where it was passed loaded."""
    return {"files": files} if files is not None else {"weights": model_digest(student)}


def _known_config(student: Any) -> dict[str, Any]:
    """Return a model's config without its path and the version that wrote it."""
    found = _plain(student.config.to_dict())
    return {key: value for key, value in found.items() if key not in ("_name_or_path", "transformers_version")}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _covered(key: str, names: Iterable[str]) -> str | None:
    """Return the name that covers a key: the key itself or a block it is in."""
    return next((name for name in names if key == name or key.startswith(f"{name}.")), None)


def check_same_run(
    started: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str] = (), *, state: Any = ""
) -> set[str]:
    """Refuse to resume a run under other values than it was started with; returns the keys that may and do differ.

    Args:
        started, now: of `describe_run`.
        allowed: keys, or blocks of keys as "recipe" and "dataset", that may differ.
        state: the resume state, to name it.

    Raises:
        ValueError: lists each other difference with both values, and what to do.
    """
    missing = "not recorded"
    keys = [*now, *(key for key in started if key not in now)]
    differing = {
        key: (started.get(key, missing), now.get(key, missing))
        for key in keys
        if started.get(key, missing) != now.get(key, missing)
    }
    said = {key: f"{key}: {_shown(old)} -> {_shown(new)}" for key, (old, new) in differing.items()}
    environment_changes = [text for key, text in said.items() if key.startswith("environment.")]
    if environment_changes:
        logger.warning("resuming in another environment, last bits may differ: %s", "; ".join(environment_changes))
    said = {key: text for key, text in said.items() if not key.startswith("environment.")}
    unknown = [name for name in allowed if not any(_covered(key, [name]) for key in keys)]
    known = sorted({key if "." not in key else key.partition(".")[0] for key in now} - {"environment", *_NEVER})
    if unknown:
        raise ValueError(
            f"allow_resume_changes: no such key {', '.join(unknown)[:200]}; keys are {', '.join(known)[:900]}"
        )
    never = {key: reason for key in said if (name := _covered(key, _NEVER)) and (reason := _NEVER[name])}
    refused = {key: text for key, text in said.items() if key in never or _covered(key, allowed) is None}
    if refused:
        listed = "; ".join(f"{text} (never: {never[key]})" if key in never else text for key, text in refused.items())
        can = [key for key in refused if key not in never]
        how = f", or allow the change: --allow-resume-changes {' '.join(can[:20])}" if can and not never else ""
        raise ValueError(
            f"{state} was started with other values, and a resumed run must give the bits of an uninterrupted one: {listed}. "
            f"Resume with the values it was started with{how}, or start another run in another output_dir"
        )
    for key, text in said.items():
        logger.warning(
            "allowed change: %s; %s", text, _EFFECTS[name] if (name := _covered(key, _EFFECTS)) else _NEW_VALUE
        )
    return set(said)
