"""Scale-only and LoRA runs end to end: trained, saved, verified, reloaded, resumed, and run again from the saved recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

import grace_plugin
from grace_plugin.data import ConversationCollator
from tests.pairs import Pair, mixed_samples, pair, recipe_text, run
from tests.tiny import make_samples

METHODS: dict[str, dict[str, Any]] = {
    "scales": {"method": "scales"},
    "scales_norms": {"method": "scales", "norms": True},
    "lora": {"method": "lora", "lora": {"rank": 8, "alpha": 16}},
    "lora_norms": {"method": "lora", "norms": True},
}
STEPS, STOP = 6, 3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {family: pair(family, tmp_path_factory.mktemp(family)) for family in ("llava", "qwen2_vl")}


def go(pair: Pair, out: Path, method: str, **options: Any) -> Any:
    recipe = options.pop("recipe", None) or recipe_text(pair.teacher, training=METHODS[method])
    asked: dict[str, Any] = {
        "max_steps": STEPS, "learning_rate": 5e-3, "warmup_steps": 0, "lr_scheduler_type": "constant", "logging_steps": 1,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    return run(pair, out, mixed_samples(8), recipe=recipe, **(asked | options))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def differing(one: Path, two: Path) -> list[str]:
    left, right = tensors(one), tensors(two)
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llava", method) for method in METHODS), ("qwen2_vl", "scales"), ("qwen2_vl", "lora_norms")],
)
def test_a_run_learns_and_ships_what_it_trained(
    family: str, method: str, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    result = go(pairs[family], tmp_path / "out", method)
    assert result.verification["verified"] and result.verification["logits_equal"]
    assert (result.verification["layers"], result.verification["codes_differing"]) == (21, 0)
    again = grace_plugin.verify(result.checkpoint)
    assert (again["verified"], again["layers_with_other_codes"], again["layers_with_other_scales"]) == (True, 0, 0)
    losses = [log["loss"] for log in result.history if "loss" in log]
    assert sum(losses[-2:]) < 0.98 * sum(losses[:2])
    source, stored = tensors(pairs[family].student), tensors(result.checkpoint)
    moved = {name for name in source.keys() & stored.keys() if not torch.equal(source[name], stored[name])}
    assert len(source.keys() & stored.keys()) > 30
    assert bool(moved) == METHODS[method].get("norms", False)
    assert all("norm" in name or ".ln_q" in name for name in moved)
    assert {t.dtype for name, t in stored.items() if not name.endswith(("_packed", "_shape"))} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["scales", "lora"])
def test_codes_and_scales_of_every_layer_move(method: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    start = go(pairs["llava"], tmp_path / "start", method, learning_rate=0.0, max_steps=1)
    end = go(pairs["llava"], tmp_path / "end", method)
    changed = differing(start.checkpoint, end.checkpoint)
    assert sum(name.endswith("weight_scale") for name in changed) == 21
    assert sum(name.endswith("weight_packed") for name in changed) == 21


@pytest.mark.parametrize("method", ["scales_norms", "lora_norms"])
def test_a_resumed_run_ends_with_the_same_bits(method: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STOP + 1:
                raise KeyboardInterrupt

    saving = {"save_strategy": "steps", "save_steps": STOP}
    whole = go(pairs["llava"], tmp_path / "whole", method, **saving)
    with pytest.raises(KeyboardInterrupt):
        go(pairs["llava"], tmp_path / "out", method, callbacks=[Stop()], **saving)
    held = tensors(tmp_path / "out.run" / f"checkpoint-{STOP}")
    learned = [t for n, t in held.items() if n.endswith(("log_scale", "lora_A", "lora_B", "original"))]
    assert len(learned) > 21 and {t.dtype for t in learned} == {torch.float32}
    resumed = go(pairs["llava"], tmp_path / "out", method, resume_from_checkpoint=True, **saving)
    assert differing(whole.checkpoint, resumed.checkpoint) == []


@pytest.mark.parametrize("method", ["scales", "lora"])
def test_the_saved_recipe_gives_the_same_run(method: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    first = go(pairs["llava"], tmp_path / "first", method)
    torch.manual_seed(99)
    recipe, teacher = (
        first.checkpoint / "recipe.yaml",
        str(pairs["llava"].teacher),
    )  # it has the teacher's name, no path
    second = go(pairs["llava"], tmp_path / "second", method, recipe=recipe, teacher=teacher)
    assert differing(first.checkpoint, second.checkpoint) == []


@pytest.mark.parametrize("method", ["scales_norms", "lora_norms"])
def test_under_autocast_as_on_a_gpu(method: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    result = go(pairs["qwen2_vl"], tmp_path / "out", method, bf16=True, gradient_checkpointing=True)
    assert result.verification["verified"] and result.verification["codes_differing"] == 0


@pytest.mark.parametrize("method", ["scales_norms", "lora"])
def test_in_a_loop_of_ones_own(method: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    student = AutoModelForImageTextToText.from_pretrained(pairs["qwen2_vl"].student, dtype="auto")
    collator = ConversationCollator(AutoProcessor.from_pretrained(pairs["qwen2_vl"].student))
    recipe = recipe_text(pairs["qwen2_vl"].teacher, training=METHODS[method])
    student.train()
    with grace_plugin.grace_session(student, recipe, total_steps=2) as grace:
        groups = grace.parameter_groups(1e-3, weight_decay=0.1)
        assert len(groups[1]["params"]) == 21
        assert {p.dtype for g in groups for p in g["params"]} == {torch.float32}
        optimizer = torch.optim.AdamW(groups)
        for seed in (1, 2):
            batch = collator(make_samples(2, seed=seed))
            grace.objective.begin_step([batch])
            grace.objective.compute_loss(student, batch).backward()
            assert grace.objective.reduce_metrics().finite
            assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
            optimizer.step()
            grace.objective.end_step()
            optimizer.zero_grad()
        found = grace.save(tmp_path / "out")
    assert (found["verified"], found["codes_differing"]) == (True, 0)
    assert {p.dtype for p in student.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert not any("lora" in name or "parametrizations" in name for name in student.state_dict())


@pytest.mark.parametrize("method", ["scales", "lora"])
def test_through_oneshot(method: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    oneshot = {"epochs": 1, "learning_rate": 1.0e-3}
    result = grace_plugin.oneshot(
        str(pairs["llava"].student), recipe=recipe_text(pairs["llava"].teacher, training=METHODS[method], oneshot=oneshot),
        dataset=make_samples(4), output_dir=tmp_path / "out", batch_size=2,
    )  # fmt: skip
    assert (result.verification["verified"], result.verification["codes_differing"]) == (True, 0)
