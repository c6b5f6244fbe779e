"""The border: every llm-compressor and compressed-tensors name this project touches.

Nothing else in the package imports `llmcompressor` or `compressed_tensors`. Each name stands in `CONTRACT` with the first
version it was seen working in and the reason we need it; `integration/test_upstream.py` resolves every row and fails with
the row's reason when upstream has moved it. When upstream offers the same through a documented extension point, the row goes.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.offload.module import remove_module_offload
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationMetadata,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.utils import match_named_modules
from llmcompressor import oneshot
from llmcompressor.core import LifecycleCallbacks, State, active_session, create_session
from llmcompressor.modeling.moe.conversion_mappings import patch_moe_mappings
from llmcompressor.modeling.moe.linearize import linearize_moe, load_quantizable_moe
from llmcompressor.modifiers import Modifier, ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.pipelines import CalibrationPipeline
from llmcompressor.recipe import Recipe
from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained

__all__ = [
    "CONTRACT",
    "CalibrationPipeline",
    "Contract",
    "GPTQModifier",
    "LifecycleCallbacks",
    "Modifier",
    "ModifierFactory",
    "QuantizationArgs",
    "QuantizationConfig",
    "QuantizationMetadata",
    "QuantizationMixin",
    "QuantizationModifier",
    "QuantizationScheme",
    "QuantizationStatus",
    "QuantizationStrategy",
    "QuantizationType",
    "Recipe",
    "State",
    "active_session",
    "create_session",
    "keep_processor_files",
    "linearize_moe",
    "load_quantizable_moe",
    "match_named_modules",
    "modify_save_pretrained",
    "oneshot",
    "patch_moe_mappings",
    "remove_module_offload",
    "unpack_from_int32",
]


def keep_processor_files(model: Any) -> None:
    """Let upstream's running `oneshot` of this model end without writing the processor, once.

    It saves the model and then the processor into the same folder, which would write anew the files our save has copied from
    the source. Upstream has no hook between or behind the two, so its last function is replaced until it is called.
    """
    entry: Any = importlib.import_module("llmcompressor.entrypoints.oneshot")
    before = entry.post_process

    def post_process(model_args: Any = None, **kwargs: Any) -> None:
        entry.post_process = before
        if model_args is not None and model_args.model is model:
            model_args.processor = None
        before(model_args=model_args, **kwargs)

    entry.post_process = post_process


class Contract(NamedTuple):
    """One upstream name: where it lives, since when we know it, and what breaks for us without it."""

    path: str
    floor: str
    reason: str

    def resolve(self) -> Any:
        """Return the object behind `path` ("package.module:attribute.path").

        Raises:
            ImportError: with the reason we need the name, when upstream has moved or removed it.
        """
        module_name, _, attributes = self.path.partition(":")
        try:
            target: Any = importlib.import_module(module_name)
            for attribute in attributes.split("."):
                target = getattr(target, attribute)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"upstream no longer offers {self.path} (known since {self.floor}); we need it because {self.reason}"
            ) from error
        return target


_LLM, _CT = "llmcompressor 0.14.0", "compressed-tensors 0.19.0"

CONTRACT: tuple[Contract, ...] = (
    Contract("llmcompressor.modifiers:Modifier", _LLM, "GraceModifier is one"),
    Contract("llmcompressor.modifiers:ModifierFactory.register", _LLM, "a YAML recipe resolves GraceModifier by name"),
    Contract(
        "llmcompressor.modifiers.quantization.quantization.mixin:QuantizationMixin.initialize_quantization",
        _LLM,
        "schemes are attached to the targeted layers by upstream's own rules",
    ),
    Contract(
        "llmcompressor.modifiers.quantization.quantization.mixin:QuantizationMixin.end_calibration",
        _LLM,
        "the layers are marked frozen by upstream before its save path runs",
    ),
    Contract("llmcompressor.core:active_session", _LLM, "modifiers are found through the running session"),
    Contract("llmcompressor.core:create_session", _LLM, "train() runs in a session of its own"),
    Contract("llmcompressor.core:State", _LLM, "lifecycle methods receive it"),
    Contract("llmcompressor.core:LifecycleCallbacks.batch_start", _LLM, "training event 1 of 5"),
    Contract("llmcompressor.core:LifecycleCallbacks.loss_calculated", _LLM, "training event 2 of 5"),
    Contract("llmcompressor.core:LifecycleCallbacks.optim_pre_step", _LLM, "training event 3 of 5"),
    Contract("llmcompressor.core:LifecycleCallbacks.optim_post_step", _LLM, "training event 4 of 5"),
    Contract("llmcompressor.core:LifecycleCallbacks.batch_end", _LLM, "training event 5 of 5"),
    Contract("llmcompressor.pipelines:CalibrationPipeline.register", _LLM, "oneshot(pipeline='grace') finds ours"),
    Contract("llmcompressor.recipe:Recipe.create_instance", _LLM, "recipes are read by upstream's own reader"),
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
    Contract("compressed_tensors.quantization:QuantizationType.INT", _CT, "only integer schemes are learned"),
    Contract("compressed_tensors.utils:match_named_modules", _CT, "targets and ignore are matched by upstream's rules"),
    Contract("compressed_tensors.compressors.pack_quantized:unpack_from_int32", _CT, "verify unpacks codes with it"),
)
