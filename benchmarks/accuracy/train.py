"""Train: cross-entropy from scratch for teacher and student, and one loop for every trained method.

The second loop is `grace_plugin.objective`'s protocol (prepare, window, loss, measure, step, finalize): methods differ in the
objective's recipe and in whether scales are attached, in nothing else.

Legend: B batch, n visual tokens (36).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from benchmarks.accuracy.data import Text, batch_of
from benchmarks.accuracy.formats import quantize, stored_dtype
from benchmarks.accuracy.methods import Method
from benchmarks.accuracy.pair import VISUAL, VOCABULARY
from benchmarks.accuracy.relation import RelationObjective
from benchmarks.accuracy.rules import RuleObjective
from benchmarks.accuracy.scenes import Album, Asked, Samples
from examples.bundled_demo.plain import PlainObjective
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer import PARAMETER, dequantize

__all__ = ["from_scratch", "learn", "order_of"]

NAMING = 0.5  # weight at the start of the loss that names the photograph under each visual token, in `from_scratch`
Frozen = dict[str, tuple[Tensor, Tensor]]  # codes and scales by layer


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate as a share of its peak: linear warm-up over 5 % of the run, then a cosine to 0."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def mixed(device: torch.device, stored: torch.dtype = torch.bfloat16) -> Any:
    """bfloat16 products on a GPU where they hold what is stored; else float32 (few CPUs have fast bfloat16)."""
    fast = device.type == "cuda" and stored == torch.bfloat16
    return torch.autocast("cuda", torch.bfloat16) if fast else contextlib.nullcontext()


def order_of(seed: int, samples: int, steps: int, batch: int) -> np.ndarray:
    """Return the sample numbers of every step, [steps, batch]: shuffled epochs one after another, from the seed."""
    rng = np.random.default_rng(seed + 1000)
    epochs = -(-steps * batch // samples)
    return np.concatenate([rng.permutation(samples) for _ in range(epochs)])[: steps * batch].reshape(steps, batch)


def _names(samples: Samples) -> Tensor:
    """Of each visual token, the photograph under its centre: class, row and column in the scene's grid, int64 [B * n, 3]."""
    side = math.isqrt(VISUAL)
    line = (np.arange(side) * 2 + 1)[None] * samples.grid[:, None] // (2 * side)  # [B, side]
    row, column = np.broadcast_arrays(line[:, :, None], line[:, None, :])
    row, column = row.reshape(len(samples), -1), column.reshape(len(samples), -1)
    classes = np.take_along_axis(samples.classes, row * samples.grid[:, None] + column, 1)
    return torch.from_numpy(np.stack([classes, row, column], -1)).flatten(0, 1)


def from_scratch(
    model: Any,
    draw: Callable[[int], Any],
    album: Album,
    text: Text,
    *,
    steps: int,
    rate: float,
    seed: int,
    naming_weight: float = NAMING,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Train a model by cross-entropy on `draw(step)`, plus a loss that names visual tokens, at a weight that falls to 0.

    naming_weight: 0 for samples that are not scenes.
    """
    device = album.pixels.device
    torch.manual_seed(seed)
    naming = nn.Linear(model.config.text_config.hidden_size, 16).to(device)
    chosen = [p for p in (*model.parameters(), *naming.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    model.train()
    for step in range(steps):
        samples = draw(step)
        batch, host = batch_of(samples, text, album)
        labels = host["labels"][:, 1:]
        at = (labels != IGNORE_INDEX).nonzero()
        targets = labels[at[:, 0], at[:, 1]].to(device)
        share = rate_at(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        with mixed(device):
            hidden = model.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).last_hidden_state
            logits = model.lm_head(hidden[at[:, 0].to(device), at[:, 1].to(device)])
            loss = cross_entropy(logits.float(), targets)
            extra = loss.new_zeros(())
            if naming_weight:
                named = naming(hidden[:, 2 : 2 + VISUAL]).float().flatten(0, 1)
                parts = zip(named.split([10, 3, 3], -1), _names(samples).to(device).unbind(-1), strict=True)
                extra = torch.stack([cross_entropy(guess, true) for guess, true in parts]).sum()
        optimizer.zero_grad(set_to_none=True)
        (loss + naming_weight * (1 - step / steps) * extra).backward()
        clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        if step % 100 == 99:
            log(f"step {step + 1} of {steps}: loss {loss.item():.4f}, naming {extra.item():.4f}")


def learn(
    model: Any,
    teacher: Any,
    method: Method,
    setting: str,
    samples: Asked,
    album: Album,
    text: Text,
    *,
    order: np.ndarray,
    rate: float,
    scales: dict[str, Tensor] | None = None,
    deep: Tensor | None = None,
) -> tuple[dict[str, Any], Frozen]:
    """Train the student `model` by a method and freeze it; return the entries of its record, and codes and scales by layer.

    order: sample numbers of each step, [steps, B]. scales: start values by layer, for a method that starts from another one.
    deep: the teacher's states, for a method that relates other layers or tokens. The model ends with `code * scale` in its
    weights where it was quantized, all parameters in bfloat16 (float16 at 8 bits, whose products bfloat16 does not hold).
    """
    device, steps = album.pixels.device, len(order)
    stored = stored_dtype(setting)
    probe, _ = batch_of(samples.take(order[0]), text, album)
    quantized = quantize(model, method, setting, probe, scales)
    objective = _objective(method, deep)
    objective.prepare(model, teacher, vocabulary=VOCABULARY, total_steps=steps, attached=quantized.attached)
    if method.scales_alone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and (parameter.ndim == 1 or name.endswith(PARAMETER)))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    weights, scales = ([p for n, p in named if n.endswith(PARAMETER) == wanted] for wanted in (False, True))
    groups = [{"params": weights, "times": 1.0}, *([{"params": scales, "times": method.scale_rate}] if scales else [])]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    model.train()
    trace: list[dict[str, float]] = []
    for step, numbers in enumerate(order):
        share = rate_at(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * share * group["times"]
        batch, host = batch_of(samples.take(numbers), text, album, keys=numbers)
        with mixed(device, stored):
            objective.begin_step([batch], [host])
            loss = objective.compute_loss(model, batch)
        loss.backward()
        record = objective.reduce_metrics()
        for part in (weights, scales):
            clip_grad_norm_(part, 1.0)
        if record.finite:
            optimizer.step()
        beta = objective.beta
        if isinstance(objective, RuleObjective):
            objective.progress = share
        objective.end_step(skipped=not record.finite)
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            now = {"ce": record.ce, "gdkd": record.gdkd, "rcka": record.rcka, "beta": beta, "gate": record.gate_mean}
            trace.append({"step": step, **{name: round(value, 5) for name, value in now.items()}})
    said = {"trace": trace, "controller": objective.controller_logs(), "skipped": objective.nonfinite_steps}
    quantized.bake()
    if quantized.bits:
        said["bits"] = quantized.bits
    frozen = objective.finalize(stored)
    return said, frozen if not method.float_scales else _rounded(model, frozen, stored)


def _objective(method: Method, deep: Tensor | None) -> Any:
    """Return the objective of a method; deep: as for `learn`."""
    blocks = method.blocks()
    if method.rule is not None:
        objective: Any = RuleObjective(*blocks)
        objective.rule = method.rule
    elif deep is not None:
        objective = RelationObjective(*blocks)
        objective.layers, objective.kinds, objective.states = method.layers, method.kinds, deep
    else:
        objective = (PlainObjective if method.plain else GraceObjective)(*blocks)
    return objective


def _rounded(model: Any, frozen: Frozen, stored: torch.dtype) -> Frozen:
    """Codes and scales, the scales rounded to what is stored after training, and the weights that they make."""
    rounded = {name: (codes, scale.to(stored)) for name, (codes, scale) in frozen.items()}
    for name, (codes, scale) in rounded.items():
        model.get_submodule(name).weight.data = dequantize(codes, scale)
    return rounded
