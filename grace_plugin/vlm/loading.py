"""Load a student or a teacher, and refuse one of which a weight is missing, left over or of another shape.

transformers draws missing weights at random and drops those that it has no place for; it reports both in its log and in the
loading info. The loading info is read twice: for the files' headers on the meta device, which costs no memory, and for the
weights.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.upstream import remove_module_offload
from grace_plugin.vlm.checkpoint_files import (
    DEQUANTIZED,
    check_adapter,
    check_quantization,
    excerpt,
    first_names,
    quantization_of,
    read_config,
    tensors_of,
)
from grace_plugin.vlm.registry import family_of

__all__ = ["check_checkpoint", "check_finite", "check_model", "check_weights", "load_model"]

_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Written by older versions of transformers and torch: recomputed, or not read by a model in evaluation mode.
_HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|inv_freq|position_ids|num_batches_tracked|masked_bias)$")
_PACKED = re.compile(r".*\.(qweight|qzeros|scales|weight_packed|weight_scale\w*|absmax|quant_state\S*|SCB)$")


def _no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' table of keys that do not fit and its progress bar; the error raised here names the keys."""
    from transformers.utils import logging as transformers_logging

    logger, bar = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()
    logger.addFilter(_no_report)  # not the logger's level: transformers computes less at another level
    try:
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            # raised for `dequantize`, which `load_model` sets on purpose
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            yield
    finally:
        logger.removeFilter(_no_report)
        if bar:
            transformers_logging.enable_progress_bar()


def check_checkpoint(source: str, role: str, *, revision: str = "main", kind: str = "resident") -> Any:
    """Check a checkpoint's config and headers without loading a weight.

    Args:
        source: a folder or a hub id; the headers of a folder are read.
        role: "student" or "teacher".
        kind: the recipe's `teacher.kind`. Of a cached teacher only the file of the head is needed, so weights are not checked.

    Returns:
        The config.

    Raises:
        ValueError: names the file, the method or the weights that do not fit, and how to fix it.
    """
    check_adapter(source, role, revision)
    config = read_config(source, role, revision, verb="read" if kind == "cached" else "load")
    quantization = quantization_of(source, revision)
    check_quantization(source, quantization, role, kind=kind, revision=revision)
    try:
        family_of(config)
    except ValueError as error:
        raise ValueError(f"the {role} {excerpt(source)!r} cannot be used: {error}") from error
    if Path(source).is_dir() and kind != "cached":
        check_weights(source, role, config, quantized=quantization is not None)
    return config


def check_weights(source: str, role: str, config: Any, *, quantized: bool = False) -> None:
    """Check by its headers that a folder holds the whole model of a config; of a quantized one, that its files are readable.

    Raises:
        ValueError: names the files or the weights that do not fit.
    """
    tensors = tensors_of(Path(source), role)
    if tensors is not None and not quantized:
        _check_dtypes(source, role, tensors)
        _check_headers(source, role, config, tensors)


def _check_dtypes(source: str, role: str, tensors: Mapping[str, tuple[list[int], str]]) -> None:
    packed = [name for name, (_, dtype) in tensors.items() if dtype not in _PLAIN and not _HARMLESS.match(name)]
    if packed:
        raise ValueError(
            f"the {role} {excerpt(source)!r} stores {len(packed)} tensor(s) as {tensors[packed[0]][1]} ({first_names(packed)}) "
            "and its config.json has no quantization_config, so they would be read as plain weights; take the BF16 checkpoint"
        )


def _check_headers(source: str, role: str, config: Any, tensors: Mapping[str, tuple[list[int], str]]) -> None:
    """Check the loading info of weights that have a shape and no content."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if model_class is None:
        return
    # from_pretrained takes a state dict in place of files; on the meta device it maps and compares names and shapes only.
    state = {
        name: torch.empty(shape, dtype=_PLAIN.get(dtype, torch.uint8), device="meta")
        for name, (shape, dtype) in tensors.items()
    }
    try:
        # the initialization of missing weights may draw from the global random state, which belongs to the run
        with _quietly(), torch.random.fork_rng(devices=[]):
            _, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception:  # a class that cannot be built on the meta device is checked when its weights are loaded
        return
    _check_loading(info, source, role)


def _check_loading(info: Mapping[str, Any], source: str, role: str) -> None:
    """Refuse a model of which weights are missing, left over, or of another shape.

    Raises:
        ValueError: the first keys, how many there are, and the likely cause.
    """
    missing = sorted(info["missing_keys"])
    extra = sorted(key for key in info["unexpected_keys"] if not _HARMLESS.match(key))
    other = [
        f"{key} is {tuple(found)}, the config asks for {tuple(asked)}"
        for key, found, asked in sorted(map(tuple, info["mismatched_keys"]), key=str)
    ]
    parts = [
        f"{len(keys)} {what} ({first_names(keys)})"
        for keys, what in (
            (missing, "weight(s) are missing"),
            (extra, "key(s) are left over"),
            (other, "weight(s) have another shape"),
        )
        if keys
    ]
    if info.get("error_msgs"):
        parts.append(excerpt(info["error_msgs"][0]))
    if parts:
        raise ValueError(
            f"cannot load the {role} {excerpt(source)!r} whole: {'; '.join(parts)}. {_cause(missing, extra, other)}"
        )


def _cause(missing: list[str], extra: list[str], other: list[str]) -> str:
    """Return the likely cause of keys that do not fit, in one sentence."""
    if any(key.startswith("base_model.model.") for key in extra):
        return "The keys are a PEFT wrapper's (base_model.model.): call merge_and_unload() and save the model that it gives"
    if any(".lora_" in key or ".base_layer." in key for key in extra):
        return "An adapter was saved with the weights: call merge_and_unload() and save the model that it gives"
    if any(_PACKED.match(key) for key in extra):
        return (
            "The weights are quantized and config.json does not say how (quantization_config): take the BF16 checkpoint"
        )
    if other and not missing:
        return "config.json and the weights are of different models or sizes: take both from one checkpoint"
    if missing and missing == [key for key in missing if key.endswith("lm_head.weight")]:
        return (
            "The output head was not saved and config.json does not tie it to the embedding: save the model again, or set "
            "tie_word_embeddings if it is tied"
        )
    if missing and not extra:
        return "A file or a part of the weights was lost, or config.json asks for more layers: fetch or save the model again"
    if extra and not missing:
        return "config.json describes a smaller or another model than the weights: take both from one checkpoint"
    return (
        "The weights are named as those of another model or framework: save it again with transformers' save_pretrained"
    )


def load_model(
    source: str, role: str, *, revision: str = "main", dtype: str | torch.dtype = "auto", kind: str = "resident"
) -> Any:
    """Load a whole checkpoint in evaluation mode, after `check_checkpoint`.

    A teacher of a method in `DEQUANTIZED` is dequantized, and an offloaded teacher of any method.

    Args:
        source, role, revision: as for `check_checkpoint`.
        dtype: of the weights; "auto" for the stored one.
        kind: the recipe's `teacher.kind`; "resident" for a student.

    Raises:
        ValueError: `check_checkpoint`'s, nothing loadable there, or weights that are missing, left over, or of another shape.
    """
    from transformers import AutoModelForImageTextToText

    check_checkpoint(source, role, revision=revision, kind=kind)
    quantization = quantization_of(source, revision)
    method = None if quantization is None else quantization["quant_method"]
    dense = method in DEQUANTIZED or (method is not None and kind == "offload")
    options: dict[str, Any] = {"quantization_config": _dequantizing(method)} if method in DEQUANTIZED else {}
    try:
        with _quietly():
            # "auto" for weights that are dequantized: the method computes in the stored dtype, and the cast comes after it
            # ignore_mismatched_sizes: such keys are reported in the loading info, with all others, instead of raised one by one
            model, info = AutoModelForImageTextToText.from_pretrained(
                source,
                revision=revision,
                dtype="auto" if dense else dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **options,
            )
    except (torch.OutOfMemoryError, MemoryError):  # no fault of the checkpoint
        raise
    except Exception as error:  # transformers and its quantizers raise errors of any type
        raise ValueError(f"cannot load the {role} {excerpt(source)!r}: {excerpt(error, 300)}") from error
    _check_loading(info, source, role)
    if dense:
        _make_dense(model, method, dtype)
    return model.eval()


def _dequantizing(method: str | None) -> Any:
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config

    return {"compressed-tensors": CompressedTensorsConfig, "fp8": FineGrainedFP8Config}[str(method)](dequantize=True)


def _make_dense(model: Any, method: str | None, dtype: str | torch.dtype) -> None:
    """Make all weights plain parameters of the given dtype."""
    if method not in DEQUANTIZED:
        model.dequantize()
    for module in model.modules():
        # compressed-tensors pins parameters to the device they were made on, and a trainer moves models.
        remove_module_offload(module)
    if dtype != "auto":
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(target)


def check_model(model: nn.Module, role: str, *, kind: str = "resident") -> None:
    """Refuse a loaded model with an adapter, with weights that are not in memory, or with unusable quantized weights.

    A student must not be quantized, nor an offloaded teacher.

    Args:
        model: as it was passed.
        role: "student" or "teacher".
        kind: the recipe's `teacher.kind`; not read for a student.

    Raises:
        ValueError: names what was found and how to fix it.
    """
    # Recognized without importing peft: wrapped models come from its modules, injected layers have base_layer and lora_A.
    adapted = [
        name or type(model).__name__
        for name, module in model.named_modules()
        if type(module).__module__.partition(".")[0] == "peft"
        or (hasattr(module, "base_layer") and hasattr(module, "lora_A"))
    ]
    if adapted or getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        where = f" (for instance at {excerpt(adapted[0])})" if adapted else ""
        raise ValueError(
            f"the {role} carries a PEFT adapter{where}: merge it with merge_and_unload() and pass the model that it gives (an "
            "adapter of add_adapter: save it, load it with peft.PeftModel.from_pretrained, and merge that)"
        )
    quantization = getattr(model.config, "quantization_config", None) or getattr(model, "hf_quantizer", None)
    if quantization is not None and (role == "student" or kind == "offload"):
        found: Any = getattr(quantization, "quantization_config", quantization)
        method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", "?")
        shown = excerpt(getattr(method, "value", method), 60)
        if role == "student":
            raise ValueError(
                f"the student is quantized with {shown}; GRACE quantizes a student itself and trains from unquantized weights: "
                "load the BF16 checkpoint that it was made of"
            )
        raise ValueError(
            f"the teacher that was passed is quantized with {shown}, and its packed layers cannot be streamed: pass its folder "
            "as teacher.model, which is dequantized as it is loaded, or use teacher.kind: resident"
        )
    if role == "student":
        schemed = [
            name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None) is not None
        ]
        if schemed:
            raise ValueError(
                f"{len(schemed)} layer(s) of the student carry another modifier's quantization scheme "
                f"({first_names(schemed)}); GRACE quantizes alone: leave that modifier out of the recipe, or load the BF16 "
                "checkpoint"
            )
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ValueError(
            f"{len(away)} weight(s) of the {role} are not in memory ({first_names(away)}), so it was loaded with device_map or "
            "low-memory options; load it without them"
        )


@torch.no_grad()
def check_finite(weights: Mapping[str, Tensor], role: str) -> None:
    """Refuse weights with NaN or infinity.

    Args:
        weights: by name; only floating-point tensors are checked.
        role: "student" or "teacher".

    Raises:
        ValueError: the first tensors' names and how many of their values are not finite.
    """
    checked = {
        name: weight.detach() for name, weight in weights.items() if weight.is_floating_point() and weight.numel()
    }
    if not checked:
        return
    # Minimum and maximum take one pass without a copy and keep NaN and infinity; they are read back once per device.
    # torch has no aminmax for its 8-bit floating-point dtypes.
    extremes = {
        name: torch.stack(torch.aminmax(w if w.element_size() > 1 else w.float())) for name, w in checked.items()
    }
    by_device: dict[torch.device, list[str]] = {}
    for name, extreme in extremes.items():
        by_device.setdefault(extreme.device, []).append(name)
    bad: list[str] = []
    for names in by_device.values():
        finite = torch.stack([extremes[name].float() for name in names]).isfinite().all(1).tolist()
        bad += [name for name, good in zip(names, finite, strict=True) if not good]
    if bad:
        shown = [
            f"{name}: {int((~checked[name].float().isfinite()).sum())} of {checked[name].numel()} values"
            for name in bad[:3]
        ]
        raise ValueError(
            f"{len(bad)} weight(s) of the {role} hold NaN or infinity ({'; '.join(shown)}{'; ...' if len(bad) > 3 else ''}); "
            "take another checkpoint, or fetch this one again"
        )
