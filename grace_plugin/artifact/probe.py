"""Logits of a model on the run's probe: the first training batch with a supervised token and an image, or what came nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["POSITIONS", "attention_of", "probe_logits", "read_probe", "write_probe"]

POSITIONS = 16
"""Supervised positions whose logits are compared."""


def attention_of(model: Any) -> dict[str, str]:
    """Implementations of attention by name of the sub-config, "" for the model's own; `set_attn_implementation` takes them."""
    config = model.config
    parts = {"": config, **{name: getattr(config, name, None) for name in config.sub_configs}}
    return {name: part._attn_implementation for name, part in parts.items() if part is not None}


@torch.no_grad()
def probe_logits(model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
    """Logits [<= POSITIONS, V] of a model, in its own dtype, at the probe's first positions that predict a label.

    A probe without labels, or of which nothing is learned, is read at its last positions.
    """
    device = next(p.device for p in model.parameters())
    was_training = model.training
    model.eval()
    inputs = {k: v.to(device) for k, v in probe.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits
    model.train(was_training)
    picked = torch.arange(logits.shape[0] * logits.shape[1])[-POSITIONS:]
    if "labels" in probe:
        supervised = torch.nn.functional.pad(probe["labels"][:, 1:] != -100, (0, 1)).flatten().nonzero().squeeze(1)
        picked = supervised[:POSITIONS] if supervised.numel() else picked
    return logits.flatten(0, 1)[picked.to(device)].cpu()


def write_probe(path: Path, probe: dict[str, Tensor], logits: Tensor) -> None:
    """Write the probe's inputs and the trained model's logits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"input.{k}": v.contiguous() for k, v in probe.items()}
    save_file({**tensors, "logits": logits.contiguous()}, path)


def read_probe(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and logits written by `write_probe`."""
    tensors: dict[str, Any] = load_file(path)
    return {k.removeprefix("input."): v for k, v in tensors.items() if k.startswith("input.")}, tensors["logits"]
