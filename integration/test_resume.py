"""A run stopped at step k and resumed ends with the codes and scales of the uninterrupted run, bit for bit.

Each run has its own session and its own models, loaded from disk; nothing of the stopped run is left in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from grace_plugin.run.trainer import STATE_FILE
from tests.pairs import Pair, pair, recipe_text, run
from tests.tiny import make_samples

STEPS, STOP = 8, 4
DATA = make_samples(13, seed=21) + make_samples(2, seed=22, images=2) + make_samples(2, seed=23, images=0)


class StopAt(TrainerCallback):
    """Ends the process's part of the run after a step, as a killed job would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step + 1:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair("llava", tmp_path_factory.mktemp("pair"))


ASCENT = {"enabled": True, "beta_start": 0.4, "tau": 1.0, "eta": 0.01}


def go(pair: Pair, out: Path, **options: Any) -> Any:
    """17 samples in batches of 2, two to a step: five steps an epoch, the fifth of one sample, after the stop at step 4."""
    asked: dict[str, Any] = {
        "max_steps": STEPS, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": STOP,
        "logging_steps": 1, "learning_rate": 2e-3,
    }  # fmt: skip
    recipe = options.pop("recipe", None) or recipe_text(pair.teacher, controller=ASCENT)
    return run(pair, out, DATA, recipe=recipe, **(asked | options))


def stopped(pair: Pair, out: Path, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(pair, out, callbacks=[StopAt(STOP)], **options)
    assert not out.exists()
    assert (out.with_name(f"{out.name}.run") / f"checkpoint-{STOP}").is_dir()


@pytest.fixture(scope="module")
def whole(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return go(llava, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def interrupted(llava: Pair, tmp_path: Path) -> Path:
    stopped(llava, tmp_path / "out")
    return tmp_path / "out"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def objective_state(run_folder: Path, step: int) -> dict[str, Any]:
    return json.loads((run_folder / f"checkpoint-{step}" / STATE_FILE).read_text())["objective"]


def test_resume__stopped_run__same_bits(llava: Pair, whole: Any, interrupted: Path) -> None:
    resumed = go(llava, interrupted, resume_from_checkpoint=True)
    one, two = tensors(whole.checkpoint), tensors(resumed.checkpoint)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert sum(name.endswith("weight_packed") for name in one) == 21
    start = tensors(llava.student)
    assert not torch.equal(start["multi_modal_projector.linear_1.weight"], two["multi_modal_projector.linear_1.weight"])
    after = [log for log in whole.history if log["step"] > STOP and "loss" in log]
    again = [log for log in resumed.history if log["step"] > STOP and "loss" in log]
    assert len(after) == len(again) == STEPS - STOP
    for expected, found in zip(after, again, strict=True):
        assert found == expected


def test_resume__controller__state_restored(llava: Pair, whole: Any, interrupted: Path) -> None:
    folder = interrupted.with_name("out.run")
    before = objective_state(folder, STOP)
    assert before["steps"] == before["controller"]["step"] == STOP
    go(llava, interrupted, resume_from_checkpoint=True)
    after = objective_state(folder, STEPS)
    assert after == objective_state(whole.checkpoint.with_name("out.run"), STEPS)
    assert after["controller"]["ema"] != before["controller"]["ema"]
    assert 0.4 != after["controller"]["beta"] != before["controller"]["beta"]
    assert after["steps"] == after["controller"]["step"] == STEPS


def test_resume_state__scales__float32_with_optimizer_state(interrupted: Path) -> None:
    folder = interrupted.with_name("out.run") / f"checkpoint-{STOP}"
    held = tensors(folder)
    theta = {name: t for name, t in held.items() if name.endswith("weight_log_scale")}
    assert len(theta) == 21
    assert {t.dtype for t in theta.values()} == {torch.float32}
    groups = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]
    assert len(groups[-1]["params"]) == 21


def test_train__states_of_an_earlier_run__refused(llava: Pair, interrupted: Path) -> None:
    with pytest.raises(
        FileExistsError, match=r"out\.run holds resume states of an earlier run; pass resume_from_checkpoint=True"
    ):
        go(llava, interrupted)
    assert not interrupted.exists()


def test_resume__another_recipe__refused(llava: Pair, interrupted: Path) -> None:
    other = recipe_text(llava.teacher, controller=ASCENT, distill={"temperature": 3.0})
    with pytest.raises(
        ValueError, match=r"started with other values.*: recipe.distill.temperature: 2.0 -> 3.0. Resume with"
    ):
        go(llava, interrupted, recipe=other, resume_from_checkpoint=True)
    assert not interrupted.exists()


def test_resume__another_length__refused(llava: Pair, interrupted: Path) -> None:
    with pytest.raises(ValueError, match=rf"max_steps: {STEPS} -> {STEPS + 2} .never: the warm-up follows"):
        go(llava, interrupted, max_steps=STEPS + 2, resume_from_checkpoint=True)
    assert not interrupted.exists()


def test_resume__no_state__refused(llava: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out\.run"):
        go(llava, tmp_path / "out", resume_from_checkpoint=True)
    assert not (tmp_path / "out").exists()
