"""The same data order after a resume and for one and two processes, by hashes of the samples that real runs read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grace_plugin.data import epoch_order
from integration.order_worker import ROWS, STEPS, Stream, order, streamed
from tests.pairs import Pair, pair

ROOT = Path(__file__).parents[1]
A_STEP, BATCH = 4, 2


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair("llava", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Samples of an uninterrupted run of one process."""
    return order(llava, tmp_path_factory.mktemp("alone") / "out")[: STEPS * A_STEP]


def digest(read: list[int]) -> str:
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def test_the_order_is_that_of_seed_and_epoch(alone: list[int]) -> None:
    assert sorted(alone[:ROWS]) == list(range(ROWS))
    assert len(alone) == STEPS * A_STEP
    assert alone[:ROWS] != alone[ROWS:] + alone[: 2 * ROWS - len(alone)]
    plain = [int(sample) for sample in epoch_order(ROWS, 11, 0)]
    assert sorted(plain) == sorted(alone[:ROWS])  # the run's own order is grouped by length


def test_a_resumed_run_reads_what_was_left(llava: Pair, alone: list[int], tmp_path: Path) -> None:
    before = order(llava, tmp_path / "out", stop=4)[: 3 * A_STEP]
    after = order(llava, tmp_path / "out", resume_from_checkpoint=True)[: 3 * A_STEP]
    assert digest(before + after) == digest(alone)


def torchrun(llava: Pair, out: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Two processes of the worker; one that waits for the other for ever is killed and fails the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, "-m", "integration.order_worker", str(llava.student.parent), str(out), *what],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def of_ranks(done: subprocess.CompletedProcess[str], out: Path) -> list[Any]:
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_read_the_same_samples_step_by_step(llava: Pair, alone: list[int], tmp_path: Path) -> None:
    ranks = [read[: STEPS * BATCH] for read in of_ranks(torchrun(llava, tmp_path), tmp_path)]
    assert set(ranks[0][: ROWS // 2]).isdisjoint(ranks[1][: ROWS // 2])
    together = [
        sample for start in range(0, STEPS * BATCH, BATCH) for rank in ranks for sample in rank[start : start + BATCH]
    ]  # fmt: skip
    assert digest(together) == digest(alone)


@pytest.fixture(scope="module")
def two(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two processes on a stream of ten samples, and on the same with three broken ones, all of them the second process's."""
    out = tmp_path_factory.mktemp("streams")
    return of_ranks(torchrun(llava, out, "stream"), out)


def together(two: list[dict[str, Any]], name: str) -> list[list[int]]:
    """Samples of each step, of both processes; they made as many."""
    left, right = (rank[name]["steps"] for rank in two)
    assert len(left) == len(right) == STEPS
    return [sorted(mine + theirs) for mine, theirs in zip(left, right, strict=True)]


def test_a_stream_has_the_same_samples_in_each_step_for_one_and_two_processes(
    llava: Pair, two: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Ten samples, four a step: each third step is short, and the process without samples must add nothing to it."""
    one = streamed(llava, tmp_path / "out", Stream(()))
    steps = [sorted(step) for step in one["steps"]]
    assert digest(steps) == digest([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2)
    assert digest(together(two, "whole")) == digest(steps)
    for rank in two:
        assert rank["whole"]["counts"] == one["counts"]
        for mine, theirs in zip(rank["whole"]["losses"], one["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)  # steps before have been rounded apart
        assert rank["whole"]["losses"][0] == pytest.approx(one["losses"][0], rel=2e-6)
        assert rank["whole"]["verified"]


def test_ranks_that_drop_different_samples_see_every_usable_sample_once_an_epoch(two: list[dict[str, Any]]) -> None:
    steps = together(two, "broken")
    usable = [0, 1, 2, 4, 6, 8, 9]
    assert (
        sorted(sample for step in steps[:3] for sample in step) == usable
    )  # rank 0 has five samples an epoch, rank 1 two
    assert digest(steps[:3]) == digest(steps[3:])
    assert [rank["broken"]["steps"][2] for rank in two] == [[8], []]
    reports = [rank["broken"]["report"] for rank in two]
    assert reports[0] == reports[1]
    assert reports[0]["rejected"] == {"roles_out_of_order": 6}
    assert reports[0]["samples"] == 20


def test_a_resumed_stream_goes_on_where_it_stopped_also_in_a_later_epoch(llava: Pair, tmp_path: Path) -> None:
    """Two steps an epoch: the third is in the middle of the second, the fourth at its end."""
    whole = streamed(llava, tmp_path / "whole", Stream())["steps"]
    assert len(whole) == STEPS
    for saved in (3, 4):
        out, options = tmp_path / str(saved), {"save_steps": saved}
        before = streamed(llava, out, Stream(), stop=saved + 1, **options)["steps"][:saved]
        after = streamed(llava, out, Stream(), resume_from_checkpoint=True, **options)["steps"]
        assert digest(before + after) == digest(whole)


def test_a_rank_that_cannot_read_on_ends_the_run_of_both(llava: Pair, tmp_path: Path) -> None:
    done = torchrun(llava, tmp_path, "torn")
    assert done.returncode != 0
    assert "OSError: the wire was cut" in done.stderr or "rank 1 could not read its samples" in done.stderr
    assert not (tmp_path / "torn").exists()
