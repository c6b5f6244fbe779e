"""Test what is published: bounds of the dependencies, contents and size of the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import grace_plugin

ROOT = Path(__file__).resolve().parents[1]
NEEDED = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
PINNED = dict(
    re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "integration/env/train.txt").read_text().lower(), re.MULTILINE)
)


@pytest.mark.parametrize("needed", NEEDED, ids=lambda needed: needed.name)
def test_dependency__bounds__around_the_tested_version(needed: Requirement) -> None:
    operators = {one.operator for one in needed.specifier}
    assert operators & {">=", "=="} and operators & {"<", "<=", "=="}
    assert PINNED[needed.name] in needed.specifier
    assert version(needed.name) in needed.specifier


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    (file,) = folder.glob("*.whl")
    return file


def test_wheel__contents__package_without_demo_under_1_5_mb(wheel: Path) -> None:
    assert wheel.stat().st_size < 1_500_000
    names = zipfile.ZipFile(wheel).namelist()
    assert "grace_plugin/py.typed" in names and "optimum/commands/register/register_grace.py" in names
    assert f"grace_plugin-{grace_plugin.__version__}.dist-info/METADATA" in names
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"grace_plugin", "optimum"}
    assert not [name for name in names if name.endswith((".safetensors", ".png"))]


def test_grace_demo__installed_wheel__one_sentence_that_names_the_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    script = "from optimum.commands.register.register_grace import main; main()"  # what the console script calls
    done = subprocess.run(
        [sys.executable, "-c", script, "demo"],
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("grace demo: the demo is not in the installed package") and "examples/bundled_demo" in line
