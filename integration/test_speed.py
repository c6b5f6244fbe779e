"""The benchmarks of speed and of full size in their small forms on a CPU: errors are small, a checkpoint verifies."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

from benchmarks.speed.plot import chart

ROOT = Path(__file__).parents[1]


def test_the_small_form(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--small", "--parts", "head", "linear", "relation"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    title = found["head"]["title"]
    if found["device"] == "cpu":
        assert all(error < 2e-6 for error in title["error_ours"].values()), title["error_ours"]
    assert found["relation"] and found["environment"]["torch"]
    drawn = xml.etree.ElementTree.fromstring(chart(found))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) > 10


def test_a_whole_train_at_an_eighth_of_full_size(tmp_path: Path) -> None:
    out = tmp_path / "full.json"
    asked = [
        "--teacher",
        "cached",
        "--method",
        "lora",
        "--steps",
        "1",
        "--batch",
        "2",
        "--shrink",
        "8",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.full_size", *asked], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert list(found["parts"]) == ["pair", "cache", "train", "verify"]
    assert found["verified_again"] and found["verification"]["codes"] == 2949120
    assert found["verification"]["codes_differing"] == 0 and len(found["losses"]) == 1
