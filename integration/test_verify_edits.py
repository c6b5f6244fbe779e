"""Sixty edited bytes and twenty edited fields of a checkpoint, on two thread counts: `verify` finds all of them."""

from __future__ import annotations

from pathlib import Path

from integration.verify_edits import edit_all
from tests.pairs import pair, run


def test_verify__bytes_and_fields_edited__all_found(tmp_path: Path) -> None:
    folder = run(pair("qwen3_vl", tmp_path), tmp_path / "out").checkpoint
    for threads in (1, 3):
        found = edit_all(folder, byte_count=60, field_count=20, threads=threads)
        assert (found["bytes_found"], found["fields_found"], found["passed"]) == (60, 20, [])
        assert found["untouched_verifies"]
