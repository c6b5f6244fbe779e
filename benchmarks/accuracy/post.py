"""Quantize the study's student by llm-compressor after training: round-to-nearest, GPTQ, AWQ, AutoRound.

Each is run by its own entry point, saved as compressed-tensors and scored after being read back from disk. Calibration rows are
the training set's first ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader

from benchmarks.accuracy import pair
from benchmarks.accuracy.data import Text, batch_of
from benchmarks.accuracy.scenes import Album, Asked
from benchmarks.accuracy.study import SETTINGS
from grace_plugin.export.freeze import set_upstream_scales
from grace_plugin.export.write import rewrite_ignore
from grace_plugin.upstream import QuantizationMixin, modify_save_pretrained, oneshot
from grace_plugin.vlm import family_of

__all__ = ["calibration", "compress", "export"]


def groups_of(setting: str) -> dict[str, Any]:
    """config_groups of a setting."""
    form = SETTINGS[setting]
    assert form is not None
    bits, size = form
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def recipe_of(method: str, options: dict[str, Any]) -> Any:
    """The recipe of a method; AWQ is a transform before round-to-nearest."""
    if method == "gptq":
        return GPTQModifier(**options)
    if method == "awq":
        from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

        layer = r"re:.*language_model\.layers\.\d+\."
        qkv = [layer + rf"self_attn\.{name}_proj$" for name in "qkv"]
        mlp = [layer + rf"mlp\.{name}_proj$" for name in ("gate", "up", "down")]
        mappings = [
            AWQMapping(layer + "input_layernorm$", qkv),
            AWQMapping(qkv[2], [layer + r"self_attn\.o_proj$"]),
            AWQMapping(layer + "post_attention_layernorm$", mlp[:2]),
            AWQMapping(mlp[1], mlp[2:]),
        ]
        return [AWQModifier(mappings=mappings, duo_scaling=False), QuantizationModifier(**options)]
    if method == "autoround":
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        return AutoRoundModifier(**options, iters=200, batch_size=8, enable_torch_compile=False)
    return QuantizationModifier(**options)


def calibration(samples: Asked, text: Text, album: Album, batch_size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Return batches of training samples in bfloat16 without labels; an incomplete last batch is dropped."""
    batches = []
    for start in range(0, len(samples) - batch_size + 1, batch_size):
        batch, _ = batch_of(samples.take(np.arange(start, start + batch_size)), text, album)
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
        batches.append({name: value for name, value in batch.items() if name != "labels"})
    return batches


def compress(model: Any, method: str, setting: str, batches: list[dict[str, torch.Tensor]], folder: Path) -> None:
    """Quantize a loaded student in place and save it to `folder`; batches: calibration samples without labels."""
    patterns = family_of(model).quantization_ignore()
    recipe, processor = recipe_of(method, {"config_groups": groups_of(setting), "ignore": patterns}), pair.processor()
    calibration: dict[str, Any] = {}
    if method != "rtn":
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        calibration = {"dataset": loader, "num_calibration_samples": len(batches)}
        if method == "gptq":
            calibration["pipeline"] = "basic"
    oneshot(model=model, recipe=recipe, processor=processor, **calibration)
    _write(model, patterns, folder)


def export(model: Any, frozen: dict[str, tuple[torch.Tensor, torch.Tensor]], setting: str, folder: Path) -> None:
    """Save a trained student, whose weights are `code * scale` already, as GraceModifier saves it; frozen: by layer, on the
    student's device.
    """
    patterns = family_of(model).quantization_ignore()
    schemes = QuantizationModifier(config_groups=groups_of(setting), ignore=patterns)
    QuantizationMixin.initialize_quantization(schemes, model)
    set_upstream_scales(model, frozen, torch.bfloat16)
    QuantizationMixin.end_calibration(schemes, model)
    modify_save_pretrained(model)
    _write(model, patterns, folder)


def _write(model: Any, patterns: list[str], folder: Path) -> None:
    model.save_pretrained(str(folder), save_compressed=True)
    rewrite_ignore(folder, model, patterns)
    pair.processor().save_pretrained(folder)
