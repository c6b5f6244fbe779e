"""Training on a GPU: the kernels inside a real run, and a checkpoint that proves itself against torch's arithmetic."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import grace_plugin
from grace_plugin.losses import fused_head_triton, relational_triton
from grace_plugin.quantizer import QuantFormat, fake_quant_triton
from tests.objective.parts import Set
from tests.pairs import mixed_samples, pair, recipe_text, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FAMILIES = ("llava", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3")
ON_CUDA = {"use_cpu": False, "bf16": True, "max_steps": 10, "learning_rate": 1e-3, "logging_steps": 1}


def proved(found: dict[str, Any]) -> None:
    """Codes, scales, weights and logits are those of the forward pass with the final weights."""
    assert found["verified"] and found["logits_equal"]
    counted = ("codes_differing", "scales_differing")  # in memory; later, by hash, whole layers
    counted = counted if counted[0] in found else ("layers_with_other_codes", "layers_with_other_scales")
    assert [found[key] for key in (*counted, "weights_differing", "forward_weights_differing")] == [0, 0, 0, 0]
    assert found["layers"] == found["layers_stored"] > 0


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_cuda_ships_what_it_trained(family: str, accumulate: int, tmp_path: Path) -> None:
    made = pair(family, tmp_path)
    recipe = recipe_text(made.teacher, teacher={"model": str(made.teacher)})
    options = {"gradient_accumulation_steps": accumulate, "gradient_checkpointing": True, **ON_CUDA}
    done = run(made, tmp_path / "out", mixed_samples(12), recipe=recipe, **options)
    proved(done.verification)
    proved(grace_plugin.verify(done.checkpoint))
    losses = [row["loss_gdkd"] for row in done.history if "loss_gdkd" in row]
    assert len(losses) == 10 and losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["scales", "lora"])
def test_small_cards_ship_what_they_trained(method: str, tmp_path: Path) -> None:
    made = pair("qwen3_vl", tmp_path)
    training = {"method": method, "norms": True}
    recipe = recipe_text(made.teacher, teacher={"model": str(made.teacher)}, training=training)
    done = run(made, tmp_path / "out", mixed_samples(12), recipe=recipe, **ON_CUDA)
    proved(done.verification)
    proved(grace_plugin.verify(done.checkpoint))


def test_resumed_run_on_cuda__draws_the_numbers_of_the_uninterrupted_run(tmp_path: Path) -> None:
    """NEFTune draws noise on the GPU in every forward pass; its generator must go on where the state was written."""
    made = pair("llava", tmp_path)
    options = {**ON_CUDA, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "neftune_noise_alpha": 5.0}
    run(made, tmp_path / "whole", mixed_samples(8), **options)
    shutil.copytree(tmp_path / "whole.run" / "checkpoint-2", tmp_path / "resumed.run" / "checkpoint-2")
    run(made, tmp_path / "resumed", mixed_samples(8), resume_from_checkpoint=True, **options)
    states = [
        torch.load(tmp_path / f"{name}.run" / f"checkpoint-{step}" / "rng_state.pth", weights_only=False)["cuda"]
        for name, step in (("whole", 2), ("whole", 4), ("resumed", 4))
    ]
    assert torch.equal(states[1], states[2]) and not torch.equal(states[0], states[1])


def test_kernels__tensors_on_cuda__taken() -> None:
    bfloat16 = torch.empty(1, 8, 32, device="cuda", dtype=torch.bfloat16)
    assert fused_head_triton.usable(bfloat16[0])
    assert relational_triton.usable(bfloat16)
    assert fake_quant_triton.usable(torch.empty(4, 32, device="cuda"), QuantFormat())


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_the_gpu_trains_as_the_cpu_does(family: str, tmp_path: Path) -> None:
    made = pair(family, tmp_path)
    options: dict[str, Any] = {
        "max_steps": 4,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    logs = []
    for place, use_cpu in (("cpu", True), ("cuda", False)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # patch embeddings are convolutions
            done = run(made, tmp_path / place, mixed_samples(8), use_cpu=use_cpu, bf16=False, tf32=False, **options)
        logs.append([row for row in done.history if "loss_gdkd" in row])
    for cpu, cuda in zip(*logs, strict=True):
        for term in ("loss_ce", "loss_gdkd", "loss_rcka", "grad_norm", "beta"):
            assert float(cuda[term]) == pytest.approx(float(cpu[term]), rel=2e-3), term


def test_a_teacher_beside_the_student_gives_the_numbers_of_one_in_turn() -> None:
    """The teacher is slow, so that what does not wait for it reads something else."""
    made = Set("llava")
    assert made.grace.teacher is not None
    made.student.cuda()
    made.grace.teacher.to(torch.device("cuda"))
    made.teacher.register_forward_hook(
        lambda *_: torch.cuda._sleep(100_000_000)
    )  # what is read of it comes 50 ms later
    asked = mixed_samples(6)
    host = [made.collate(asked[first : first + 2]) for first in (0, 2, 4)]
    batches = [{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in host]
    found = []
    for aside in (False, True, False, True):
        made.grace.teacher.side_stream = aside
        tokens = int(made.grace.begin_step(batches, host))
        quantiles = made.grace.gate_quantiles() if len(found) > 1 else {}
        losses = [made.grace.compute_loss(made.student, batch).item() for batch in batches]
        found.append((tokens, losses, made.grace.reduce_metrics()))
        assert not quantiles or quantiles["gate_q50"] > 0.0
        made.grace.steps = 0
    assert found[0][0] > 0 and len(set(found[0][1])) == 3
    for other in found[1:]:
        assert other == found[0]
