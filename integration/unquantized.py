"""A compressed checkpoint written out again in BF16: the same numbers in files that ask for no INT4 kernel.

What vLLM makes of it tells a missing kernel from a fault of ours: names, layouts and numbers are those of the compressed
checkpoint, and only the way the weights are stored differs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file

__all__ = ["unquantized"]


def unquantized(checkpoint: Path, folder: Path) -> Path:
    """Write the twin of a symmetric, grouped, pack-quantized checkpoint to `folder`, which must not exist; returns it."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    for packed in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = packed.removesuffix("_packed")
        shape, scale = torch.Size(tensors.pop(f"{stem}_shape").tolist()), tensors.pop(f"{stem}_scale")
        codes = unpack_from_int32(tensors.pop(packed), 4, shape)
        wide = scale.float().repeat_interleave(shape[1] // scale.shape[1], dim=1)
        tensors[stem] = (codes.float() * wide).to(scale.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder
