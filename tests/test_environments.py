"""Test the environment builder: its progress, its errors, and the floors of the dependencies."""

from __future__ import annotations

import runpy
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

BUILD = runpy.run_path(str(Path(__file__).parents[1] / "integration/env/build.py"))

PIP = """
import sys, time
def say(line):
    print(line, flush=True)
say("Looking in indexes: https://name:secret@index.example/simple")
say("Collecting torch==2.13.0 (from -r train.txt (line 3))")
say("  Downloading https://index.example/torch-2.13.0.whl (190.2 MB)")
time.sleep(1.0)
say("Installing collected packages: torch, numpy")
time.sleep(1.0)
if len(sys.argv) > 1:
    say("WARNING: you should upgrade")
    say("ERROR: no space left")
    sys.exit(1)
"""


def script(folder: Path) -> str:
    (folder / "pip.py").write_text(PIP)
    return str(folder / "pip.py")


def test_run__long_step__prints_progress_every_few_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert BUILD["BEAT"] <= 5.0
    started = time.monotonic()
    BUILD["run"]("installing the packages", [sys.executable, script(tmp_path)], beat=0.3)
    took = time.monotonic() - started
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "  installing the packages" and 4 <= len(said) <= took / 0.3 + 2
    assert any(line.endswith(" s, collecting torch") for line in said)
    assert said[-1].endswith(" s, installing collected packages")
    assert not any("example" in line or "http" in line for line in said)


def test_run__failing_step__error_with_the_end_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(BUILD["StepError"]) as failed:
        BUILD["run"]("installing", [sys.executable, script(tmp_path), "fail"], "try another index", beat=5.0)
    lines = str(failed.value).splitlines()
    assert lines[0].startswith("installing failed (") and lines[-1] == "try another index"
    assert "ERROR: no space left" in lines
    assert not any(word in str(failed.value) for word in ("WARNING", "index.example", "Looking in"))


def test_byte_compile__pythondontwritebytecode__compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for name, text in (
        ("package/good.py", "one = 1"),
        ("package/template.py", "{{ no python }}"),
        ("package/tests/t.py", ""),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    BUILD["byte_compile"](Path(sys.executable), str(tmp_path))
    assert [path.name.partition(".")[0] for path in tmp_path.rglob("*.pyc")] == ["good"]


def test_floors__pyproject__lower_bounds() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    held = dict(line.split("==") for line in BUILD["at_the_floors"](project).split())
    needed = [Requirement(line) for line in tomllib.loads(project)["project"]["dependencies"]]
    assert held.keys() == {one.name for one in needed} - {"torch", "torchvision"}
    for one in needed:
        assert held.get(one.name) in (None, *(part.version for part in one.specifier if part.operator == ">="))
