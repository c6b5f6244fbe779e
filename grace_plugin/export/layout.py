"""What lies where in a checkpoint, and the small files GRACE adds to it.

config.json, model*.safetensors    pack-quantized compressed-tensors, written by llm-compressor
tokenizer and processor files      those of the processor that the run trained with (the source's byte for byte, if it is that)
generation_config.json             the source's, byte for byte
recipe.yaml                        the recipe with inferred values, without local paths
run.yaml                           what `train` was given (`grace_plugin.run.manifest`), without local paths
grace/record.json                  hashes of the final codes and scales, of all other weights, of every file; environment
grace/probe.safetensors            a batch of seeded noise, or one that the user gave, and the trained model's logits on it
verification.json                  what `verify` found
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from grace_plugin.teacher.source import open_checkpoint

__all__ = [
    "CONFIG",
    "GENERATION",
    "PROBE",
    "RECIPE",
    "RECORD",
    "RUN_FILE",
    "VERIFICATION",
    "dense_digests",
    "digest",
    "environment",
    "file_digest",
    "fingerprint",
    "is_local",
    "provenance",
    "rewrite_ignore",
    "source_folder",
    "strip_paths",
]

RECORD, PROBE, VERIFICATION = "grace/record.json", "grace/probe.safetensors", "verification.json"
RECIPE, GENERATION, CONFIG, RUN_FILE = "recipe.yaml", "generation_config.json", "config.json", "run.yaml"


def digest(tensor: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous()
    head = f"{flat.dtype} {tuple(flat.shape)} ".encode()
    return hashlib.sha256(head + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def dense_digests(model: nn.Module, quantized: set[str]) -> dict[str, str]:
    """Hashes by name of every parameter that is no code and no scale: tower, projector, embeddings, norms, biases, head."""
    packed = {"weight", "weight_packed", "weight_scale", "weight_shape"}
    found = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module not in quantized or leaf not in packed:
            found[name] = digest(parameter)
    return found


def environment() -> dict[str, str]:
    """Versions and device that decide whether two runs can give the same bits."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = ("torch", "transformers", "compressed-tensors", "llmcompressor")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def source_folder(source: str | Path) -> Path:
    """Local folder of a source checkpoint; a hub id resolves to its cached snapshot.

    Raises:
        ValueError: no source at all, or neither a folder nor a model of the hub cache.
    """
    if not str(source) or str(source) == ".":
        raise ValueError(
            "the student has no name_or_path, so its processor files cannot be found; load it from a checkpoint"
        )
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:
        raise ValueError(f"cannot find the processor files of {str(source)!r}: {error}") from error


def is_local(name: str) -> bool:
    """Whether a model's name is a path on this machine and no hub id."""
    return name.startswith((".", "~", os.sep)) or os.path.isabs(name) or Path(name).exists()


def provenance(name: str | None, *, paths: bool) -> dict[str, Any]:
    """What a record says of a model: hub id or folder name, and the fingerprint of its files (None where there are none).

    Args:
        name: hub id or path; None for a model that was passed loaded and has no name.
        paths: whether a local path is kept.
    """
    if not name:
        return {}
    local = is_local(name)
    found: dict[str, Any] = {"name": Path(name).resolve().name if local else name, "fingerprint": fingerprint(name)}
    return found | ({"path": name} if local and paths else {})


def fingerprint(source: str | Path) -> dict[str, str] | None:
    """Commit of a hub snapshot, or digests of the config and the weights files of a folder; None where it has neither."""
    try:
        return open_checkpoint(str(source)).known_by()
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return None


def strip_paths(folder: Path) -> None:
    """Replace local paths of models in the checkpoint's recipe by the names of their folders."""
    path = folder / RECIPE
    if not path.is_file():
        return
    content = yaml.safe_load(path.read_text())
    if _strip(content):
        path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=1000))


def _strip(value: Any) -> bool:
    if isinstance(value, list):
        return any([_strip(item) for item in value])
    if not isinstance(value, dict):
        return False
    changed, teacher = False, value.get("teacher")
    if isinstance(teacher, str):
        teacher = value["teacher"] = {"model": teacher}
    if isinstance(teacher, dict):
        for key in ("model", "cache"):
            given = teacher.get(key)
            if isinstance(given, str) and is_local(given):
                teacher[key] = Path(given).resolve().name
                changed = True
    return any([_strip(item) for item in value.values()]) or changed


def rewrite_ignore(folder: Path, model: nn.Module, patterns: list[str]) -> None:
    """Rewrite `quantization_config.ignore` so that transformers and vLLM both match it.

    llm-compressor writes checkpoint-space names, which transformers does not map back for LLaVA and Qwen2-VL: towers would
    load as if they were quantized. Regular expressions over both spaces are matched by both loaders.

    Args:
        folder: the checkpoint.
        model: the saved model, whose linears without a scheme are the ignored ones.
        patterns: the family's patterns (vision tower, projector, head).
    """
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    kept = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or getattr(module, "quantization_scheme", None) is not None:
            continue
        if any(re.match(pattern[3:], name) for pattern in patterns):
            continue
        inside = name.removeprefix("model.language_model.")
        kept.append(
            rf"re:.*language_model\.(model\.)?{re.escape(inside)}$"
            if inside != name
            else rf"re:(.*\.)?{re.escape(name)}$"
        )
    quantization["ignore"] = [*patterns, *kept]
    for group in quantization["config_groups"].values():
        group["targets"] = ["Linear"] if len(quantization["config_groups"]) == 1 else group["targets"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
