"""The package's dependencies have floors and caps, and the versions the tests run with lie between them."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NEEDED = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
PINNED = dict(
    re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "integration/env/train.txt").read_text().lower(), re.MULTILINE)
)


@pytest.mark.parametrize("needed", NEEDED, ids=lambda needed: needed.name)
def test_a_dependency_has_a_floor_and_a_cap_around_what_is_tested(needed: Requirement) -> None:
    operators = {one.operator for one in needed.specifier}
    assert operators & {">=", "=="} and operators & {"<", "<=", "=="}
    assert PINNED[needed.name] in needed.specifier
    assert version(needed.name) in needed.specifier
