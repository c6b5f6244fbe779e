"""The border file: every name it exports stands in the contract, and a name that moved is named with its reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import grace_plugin
from grace_plugin import upstream

PACKAGE = Path(grace_plugin.__file__).parent


def test_every_exported_name_stands_in_the_contract() -> None:
    listed = {part for row in upstream.CONTRACT for part in re.split(r"[.:]", row.path)}
    renamed = {"upstream_oneshot": "oneshot"}
    exported = {renamed.get(name, name) for name in upstream.__all__}
    assert exported - {"CONTRACT", "Contract", "keep_processor_files"} <= listed


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
    """Import lines of the package; `oneshot` is called where a user would, and the demo's baselines are upstream's own."""
    pattern = re.compile(r"^\s*(?:from|import)\s+(llmcompressor|compressed_tensors)\b.*$", re.MULTILINE)
    offenders = {
        str(path.relative_to(PACKAGE)): pattern.findall(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.name != "upstream.py" and pattern.search(path.read_text())
    }
    allowed = {"run/pipeline.py", *(str(p.relative_to(PACKAGE)) for p in (PACKAGE / "demo").glob("*.py"))}
    assert set(offenders) <= allowed, offenders
