"""A whole GRACE step at the shapes of Qwen3-VL-2B under its 8B teacher, next to plain training and the teacher's forward alone.

Weights are random: speed does not depend on them. Four sequences of 2,048 tokens with two images of 256 tokens each, 512
supervised tokens to a sequence, float32 masters under bfloat16 autocast, activation checkpointing, fused AdamW. Each timed step
follows an untimed one of its kind: a step leaves the next one its quantized weights, and another's optimizer would undo that.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.speed.cached import cached_teacher
from benchmarks.speed.timing import Work, device_ms, extra_gib, paired_ms, reserved_gib
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer import QuantFormat, attach
from grace_plugin.recipe import TrainingRecipe
from grace_plugin.teacher import ResidentTeacher, model_inputs
from grace_plugin.teacher.self_teacher import unquantized

__all__ = ["memory", "step"]

STUDENT = {
    "hidden": 2048,
    "mlp": 6144,
    "layers": 28,
    "heads": 16,
    "tied": True,
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "deepstack_visual_indexes": [5, 11, 17]},
}
TEACHER = {
    "hidden": 4096,
    "mlp": 12288,
    "layers": 36,
    "heads": 32,
    "tied": False,
    "vision": {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "deepstack_visual_indexes": [8, 16, 24]},
}
VOCABULARY, IMAGE = 151936, 5
Variant = Callable[[], AbstractContextManager[object]]


def _config(shape: dict[str, Any], shrink: int) -> Qwen3VLConfig:
    """A model of that shape; `shrink` divides depths and widths for machines without a GPU."""
    hidden, vision = shape["hidden"] // shrink, dict(shape["vision"])
    vision["depth"] = max(vision["depth"] // shrink, 4)
    vision["deepstack_visual_indexes"] = vision["deepstack_visual_indexes"] if shrink == 1 else [0, 1, 2]
    vision |= {
        "hidden_size": vision["hidden_size"] // shrink,
        "intermediate_size": vision["intermediate_size"] // shrink,
    }
    heads = min(shrink, 4)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {
        "hidden_size": hidden,
        "intermediate_size": shape["mlp"] // shrink,
        "head_dim": 128,
        "rope_parameters": rope,
        "num_hidden_layers": max(shape["layers"] // shrink, 2),
        "num_attention_heads": shape["heads"] // heads,
        "num_key_value_heads": 8 // heads,
        "vocab_size": VOCABULARY // shrink,
        "tie_word_embeddings": shape["tied"],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config={"out_hidden_size": hidden, "num_heads": 16 // heads, **vision},
        tie_word_embeddings=shape["tied"],
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )


def shaped(shape: dict[str, Any], device: str, dtype: torch.dtype, shrink: int) -> Any:
    """A model of that shape, filled at random."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = Qwen3VLForConditionalGeneration(_config(shape, shrink))
        finally:
            torch.set_default_dtype(torch.float32)
    return model


def _batch(rows: int, length: int, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    side = 32
    tokens = side * side // 4
    ids = torch.randint(20, vocabulary, (rows, length))
    for first in (16, 16 + tokens + 16):
        ids[:, first : first + tokens] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[:, -length // 4 :] = ids[:, -length // 4 :]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(rows * 2 * side * side, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, side, side]] * (2 * rows)),
        "labels": labels,
    }
    return {key: value.to(device) for key, value in batch.items()}


def _trainable(student: Any) -> Any:
    student.model.visual.requires_grad_(False)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    return student


def _optimizer(student: Any, device: str) -> torch.optim.Optimizer:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-6, fused=device == "cuda")


def _grace(
    student: Any,
    teacher: Any,
    batch: dict[str, Any],
    device: str,
    training: TrainingRecipe | None = None,
    baselines: dict[str, Work] | None = None,
    variants: dict[str, Variant] | None = None,
) -> dict[str, Any]:
    """The objective's protocol with learned scales on every linear of the decoder, and AdamW.

    Args:
        student: with trainable parameters.
        teacher: a model or a cached teacher.
        batch: one micro-batch on the device.
        device: "cuda" or "cpu".
        training: the recipe's block.
        baselines: works timed by turns with the step; a plain step and other ways to run it are then timed as well.
        variants: contexts that change one part; a step within each is timed by turns with the step as it is.
    """
    training = training or TrainingRecipe()
    grace = GraceObjective(training=training)
    linears = {name: m for name, m in student.model.language_model.named_modules() if isinstance(m, nn.Linear)}
    attached = attach(linears, QuantFormat())
    if training.lora is not None:
        attached.add_lora(linears, rank=training.lora.rank, alpha=training.lora.alpha)
    vocabulary = student.config.text_config.vocab_size
    grace.prepare(student, teacher, vocabulary=vocabulary, total_steps=1000, attached=[attached])
    optimizer, resident = _optimizer(student, device), isinstance(grace.teacher, ResidentTeacher)
    host = [{key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}]

    def work(defer: bool = False, aside: bool = True) -> None:
        attached.defer_grads(defer)
        if resident:
            grace.teacher.side_stream = aside  # type: ignore[union-attr]
        with torch.autocast(device, dtype=torch.bfloat16):
            grace.begin_step([batch], host)
            loss = grace.compute_loss(student, batch)
        loss.backward()
        grace.reduce_metrics()
        attached.finalize_deferred_grads()
        optimizer.step()
        grace.end_step()
        optimizer.zero_grad()

    def plain() -> None:
        """Cross-entropy as transformers computes it, logits of every token, no quantization; the same optimizer."""
        with unquantized(list(linears.values())), torch.autocast(device, dtype=torch.bfloat16):
            student(**model_inputs(batch), labels=batch["labels"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def within(variant: Variant) -> None:
        with variant():
            work()

    works: dict[str, Work] = {"ms": work}
    works |= {name: partial(within, variant) for name, variant in (variants or {}).items()}
    if baselines is not None:
        works |= {"plain_ms": plain, **baselines}
        # a teacher in the student's stream; gradients of scales all at once, as with several micro-batches, not layer by layer
        works |= {"in_turn_ms": lambda: work(aside=False)} if resident else {"at_once_ms": lambda: work(defer=True)}
    found: dict[str, Any] = {**paired_ms(works, 15, lead=1), "gib": extra_gib(work)}
    if baselines is not None:
        found |= {"plain_gib": extra_gib(plain), "reserved_gib": reserved_gib(work)}
        found |= {"device_ms": device_ms(work), "plain_device_ms": device_ms(plain)}
        if resident:
            found["in_turn_reserved_gib"] = reserved_gib(lambda: work(aside=False))
        found["ratio"] = found["ms"] / (found["plain_ms"] + sum(found[name] for name in baselines))
    attached.detach()
    return found


def _free(student: Any) -> None:
    student.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step(device: str, *, rows: int = 4, length: int = 2048, shrink: int = 1) -> dict[str, Any]:
    """Milliseconds and peak GiB (beyond weights and optimizer) of GRACE steps, next to plain steps and the teacher's
    forward.
    """
    teacher = shaped(TEACHER, device, torch.bfloat16, shrink).eval().requires_grad_(False)
    student = _trainable(shaped(STUDENT, device, torch.float32, shrink))
    batch: dict[str, Any] = _batch(rows, length, student.config.text_config.vocab_size, device)
    inputs = model_inputs(batch)

    @torch.no_grad()
    def forward() -> None:
        teacher(**inputs, use_cache=False, logits_to_keep=1)

    found: dict[str, Any] = {"supervised_tokens": rows * (length // 4)}
    found |= {
        f"{n}_parameters": sum(p.numel() for p in m.parameters())
        for n, m in (("student", student), ("teacher", teacher))
    }
    found["resident"] = _grace(student, teacher, batch, device, baselines={"teacher_ms": forward})
    _free(student)
    with tempfile.TemporaryDirectory(prefix="grace-cached-") as folder:
        cached = cached_teacher(teacher.config, batch, IMAGE, Path(folder), device)
        found["cached"] = _grace(student, cached, batch, device, baselines={})
    return found


def memory(
    device: str, caps: dict[str, float], *, rows: int = 2, length: int = 2048, shrink: int = 1
) -> list[dict[str, Any]]:
    """GRACE with the cached teacher, each method under a cap in GiB on what the process may take of the device."""
    found = []
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    for method, cap in caps.items():
        training = TrainingRecipe.model_validate({"method": method})
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
            torch.cuda.reset_peak_memory_stats()
        student = _trainable(shaped(STUDENT, device, torch.float32 if method == "full" else torch.bfloat16, shrink))
        batch: dict[str, Any] = _batch(rows, length, student.config.text_config.vocab_size, device)
        config = _config(TEACHER, shrink)
        with tempfile.TemporaryDirectory(prefix="grace-cached-") as folder:
            teacher = cached_teacher(config, batch, IMAGE, Path(folder), device)
            row = {
                "method": method,
                "cap_gib": cap,
                "rows": rows,
                "length": length,
                **_grace(student, teacher, batch, device, training),
            }
        if device == "cuda":
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        found.append(row)
        del teacher
        _free(student)
        del student
        gc.collect()
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found
