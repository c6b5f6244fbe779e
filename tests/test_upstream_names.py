"""The border file: every name it exports stands in the contract, and a name that moved is named with its reason."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import grace_plugin
from grace_plugin import upstream
from grace_plugin.contract import TESTED

PACKAGE = Path(grace_plugin.__file__).parent


def test_every_exported_name_stands_in_the_contract() -> None:
    listed = {part for row in upstream.CONTRACT for part in re.split(r"[.:]", row.path)}
    renamed = {"upstream_oneshot": "oneshot"}
    exported = {renamed.get(name, name) for name in upstream.__all__}
    own = {"keep_processor_files", "log_pipeline_advice", "running_output_dir", "running_pipeline", "running_processor"}
    assert exported - {"CONTRACT", "Contract"} - own <= listed


def attributes(path: Path) -> set[str]:
    """`Name.attr` of every attribute that a file takes of a class or enum imported from the border."""
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
    """What no row of the contract names."""
    listed = {row.path.partition(":")[2] for row in upstream.CONTRACT}
    return {name for name in used if not any(f"{path}.".startswith(f"{name}.") for path in listed)}


def test_every_attribute_of_an_exported_name_stands_in_the_contract(tmp_path: Path) -> None:
    used = {name for path in PACKAGE.rglob("*.py") for name in attributes(path)}
    assert {"CalibrationPipeline.register_value", "QuantizationStrategy.CHANNEL"} <= used
    assert missing(used) == set()
    (tmp_path / "new.py").write_text(
        "from grace_plugin.upstream import State as S, Recipe\nS.model\nS.optimizer\nRecipe.yaml('x')\n"
    )
    assert missing(attributes(tmp_path / "new.py")) == {"State.optimizer", "Recipe.yaml"}


MIXED_IN = ("resolved_config", "_resolved_config", "resolved_targets", "finalized_", "initialized_", "lifecycle")


@pytest.mark.parametrize("name", MIXED_IN)
def test_what_is_taken_of_instances_stands_in_the_contract(name: str) -> None:
    """Attributes that the package reads of upstream's objects rather than of their classes."""
    assert any(f".{name}" in path.read_text() for path in PACKAGE.rglob("*.py"))
    (row,) = [row for row in upstream.CONTRACT if row.path.endswith(f".{name}")]
    assert row.resolve() is not None


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("llmcompressor.core", "create_session", "train() runs in a session of its own"),
        ("compressed_tensors.utils", "match_named_modules", "targets and ignore are matched by upstream's rules"),
    ],
)
def test_importing_the_package_without_an_upstream_name_says_which(module: str, name: str, reason: str) -> None:
    done = python(f"import llmcompressor, {module}\ndel {module}.{name}\nimport grace_plugin")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(f"ImportError: upstream no longer offers {module}:{name} (known since ")
    assert f"we need it because {reason}" in said
    assert f"llmcompressor {TESTED['llmcompressor']} tested, " in said
    assert said.endswith("Install the tested versions, or a grace-plugin made for yours")


def test_the_contracts_tests_give_their_verdicts_without_an_upstream_name() -> None:
    done = python(
        "import pytest, llmcompressor.core\ndel llmcompressor.core.create_session\n"
        "raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', '--no-header', 'integration/test_contract.py']))"
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert f"1 failed, {len(upstream.CONTRACT) - 1} passed" in done.stdout
    assert "upstream no longer offers llmcompressor.core:create_session" in done.stdout


def test_the_versions_named_are_those_that_are_tested() -> None:
    assert {name: version(name) for name in TESTED} == TESTED


def test_rows_are_unique_and_say_why() -> None:
    paths = [row.path for row in upstream.CONTRACT]
    assert len(paths) == len(set(paths))
    assert all(row.reason and re.fullmatch(r"[a-z-]+ \d+(\.\d+)+", row.floor) for row in upstream.CONTRACT)


@pytest.mark.parametrize(
    "path", ["llmcompressor.core:no_such_name", "no_such_package:name", "llmcompressor.core:State.gone"]
)
def test_a_moved_name_fails_with_its_reason(path: str) -> None:
    row = upstream.Contract(path, "llmcompressor 0.14.0", "recipes are read with it")
    with pytest.raises(ImportError, match=rf"no longer offers {path} .*because recipes are read with it"):
        row.resolve()


def test_a_name_that_is_there_is_returned() -> None:
    assert upstream.Contract("llmcompressor.core:State", "x", "y").resolve() is upstream.State


def test_only_the_border_imports_the_upstream_packages() -> None:
    """Import lines of the package; `oneshot` is called where a user would."""
    pattern = re.compile(r"^\s*(?:from|import)\s+(llmcompressor|compressed_tensors)\b.*$", re.MULTILINE)
    offenders = {
        str(path.relative_to(PACKAGE)): pattern.findall(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.name != "upstream.py" and pattern.search(path.read_text())
    }
    assert set(offenders) <= {"run/pipeline.py"}, offenders
