"""Two processes are one: loss, gradient and controller equal the single-process run of the same global batch.

Scenarios of integration/two_workers.py, all in one launch of torchrun, which must end: a collective that one rank does not
take part in would hang, and the time limit fails the test. On the CPU with gloo; with RANKS_ON=cuda on two GPUs with NCCL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_plugin.run.resume import damage, states
from integration import two_workers
from tests.pairs import Pair, pair

LIMIT_SECONDS = 300
ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
ONE_STEP = [name for name in two_workers.SCENARIOS if name not in ("not_finite_on_rank_1", "no_image_and_no_label")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def llava(folder: Path) -> Pair:
    return pair("llava", folder / "pair")


@pytest.fixture(scope="module")
def two(llava: Pair, folder: Path) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 saw."""
    out = folder / "two"
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "-m", "integration.two_workers", str(folder / "pair"), str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(llava: Pair, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The same global batches in this process."""
    (folder / "one").mkdir()
    return {name: two_workers.scenario(llava, name, folder / "one") for name in two_workers.SCENARIOS}


def steps(two: list[dict[str, Any]], name: str) -> list[list[dict[str, Any]]]:
    return [rank["scenarios"][name] for rank in two]


@pytest.mark.parametrize("name", ONE_STEP)
def test_gradient_loss_and_controller_are_the_single_processs(two: Any, one: Any, name: str) -> None:
    (single,) = one[name]
    for (step,) in steps(two, name):
        assert step["grad"].keys() == single["grad"].keys()
        for parameter, expected in single["grad"].items():
            distance = (step["grad"][parameter] - expected).double().norm()
            assert distance <= 1e-5 * expected.double().norm(), parameter
        for key, expected in single["record"].items():
            assert step["record"][key] == pytest.approx(expected, rel=2e-6), key
        assert step["controller"]["ema"] == pytest.approx(single["controller"]["ema"], rel=2e-6)
        assert step["controller"]["step"] == single["controller"]["step"] == 1
        assert set(step["moved"]) == set(single["moved"])
    assert single["record"]["loss_ce"] > 0 and single["record"]["loss_rcka"] > 0 and single["record"]["loss_gdkd"] > 0


@pytest.mark.parametrize("name", two_workers.SCENARIOS)
def test_both_ranks_hold_the_same_bits(two: Any, name: str) -> None:
    left, right = steps(two, name)
    assert len(left) == len(right) > 0
    for mine, theirs in zip(left, right, strict=True):
        assert mine["grad"].keys() == theirs["grad"].keys()
        assert all(torch.equal(mine["grad"][n], theirs["grad"][n]) for n in mine["grad"] if mine["record"]["finite"])
        assert {k: repr(v) for k, v in mine["record"].items()} == {k: repr(v) for k, v in theirs["record"].items()}
        assert mine["controller"] == theirs["controller"]


def test_the_scenarios_are_what_they_say(one: Any) -> None:
    assert one["no_image_on_rank_1"][0]["record"]["samples_without_images"] == 4
    assert one["no_image_on_rank_1"][0]["record"]["images"] == 4
    assert one["no_label_on_rank_1"][0]["record"]["images"] == 8


def test_nothing_supervised_anywhere_contributes_nothing_and_hangs_nothing(two: Any) -> None:
    for (step,) in steps(two, "no_image_and_no_label"):
        assert (
            step["record"]["supervised_tokens"],
            step["record"]["loss_ce"],
            step["record"]["loss_gdkd"],
            step["record"]["loss_rcka"],
        ) == (
            0,
            0,
            0,
            0,
        )
        assert step["record"]["finite"]
        assert all(not grad.any() for grad in step["grad"].values())
        assert step["controller"]["step"] == 0


def test_a_non_finite_loss_on_one_rank_skips_the_step_on_both(two: Any, one: Any) -> None:
    for rank in (*steps(two, "not_finite_on_rank_1"), one["not_finite_on_rank_1"]):
        first, second = rank
        assert not first["record"]["finite"]
        assert (first["moved"], first["nonfinite"], first["controller"]["step"]) == ([], 1, 0)
        assert second["record"]["finite"]
        assert second["nonfinite"] == 1
        assert any(name.endswith("weight_log_scale") for name in second["moved"])
        assert second["controller"]["step"] == 1


def test_one_rank_writes_and_the_checkpoint_verifies(two: Any, folder: Path) -> None:
    import grace_plugin

    assert two[0]["verification"]["verified"]
    assert two[1]["verification"] == two[0]["verification"]
    trained = folder / "two" / "trained"
    assert grace_plugin.verify(trained)["layers_with_other_codes"] == 0
    assert not trained.with_name(".trained.partial").exists()
    assert (trained.with_name("trained.run") / "checkpoint-2" / "grace_state.json").is_file()


def test_two_ranks__resumed__same_bits(two: Any, folder: Path) -> None:
    """The state of each rank is in the resume state's manifest; on the CPU, torch.load did not know a rank's device."""
    left, right = (folder / "two" / name / "model.safetensors" for name in ("trained", "resumed"))
    assert left.read_bytes() == right.read_bytes()
    state = folder / "two" / "trained.run" / "checkpoint-1"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(json.loads((state / "manifest.json").read_text())["files"])
    assert [damage(one) for one in states(folder / "two" / "resumed.run")] == [""]
