"""The short form of `python -m integration.faults`: some rows of each kind, none of them lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from integration.fault_kinds import KINDS

ROOT = Path(__file__).parents[1]


def test_faults__one_row_of_each_kind__nothing_lost(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "integration.faults", "--rows", "1", "--output", str(tmp_path / "table.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = json.loads((tmp_path / "table.json").read_text())
    assert (table["injected"], table["lost"]) == (len(KINDS), 0)
