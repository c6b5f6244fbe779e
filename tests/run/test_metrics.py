"""A run's log on disk: what Trainer logged, line by line, and what a resumed run keeps of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from grace_plugin.run.metrics import METRICS, MetricsFile
from tests.conftest import Finished
from tests.pairs import Pair, run


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_metrics_file__finished_run__is_trainers_log(finished: Finished) -> None:
    folder = finished.folder.with_name(f"{finished.folder.name}.run")
    assert entries(folder) == finished.result.history
    assert [entry["step"] for entry in entries(folder) if "loss_ce" in entry] == list(range(1, 9))


@pytest.mark.slow
def test_metrics_file__resumed_run__later_lines_dropped(llava: Pair, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    run(llava, tmp_path / "a", **options)
    folder = tmp_path / "b.run"
    folder.mkdir()
    (folder / METRICS).write_text('{"step": 1}\n{"step": 9, "beyond": true}\n')
    resumed = run(llava, tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a.run/checkpoint-1"), **options)
    assert entries(folder) == resumed.history
    assert [entry["step"] for entry in entries(folder) if "loss_ce" in entry] == [1, 2]


def test_metrics_file__value_not_finite__null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "new")
    file.begin([{"step": 1, "loss": math.nan}])
    file.append({"step": 2, "loss": math.inf, "ok": 0.5})
    assert entries(tmp_path / "new") == [{"step": 1, "loss": None}, {"step": 2, "loss": None, "ok": 0.5}]
