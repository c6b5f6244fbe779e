"""What lies where in a checkpoint, and the small files GRACE adds to it.

config.json, model*.safetensors    pack-quantized compressed-tensors, written by llm-compressor
tokenizer and processor files      the source's, byte for byte
recipe.yaml                        the recipe with inferred values
grace/record.json                  hashes of the final codes and scales, of all other weights, environment
grace/probe.safetensors            a batch of seeded noise, or one that the user gave, and the trained model's logits on it
verification.json                  what `verify` found
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "PROBE",
    "RECORD",
    "VERIFICATION",
    "dense_digests",
    "digest",
    "environment",
    "file_digest",
    "processor_files",
    "rewrite_ignore",
    "source_folder",
]

RECORD, PROBE, VERIFICATION = "grace/record.json", "grace/probe.safetensors", "verification.json"

#: files of a source checkpoint that the model's own save writes, or that describe its weights
_NOT_PROCESSOR = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|index\.json|md|png|jpg|gitattributes|py)$"
    r"|(config|generation_config|verification)\.json$|recipe\.yaml$|\..*|LICENSE.*|training_args.*|trainer_state.*"
)


def digest(tensor: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous()
    head = f"{flat.dtype} {tuple(flat.shape)} ".encode()
    return hashlib.sha256(head + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def processor_files(folder: Path) -> list[Path]:
    """Tokenizer, processor and template files of a source checkpoint, by exclusion of everything else."""
    return sorted(p for p in folder.iterdir() if p.is_file() and not _NOT_PROCESSOR.fullmatch(p.name))


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
