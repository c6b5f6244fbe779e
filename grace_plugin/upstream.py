"""Every llm-compressor and compressed-tensors name that this project uses, each with its reason.

Nothing else in the package imports `llmcompressor` or `compressed_tensors`. Attributes that are read of these objects are
listed with their reasons in `integration/test_upstream_attributes.py`.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: versions that the tests run with
TESTED = {"llmcompressor": "0.14.0.1", "compressed-tensors": "0.19.0"}


def _versions() -> str:
    parts = []
    for name, tested in TESTED.items():
        try:
            parts.append(f"{name} {tested} tested, {version(name)} installed")
        except PackageNotFoundError:
            parts.append(f"{name} {tested} tested, none installed")
    return "; ".join(parts)


try:
    # verification unpacks the codes of a checkpoint with it
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    # upstream's offload holds experts made linear, and pins them to the device they were made on
    from compressed_tensors.offload.module import remove_module_offload

    # formats are read from upstream's own classes; each targeted layer carries a scheme and a status
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

    # targets and ignore lists are matched by upstream's rules
    from compressed_tensors.utils import match_named_modules

    # our own `oneshot` ends in upstream's
    from llmcompressor import oneshot

    # a run has a session of its own, fires upstream's training events and reads its state
    from llmcompressor.core import LifecycleCallbacks, State, active_session, create_session

    # experts held as one 3D parameter become linears, which can be quantized, and are read back as linears
    from llmcompressor.modeling.moe.conversion_mappings import patch_moe_mappings
    from llmcompressor.modeling.moe.linearize import linearize_moe, load_quantizable_moe

    # GraceModifier is a Modifier, found by name in YAML recipes
    from llmcompressor.modifiers import Modifier, ModifierFactory

    # schemes are attached, resolved and frozen by upstream's rules
    from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin

    # `oneshot(pipeline="grace")` finds our training loop in this registry
    from llmcompressor.pipelines import CalibrationPipeline

    # recipes are read by upstream's own reader
    from llmcompressor.recipe import Recipe

    # checkpoints are written through upstream's own save path
    from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained
except ImportError as error:
    raise ImportError(f"upstream has moved a name ({error}); {_versions()}. Install the tested versions") from error

__all__ = [
    "TESTED",
    "CalibrationPipeline",
    "LifecycleCallbacks",
    "Modifier",
    "ModifierFactory",
    "QuantizationArgs",
    "QuantizationConfig",
    "QuantizationMetadata",
    "QuantizationMixin",
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

    It saves the model and then the processor into the same folder, which would overwrite the files our save has copied from
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
