"""The border: every llm-compressor and compressed-tensors name this project touches.

Nothing else in the package imports `llmcompressor` or `compressed_tensors`. Each name stands in `grace_plugin.contract` with
the first version it was seen working in and the reason we need it; a name that is gone is an ImportError that says so.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from grace_plugin.contract import CONTRACT, Contract, moved

try:
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
        is_preset_scheme,
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
except ImportError as error:
    raise moved(error) from error

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
    "is_preset_scheme",
    "keep_processor_files",
    "linearize_moe",
    "load_quantizable_moe",
    "log_pipeline_advice",
    "match_named_modules",
    "modify_save_pretrained",
    "oneshot",
    "patch_moe_mappings",
    "remove_module_offload",
    "running_output_dir",
    "running_pipeline",
    "running_processor",
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


def running_output_dir() -> str | None:
    """Folder that upstream's running `oneshot` will save to; None when it will not save, or none is running."""
    caller = _running_oneshot()
    return caller and caller.output_dir and os.path.join(caller.output_dir, caller.recipe_args.stage or "")


def running_processor() -> Any:
    """The processor or tokenizer that upstream's running `oneshot` was given or has loaded; None without one."""
    return getattr(_running_oneshot(), "processor", None)


def running_pipeline() -> str | None:
    """The name of the pipeline that upstream's running `oneshot` was asked for; None when none is running."""
    return getattr(getattr(_running_oneshot(), "dataset_args", None), "pipeline", None)


def log_pipeline_advice(logged: bool) -> None:
    """Have upstream's registry of pipelines log, or be silent (loguru switches messages by the module that logs them).

    Upstream recommends `datafree` in place of any pipeline but the one that it infers, and it cannot infer a plugin's; without
    data GRACE trains nothing. Goes when upstream takes a pipeline's name from a modifier.
    """
    registry: Any = importlib.import_module("llmcompressor.pipelines.registry")
    (registry.logger.enable if logged else registry.logger.disable)(registry.__name__)


def _running_oneshot() -> Any:
    """Upstream's running `oneshot`: it tells neither its pipeline nor its modifiers, so it is found among the callers."""
    entry: Any = importlib.import_module("llmcompressor.entrypoints.oneshot").Oneshot
    frame: Any = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, entry):
            return caller
        frame = frame.f_back
    return None
