"""The contract with upstream: every llm-compressor and compressed-tensors name this project uses, since when, and what for.

This file imports neither, so it can say what has moved when `grace_plugin.upstream`, which imports them, cannot be loaded.
`integration/test_contract.py` resolves every row and fails with the row's reason when upstream has moved it. When upstream
offers the same through a documented extension point, the row goes.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

__all__ = ["CONTRACT", "TESTED", "Contract", "moved"]

TESTED = {"llmcompressor": "0.14.0.1", "compressed-tensors": "0.19.0"}
"""The versions that the tests run with."""


class Contract(NamedTuple):
    """One upstream name: where it lives, since when we know it, and what breaks for us without it."""

    path: str
    floor: str
    reason: str

    def resolve(self) -> Any:
        """Return the object behind `path` ("package.module:attribute.path"); of a field of a class, its description.

        Raises:
            ImportError: with the reason we need the name and the versions tested, when upstream has moved or removed it.
        """
        module_name, _, attributes = self.path.partition(":")
        try:
            target: Any = importlib.import_module(module_name)
            for attribute in attributes.split("."):
                fields = {**getattr(target, "__dataclass_fields__", {}), **getattr(target, "model_fields", {})}
                target = fields[attribute] if attribute in fields else getattr(target, attribute)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"upstream no longer offers {self.path} (known since {self.floor}; {_versions()}); "
                f"we need it because {self.reason}. Install the tested versions, or a grace-plugin made for yours"
            ) from error
        return target


def _versions() -> str:
    """What was tested and what is installed."""
    parts = []
    for name, tested in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "missing"
        parts.append(f"{name} {tested} tested, {installed} installed")
    return ", ".join(parts)


def moved(error: ImportError) -> ImportError:
    """What a failed import of upstream means: the first row that does not resolve, or else the error itself."""
    for row in CONTRACT:
        try:
            row.resolve()
        except ImportError as found:
            return found
    return error


_LLM, _CT = "llmcompressor 0.14.0", "compressed-tensors 0.19.0"
_MIXIN = "llmcompressor.modifiers.quantization.quantization.mixin:QuantizationMixin"

CONTRACT: tuple[Contract, ...] = (
    Contract("llmcompressor.modifiers:Modifier", _LLM, "GraceModifier is one"),
    Contract(
        "llmcompressor.modifiers:ModifierFactory._registered_registry",
        _LLM,
        "a recipe may name a modifier of the user's own",
    ),
    Contract("llmcompressor.modifiers:ModifierFactory.register", _LLM, "a YAML recipe resolves GraceModifier by name"),
    Contract(
        f"{_MIXIN}.initialize_quantization",
        _LLM,
        "schemes are attached to the targeted layers by upstream's own rules",
    ),
    Contract(
        f"{_MIXIN}.end_calibration",
        _LLM,
        "the layers are marked frozen by upstream before its save path runs",
    ),
    Contract(f"{_MIXIN}.resolved_config", _LLM, "the formats of all groups are read from it"),
    Contract(f"{_MIXIN}._resolved_config", _LLM, "it is resolved anew when ignore has been completed"),
    Contract(f"{_MIXIN}.resolved_targets", _LLM, "targets of all groups are read from it"),
    Contract("llmcompressor.modifiers:Modifier.finalized_", _LLM, "a finalized model is not given back"),
    Contract("llmcompressor.core:active_session", _LLM, "modifiers are found through the running session"),
    Contract("llmcompressor.core:create_session", _LLM, "train() runs in a session of its own"),
    Contract("llmcompressor.core:State.model", _LLM, "lifecycle methods find the student there"),
    Contract("llmcompressor.core:State.teacher_model", _LLM, "a teacher given to the session stands there"),
    Contract("llmcompressor.core.session:CompressionSession.initialize", _LLM, "train() begins its session"),
    Contract("llmcompressor.core.session:CompressionSession.finalize", _LLM, "train() ends its session"),
    Contract("llmcompressor.core.session:CompressionSession.lifecycle", _LLM, "a session's recipe stands there"),
    Contract(
        "llmcompressor.core.lifecycle:CompressionLifecycle.recipe", _LLM, "our pipeline finds its modifiers there"
    ),
    Contract(
        "llmcompressor.core.lifecycle:CompressionLifecycle.initialized_", _LLM, "events are fired in a session alone"
    ),
    Contract("llmcompressor.core:LifecycleCallbacks.batch_start", _LLM, "training event 1 of 5"),
    Contract("llmcompressor.core:LifecycleCallbacks.loss_calculated", _LLM, "training event 2 of 5"),
    Contract("llmcompressor.core:LifecycleCallbacks.optim_pre_step", _LLM, "training event 3 of 5"),
    Contract("llmcompressor.core:LifecycleCallbacks.optim_post_step", _LLM, "training event 4 of 5"),
    Contract("llmcompressor.core:LifecycleCallbacks.batch_end", _LLM, "training event 5 of 5"),
    Contract(
        "llmcompressor.pipelines:CalibrationPipeline.register_value", _LLM, "oneshot(pipeline='grace') finds ours"
    ),
    Contract("llmcompressor.pipelines:CalibrationPipeline.registered_names", _LLM, "ours is registered once"),
    Contract(
        "llmcompressor.pipelines:CalibrationPipeline.from_modifiers", _LLM, "other modifiers run their own pipelines"
    ),
    Contract("llmcompressor.pipelines.registry:logger", _LLM, "its advice to take another pipeline is silenced"),
    Contract("llmcompressor.recipe:Recipe.create_instance", _LLM, "recipes are read by upstream's own reader"),
    Contract("llmcompressor.recipe:Recipe.from_dict", _LLM, "a recipe that was read and checked is given to upstream"),
    Contract("llmcompressor.recipe:Recipe.modifiers", _LLM, "the GraceModifier of a recipe is found there"),
    Contract(
        "llmcompressor.transformers.compression.compressed_tensors_utils:modify_save_pretrained",
        _LLM,
        "checkpoints are written through upstream's own save path",
    ),
    Contract(
        "llmcompressor.modeling.moe.linearize:linearize_moe",
        _LLM,
        "experts held as one 3D parameter become linears, which can be quantized",
    ),
    Contract(
        "compressed_tensors.offload.module:remove_module_offload",
        _CT,
        "experts made linear are held by upstream's offload, which pins them to the device they were made on",
    ),
    Contract(
        "llmcompressor.modeling.moe.linearize:load_quantizable_moe",
        _LLM,
        "a checkpoint with quantized experts is read back as linears",
    ),
    Contract(
        "llmcompressor.modeling.moe.conversion_mappings:patch_moe_mappings",
        _LLM,
        "says that such a checkpoint holds each expert by itself",
    ),
    Contract("llmcompressor:oneshot", _LLM, "users call it with our recipe, and our own oneshot ends in it"),
    Contract(
        "llmcompressor.entrypoints.oneshot:post_process",
        _LLM,
        "oneshot writes the processor behind the model, over the files copied from the source; keep_processor_files stops it",
    ),
    Contract(
        "llmcompressor.entrypoints.oneshot:Oneshot",
        _LLM,
        "the folder that a running oneshot will save to is read from it, so that a full one is refused before training",
    ),
    Contract("llmcompressor.modifiers.gptq:GPTQModifier", _LLM, "a baseline of the demo"),
    Contract(
        "llmcompressor.modifiers.quantization:QuantizationModifier", _LLM, "round-to-nearest, a baseline of the demo"
    ),
    Contract("compressed_tensors.quantization:QuantizationArgs", _CT, "bits, group and symmetry are read from it"),
    Contract("compressed_tensors.quantization:QuantizationConfig", _CT, "quantization_config of a checkpoint is one"),
    Contract(
        "compressed_tensors.quantization:QuantizationMetadata.clear_quantization",
        _CT,
        "schemes come off the layers of a run that did not end",
    ),
    Contract("compressed_tensors.quantization:QuantizationScheme", _CT, "each targeted layer carries one"),
    Contract("compressed_tensors.quantization:QuantizationStatus.FROZEN", _CT, "finalized layers carry it"),
    Contract("compressed_tensors.quantization:QuantizationStrategy.GROUP", _CT, "learned scales are per group"),
    Contract("compressed_tensors.quantization:QuantizationStrategy.CHANNEL", _CT, "or per output channel"),
    Contract("compressed_tensors.quantization:QuantizationType.INT", _CT, "only integer schemes are learned"),
    Contract(
        "compressed_tensors.quantization:is_preset_scheme", _CT, "a scheme that is none is refused with the nearest"
    ),
    Contract("compressed_tensors.utils:match_named_modules", _CT, "targets and ignore are matched by upstream's rules"),
    Contract("compressed_tensors.compressors.pack_quantized:unpack_from_int32", _CT, "verify unpacks codes with it"),
)
