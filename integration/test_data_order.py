"""The same data order after a resume and for one and two processes, by hashes of the rows that real runs read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grace_plugin.data import epoch_order
from integration.order_worker import ROWS, STEPS, order
from tests.pairs import Pair, pair

ROOT = Path(__file__).parents[1]
A_STEP, BATCH = 4, 2


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair("llava", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Rows of an uninterrupted run of one process."""
    return order(llava, tmp_path_factory.mktemp("alone") / "out")[: STEPS * A_STEP]


def digest(read: list[int]) -> str:
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def test_the_order_is_that_of_seed_and_epoch(alone: list[int]) -> None:
    assert sorted(alone[:ROWS]) == list(range(ROWS))
    assert len(alone) == STEPS * A_STEP
    assert alone[:ROWS] != alone[ROWS:] + alone[: 2 * ROWS - len(alone)]
    plain = [int(row) for row in epoch_order(ROWS, 11, 0)]
    assert sorted(plain) == sorted(alone[:ROWS])  # the run's own order is grouped by length


def test_a_resumed_run_reads_what_was_left(llava: Pair, alone: list[int], tmp_path: Path) -> None:
    before = order(llava, tmp_path / "out", stop=4)[: 3 * A_STEP]
    after = order(llava, tmp_path / "out", resume_from_checkpoint=True)[: 3 * A_STEP]
    assert digest(before + after) == digest(alone)


def test_two_processes_read_the_same_rows_step_by_step(llava: Pair, alone: list[int], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "-m", "integration.order_worker", str(llava.student.parent), str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text())[: STEPS * BATCH] for rank in (0, 1)]
    assert set(ranks[0][: ROWS // 2]).isdisjoint(ranks[1][: ROWS // 2])
    together = [
        row for start in range(0, STEPS * BATCH, BATCH) for rank in ranks for row in rank[start : start + BATCH]
    ]  # fmt: skip
    assert digest(together) == digest(alone)
