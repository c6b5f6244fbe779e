"""Attributes of upstream's objects that the package reads; a failing case names the attribute and what breaks without it.

The imports themselves, with their reasons, are in `grace_plugin/upstream.py`; `test_upstream.py` pins their behaviour.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

CORE, PIPELINES = "llmcompressor.core", "llmcompressor.pipelines"
MIXIN = "llmcompressor.modifiers.quantization.quantization.mixin:QuantizationMixin"
FORMATS = "compressed_tensors.quantization"

#: "package.module:attribute.path" -> what needs it
ATTRIBUTES = {
    "llmcompressor.modifiers:ModifierFactory._registered_registry": "a recipe may name a modifier of the user's own",
    "llmcompressor.modifiers:ModifierFactory.register": "a YAML recipe resolves GraceModifier by name",
    "llmcompressor.modifiers:Modifier.finalized_": "a finalized model is not given back",
    f"{MIXIN}.initialize_quantization": "schemes are attached to the targeted layers by upstream's own rules",
    f"{MIXIN}.end_calibration": "upstream marks the layers frozen before its save path runs",
    f"{MIXIN}.resolved_config": "the formats of all groups are read from it",
    f"{MIXIN}._resolved_config": "it is cleared, and so resolved again, when `ignore` has been completed",
    f"{MIXIN}.resolved_targets": "targets of all groups are read from it",
    f"{CORE}:State.model": "lifecycle methods read the student from it",
    f"{CORE}:State.teacher_model": "a teacher that is given to the session is read from it",
    f"{CORE}.session:CompressionSession.initialize": "train() begins its session",
    f"{CORE}.session:CompressionSession.finalize": "train() ends its session",
    f"{CORE}.session:CompressionSession.lifecycle": "the recipe of a session is read from it",
    f"{CORE}.lifecycle:CompressionLifecycle.recipe": "our pipeline finds its modifiers in it",
    f"{CORE}.lifecycle:CompressionLifecycle.initialized_": "training events are fired in a session alone",
    f"{CORE}:LifecycleCallbacks.batch_start": "training event 1 of 5",
    f"{CORE}:LifecycleCallbacks.loss_calculated": "training event 2 of 5",
    f"{CORE}:LifecycleCallbacks.optim_pre_step": "training event 3 of 5",
    f"{CORE}:LifecycleCallbacks.optim_post_step": "training event 4 of 5",
    f"{CORE}:LifecycleCallbacks.batch_end": "training event 5 of 5",
    f"{PIPELINES}:CalibrationPipeline.register_value": "oneshot(pipeline='grace') finds our pipeline",
    f"{PIPELINES}:CalibrationPipeline.registered_names": "our pipeline is registered once",
    f"{PIPELINES}:CalibrationPipeline.from_modifiers": "other modifiers run their own pipelines",
    f"{PIPELINES}.registry:logger": "its advice to use another pipeline is silenced",
    "llmcompressor.recipe:Recipe.create_instance": "recipes are read by upstream's own reader",
    "llmcompressor.recipe:Recipe.from_dict": "a recipe that was read and checked is given to upstream",
    "llmcompressor.recipe:Recipe.modifiers": "the GraceModifier of a recipe is found in it",
    "llmcompressor.entrypoints.oneshot:post_process": "it would overwrite the processor files that our save has copied",
    "llmcompressor.entrypoints.oneshot:Oneshot": "a full output folder is refused before training",
    f"{FORMATS}:QuantizationMetadata.clear_quantization": "schemes come off the layers of a run that did not end",
    f"{FORMATS}:QuantizationStatus.FROZEN": "finalized layers carry it",
    f"{FORMATS}:QuantizationStrategy.GROUP": "learned scales are per group",
    f"{FORMATS}:QuantizationStrategy.CHANNEL": "learned scales are per output channel",
    f"{FORMATS}:QuantizationType.INT": "integer schemes alone are learned",
}


def resolve(path: str) -> Any:
    """Return what `path` names; of a field of a dataclass or pydantic model, its description."""
    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in attributes.split("."):
        fields = {**getattr(found, "__dataclass_fields__", {}), **getattr(found, "model_fields", {})}
        found = fields[name] if name in fields else getattr(found, name)
    return found


@pytest.mark.parametrize(("path", "reason"), ATTRIBUTES.items(), ids=ATTRIBUTES)
def test_attribute__installed_upstream__exists(path: str, reason: str) -> None:
    try:
        assert resolve(path) is not None
    except (ImportError, AttributeError):
        pytest.fail(f"upstream has moved {path}; we need it because {reason}")
