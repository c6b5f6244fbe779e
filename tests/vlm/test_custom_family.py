"""A family registered from outside the package: `examples/custom_family.py` through the contract, and as a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import grace_plugin
from grace_plugin.vlm import FAMILIES, family_of
from grace_plugin.vlm.registry import ENTRY_POINTS, _load_installed_families
from tests.pairs import pair
from tests.tiny import build, make_samples
from tests.vlm.contract import FamilyContract

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "custom_family.py"


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The family of the example, for the tests of this file."""
    from examples.custom_family import DeepseekVL

    FAMILIES[DeepseekVL.model_type] = DeepseekVL()
    yield
    del FAMILIES[DeepseekVL.model_type]


@pytest.mark.parametrize("name", ["deepseek_vl"])
class TestCustomFamily(FamilyContract):
    pass


def test_example__tiny_pair__trained_and_verified(tmp_path: Path) -> None:
    made = pair("deepseek_vl", tmp_path)
    data = _written(tmp_path)
    options = {"model": made.student, "teacher": made.teacher, "dataset": data, "output_dir": tmp_path / "out"}
    command = [sys.executable, str(SCRIPT), "--max_steps", "2"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"wrote and verified {tmp_path / 'out'}" in done.stdout
    verified = grace_plugin.verify(tmp_path / "out")
    assert verified["verified"] and verified["logits_equal"]


def _written(folder: Path) -> Path:
    """Samples as JSON lines with image files."""
    lines = []
    for number, sample in enumerate(make_samples(8)):
        sample["images"][0].save(folder / f"{number}.png")
        lines.append(json.dumps({**sample, "images": [f"{number}.png"]}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def test_family_of__installed_entry_point__loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build("llava")
    model.config.model_type = "llava_of_a_package"
    with pytest.raises(ValueError, match="'llava_of_a_package'"):
        family_of(model)
    (tmp_path / "families_of_mine.py").write_text(
        "from grace_plugin.vlm import register_family\n"
        "from grace_plugin.vlm.llava import Llava\n\n\n"
        "@register_family\n"
        "class Mine(Llava):\n"
        '    model_type = "llava_of_a_package"\n'
    )
    installed = tmp_path / "families_of_mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: families-of-mine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nmine = families_of_mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    _load_installed_families.cache_clear()
    try:
        assert type(family_of(model)).__name__ == "Mine" and family_of(model.config) is family_of(model)
    finally:
        FAMILIES.pop("llava_of_a_package", None)
