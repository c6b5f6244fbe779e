"""A run is resumed only under what it was started with: each difference is listed with both values, or allowed by name."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from grace_plugin.digest import model_digest, tensor_digest
from grace_plugin.run.fingerprint import check_same_run
from tests.pairs import Pair, recipe_text, run
from tests.tiny import build, make_samples, save

STEPS: dict[str, Any] = {
    "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "logging_steps": 1,
}  # fmt: skip
DATA = make_samples(6, seed=3)


@pytest.fixture(scope="module")
def made(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a state of every step; never change it."""
    return run(llava, tmp_path_factory.mktemp("made") / "out", DATA, **STEPS).checkpoint


@pytest.fixture
def started(made: Path, tmp_path: Path) -> Path:
    """Where a run of three steps writes that was stopped after its first."""
    shutil.copytree(made.with_name("out.run") / "checkpoint-1", tmp_path / "out.run" / "checkpoint-1")
    return tmp_path / "out"


def resumed(pair: Pair, out: Path, dataset: Any = None, **options: Any) -> Any:
    return run(pair, out, DATA if dataset is None else dataset, resume_from_checkpoint=True, **(STEPS | options))


@pytest.mark.slow
def test_resume__other_arguments_and_samples__each_named_with_both_values(llava: Pair, started: Path) -> None:
    recipe = recipe_text(llava.teacher, relational={"weight": 2.0})
    with pytest.raises(ValueError, match="checkpoint-1 was started with other values") as raised:
        resumed(
            llava, started, DATA[::-1], learning_rate=5e-4, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            seed=7, lr_scheduler_type="linear", max_grad_norm=0.5, max_length=4000, recipe=recipe,
        )  # fmt: skip
    said = str(raised.value)
    for part in (
        "learning_rate: 0.001 -> 0.0005", "per_device_train_batch_size: 2 -> 1",
        "gradient_accumulation_steps: 1 -> 2", "seed: 42 -> 7", 'lr_scheduler_type: "constant" -> "linear"',
        "max_grad_norm: 1.0 -> 0.5", "max_length: null -> 4000", "dataset.content: ", "recipe.relational.weight: 3.0 -> 2.0",
        "--allow-resume-changes learning_rate",
    ):  # fmt: skip
        assert part in said, part
    assert "dataset.samples" not in said and "student" not in said and "hash" not in said
    assert not started.exists()


@pytest.mark.slow
def test_resume__another_student_of_the_same_shape__refused(llava: Pair, started: Path, tmp_path: Path) -> None:
    save(*build("llava", seed=5), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other values.*: student.files: [0-9a-f]{12} -> [0-9a-f]{12}\. Resume with"):
        resumed(llava, started, model=str(tmp_path / "other"))


@pytest.mark.slow
def test_resume__another_optimizer_or_length__never_allowed(llava: Pair, started: Path) -> None:
    with pytest.raises(
        ValueError, match=r'optim: "adamw_torch_fused" -> "sgd" \(never: its states are another optimizer'
    ):
        resumed(llava, started, optim="sgd", allow_resume_changes=("optim",))
    with pytest.raises(ValueError, match=r"max_steps: 3 -> 4 \(never: the warm-up follows"):
        resumed(llava, started, max_steps=4)


@pytest.mark.slow
def test_resume__allowed_rate__used_from_the_next_step_on_and_said(
    llava: Pair, started: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = resumed(llava, started, learning_rate=5e-4, allow_resume_changes=["learning_rate"])
    assert "allowed change: learning_rate: 0.001 -> 0.0005; the steps from here on use the new value" in caplog.text
    assert [log["learning_rate"] for log in result.history if "loss" in log] == [1e-3, 5e-4, 5e-4]
    with pytest.raises(
        ValueError,
        match=r"allow_resume_changes: no such key learning_rat; keys are adam_beta1, .* dataset, .* learning_rate",
    ):
        run(
            llava, started.with_name("b"), DATA, allow_resume_changes=["learning_rat"],
            resume_from_checkpoint=started.with_name("out.run") / "checkpoint-1", **STEPS,
        )  # fmt: skip
    with pytest.raises(ValueError, match="allow_resume_changes is about a resumed run"):
        run(llava, started.with_name("b"), DATA, allow_resume_changes=["learning_rate"], **STEPS)


def test_check__environment_differs__said_but_resumed(caplog: pytest.LogCaptureFixture) -> None:
    one = {"seed": 1, "environment.torch": "2.12"}
    assert check_same_run(one, one | {"environment.torch": "2.13"}) == set()
    assert 'environment.torch: "2.12" -> "2.13"' in caplog.text
    assert check_same_run(one, one | {"seed": 2}, ["seed"]) == {"seed"}
    with pytest.raises(ValueError, match='packing: "not recorded" -> false'):
        check_same_run(one, one | {"packing": False})


def test_model_digest__any_value_or_its_place__counts() -> None:
    torch.manual_seed(0)
    model = nn.Linear(200, 100)
    before = model_digest(model)
    assert model_digest(model) == before
    with torch.no_grad():
        model.weight[99, 199] *= -1
        signed = model_digest(model)
        model.weight[99, 199] *= -1
        model.weight[98:] = model.weight[98:].flip(0).clone()  # the same values, in another order
    assert len({before, signed, model_digest(model)}) == 3


def test_tensor_digest__shape_and_dtype_count_and_every_dtype_is_taken() -> None:
    zeros = torch.zeros(4, 2)
    others = [zeros.reshape(8), zeros.to(torch.int32), zeros.to(torch.float8_e4m3fn), zeros[0, 0], zeros[:0]]
    assert len({tensor_digest(one) for one in [zeros, *others]}) == 6
    assert tensor_digest(zeros.t().contiguous().t()) == tensor_digest(zeros)


class Lines(IterableDataset[dict[str, Any]]):
    """A stream of given samples."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.samples)


def test_stream__other_samples_before_the_resume_state__refused(llava: Pair, tmp_path: Path) -> None:
    samples = make_samples(8, seed=3)
    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = run(llava, tmp_path / "whole", Lines(samples), **options).checkpoint
    for name in ("same", "other", "allowed"):
        shutil.copytree(tmp_path / "whole.run" / "checkpoint-2", tmp_path / f"{name}.run" / "checkpoint-2")
    resumed = run(llava, tmp_path / "same", Lines(samples), resume_from_checkpoint=True, **options).checkpoint
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    other = [samples[1], samples[0], *samples[2:]]
    with pytest.raises(
        ValueError, match=r"the first 2 steps of its epoch 0 read others before.*resume-changes dataset"
    ):
        run(llava, tmp_path / "other", Lines(other), resume_from_checkpoint=True, **options)
    options |= {"allow_resume_changes": ["dataset"]}
    run(llava, tmp_path / "allowed", Lines(other), resume_from_checkpoint=True, **options)


def test_stream__resumed_at_the_end_of_an_epoch__same_files(llava: Pair, tmp_path: Path) -> None:
    samples = make_samples(8, seed=3)  # two steps an epoch
    options: dict[str, Any] = {"max_steps": 5, "save_strategy": "epoch", "gradient_accumulation_steps": 2}
    whole = run(llava, tmp_path / "whole", Lines(samples), **options).checkpoint
    (state,) = [path for path in (tmp_path / "whole.run").glob("checkpoint-*") if path.name == "checkpoint-2"]
    shutil.copytree(state, tmp_path / "again.run" / state.name)
    again = run(llava, tmp_path / "again", Lines(samples), resume_from_checkpoint=True, **options).checkpoint
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_resume_changes__controller__refused() -> None:
    one = {"recipe.controller.beta_start": 0.5, "recipe.scheme": "W4A16"}
    with pytest.raises(ValueError, match=r"0\.5 -> 0\.8 \(never: the resume state holds the weight of distillation"):
        check_same_run(one, one | {"recipe.controller.beta_start": 0.8}, ["recipe"])
