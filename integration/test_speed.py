"""The benchmark of speed in its small form on a CPU: rooms run, the head's errors are float32's, the picture is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

from benchmarks.speed.plot import picture

ROOT = Path(__file__).parents[1]


def test_the_small_form(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--small", "--rooms", "head", "linear", "relation"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    title = found["head"]["title"]
    if found["device"] == "cpu":
        assert all(error < 2e-6 for error in title["error_ours"].values()), title["error_ours"]
    assert found["relation"] and found["environment"]["torch"]
    drawn = xml.etree.ElementTree.fromstring(picture(found))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) > 10
