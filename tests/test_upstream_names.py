"""`grace_plugin/upstream.py` is the one file that imports upstream packages, and says what to do when a name has moved."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import grace_plugin
from grace_plugin.upstream import TESTED
from integration.test_upstream_attributes import ATTRIBUTES

PACKAGE = Path(grace_plugin.__file__).parent


def attributes(path: Path) -> set[str]:
    """Return `Name.attr` for every attribute that a file reads of a name imported from `grace_plugin.upstream`."""
    tree = ast.parse(path.read_text())
    names = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "grace_plugin.upstream"
        for alias in node.names
    }
    return {
        f"{names[node.value.id]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    }


def missing(used: set[str]) -> set[str]:
    listed = {path.partition(":")[2] for path in ATTRIBUTES}
    return {name for name in used if not any(f"{path}.".startswith(f"{name}.") for path in listed)}


def test_attributes__read_in_the_package__listed_with_a_reason(tmp_path: Path) -> None:
    used = {name for path in PACKAGE.rglob("*.py") for name in attributes(path)}
    assert {"CalibrationPipeline.register_value", "QuantizationStrategy.CHANNEL"} <= used
    assert missing(used) == set()
    (tmp_path / "new.py").write_text(
        "from grace_plugin.upstream import State as S, Recipe\nS.model\nS.optimizer\nRecipe.yaml"
    )
    assert missing(attributes(tmp_path / "new.py")) == {"State.optimizer", "Recipe.yaml"}


@pytest.mark.parametrize(
    "name", ["resolved_config", "_resolved_config", "resolved_targets", "finalized_", "initialized_", "lifecycle"]
)
def test_attributes__read_of_instances__listed_with_a_reason(name: str) -> None:
    assert any(f".{name}" in path.read_text() for path in PACKAGE.rglob("*.py"))
    assert [path for path in ATTRIBUTES if path.endswith(f".{name}")]


def test_import__upstream_name_is_gone__error_names_it_and_the_versions() -> None:
    script = "import llmcompressor.core\ndel llmcompressor.core.create_session\nimport grace_plugin"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("ImportError: upstream has moved a name (cannot import name 'create_session'")
    assert f"llmcompressor {TESTED['llmcompressor']} tested, {version('llmcompressor')} installed" in said
    assert said.endswith("Install the tested versions")


def test_tested_versions__installed__are_those_named() -> None:
    assert {name: version(name) for name in TESTED} == TESTED


def test_imports__of_upstream_packages__in_one_file() -> None:
    """Import lines of the package; `oneshot` is called where a user would."""
    pattern = re.compile(r"^\s*(?:from|import)\s+(llmcompressor|compressed_tensors)\b.*$", re.MULTILINE)
    offenders = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())}
    assert offenders <= {"upstream.py", "run/pipeline.py"}
