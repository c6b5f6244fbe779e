"""A mixture of experts: each expert is quantized by itself, stored by itself, and proved as every other layer."""

from __future__ import annotations

from pathlib import Path

import pytest

import grace_plugin
from tests.pairs import pair, run


@pytest.mark.slow
def test_run__mixture_of_experts__stored_one_by_one_and_verified(tmp_path: Path) -> None:
    done = run(pair("qwen3_vl_moe", tmp_path), tmp_path / "out")
    found = grace_plugin.verify(done.checkpoint)
    assert found["verified"] and found["logits_equal"]
    assert found["layers_with_other_codes"] == found["layers_with_other_scales"] == 0
    assert (
        found["layers"] == found["layers_stored"] == 3 * (4 + 4 * 3)
    )  # per layer: attention, four experts of three linears
    assert not found["processor_files_changed"]
