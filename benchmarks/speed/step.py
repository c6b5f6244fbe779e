"""A whole GRACE step at the shapes of Qwen3-VL-2B under its 8B teacher, beside plain training and the teacher's forward alone.

Weights are random: speed does not depend on them. Four sequences of 2,048 tokens with two pictures of 256 tokens each, 512
supervised tokens to a sequence, float32 masters under bfloat16 autocast, activation checkpointing, fused AdamW.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.speed.timing import extra_gib, median_ms
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer.attach import attach

__all__ = ["step"]

STUDENT = {
    "hidden": 2048, "mlp": 6144, "layers": 28, "heads": 16, "tied": True,
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "deepstack_visual_indexes": [5, 11, 17]},
}  # fmt: skip
TEACHER = {
    "hidden": 4096, "mlp": 12288, "layers": 36, "heads": 32, "tied": False,
    "vision": {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "deepstack_visual_indexes": [8, 16, 24]},
}  # fmt: skip
VOCABULARY = 151936


def _model(shape: dict[str, Any], device: str, dtype: torch.dtype, shrink: int) -> Any:
    """A randomly filled model of that shape; `shrink` divides depths and widths for machines without a GPU."""
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
        "hidden_size": hidden, "intermediate_size": shape["mlp"] // shrink, "head_dim": 128, "rope_parameters": rope,
        "num_hidden_layers": max(shape["layers"] // shrink, 2), "num_attention_heads": shape["heads"] // heads,
        "num_key_value_heads": 8 // heads, "vocab_size": VOCABULARY // shrink, "tie_word_embeddings": shape["tied"],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config={"out_hidden_size": hidden, "num_heads": 16 // heads, **vision},
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8, tie_word_embeddings=shape["tied"],
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = Qwen3VLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(torch.float32)
    return model


def _batch(rows: int, length: int, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    side = 32
    tokens = side * side // 4
    ids = torch.randint(20, vocabulary, (rows, length))
    for first in (16, 16 + tokens + 16):
        ids[:, first : first + tokens] = 5
    labels = torch.full_like(ids, -100)
    labels[:, -length // 4 :] = ids[:, -length // 4 :]
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 5).long(),
        "pixel_values": torch.randn(rows * 2 * side * side, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, side, side]] * (2 * rows)), "labels": labels,
    }  # fmt: skip
    return {key: value.to(device) for key, value in batch.items()}


def _trainable(student: Any) -> Any:
    student.model.visual.requires_grad_(False)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    return student


def _optimizer(student: Any, device: str) -> torch.optim.Optimizer:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-6, fused=device == "cuda")


def _plain(student: Any, batch: dict[str, torch.Tensor], device: str) -> dict[str, Any]:
    """Cross-entropy as transformers computes it, logits of every token, and AdamW."""
    optimizer = _optimizer(student, device)

    def work() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            student(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"plain_ms": median_ms(work, 7), "plain_gib": extra_gib(work)}


def _grace(student: Any, teacher: Any, batch: dict[str, torch.Tensor], device: str, vocabulary: int) -> dict[str, Any]:
    """The objective's protocol with learned scales on every linear of the decoder, and AdamW."""
    grace = GraceObjective()
    linears = {name: m for name, m in student.model.language_model.named_modules() if isinstance(m, nn.Linear)}
    attached = attach(linears, group_size=128)
    grace.prepare(student, teacher, vocabulary=vocabulary, total_steps=1000, attached=[attached])
    optimizer = _optimizer(student, device)

    def work() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            grace.window([batch])
            loss = grace.loss(student, batch)
        loss.backward()
        grace.measure()
        optimizer.step()
        grace.step(1.0)
        optimizer.zero_grad()

    return {"grace_ms": median_ms(work, 7), "grace_gib": extra_gib(work)}


def step(device: str, *, rows: int = 4, length: int = 2048, shrink: int = 1) -> dict[str, Any]:
    """Milliseconds and peak GiB (beyond weights and optimizer) of a plain step, a teacher's forward, and a GRACE step."""
    teacher = _model(TEACHER, device, torch.bfloat16, shrink).eval().requires_grad_(False)
    student = _trainable(_model(STUDENT, device, torch.float32, shrink))
    vocabulary = student.config.text_config.vocab_size
    batch = _batch(rows, length, vocabulary, device)
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    @torch.no_grad()
    def forward() -> None:
        teacher(**inputs, use_cache=False, logits_to_keep=1)

    found = {**_plain(student, batch, device), "teacher_ms": median_ms(forward, 7)}
    student.zero_grad()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    found |= _grace(student, teacher, batch, device, vocabulary)
    found["ratio"] = found["grace_ms"] / (found["plain_ms"] + found["teacher_ms"])
    found["supervised_tokens"] = rows * (length // 4)
    found["student_parameters"] = sum(p.numel() for p in student.parameters())
    found["teacher_parameters"] = sum(p.numel() for p in teacher.parameters())
    return found
