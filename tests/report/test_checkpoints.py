"""Checkpoints that cannot be compared are refused before any weights are read, with how to fix it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grace_plugin.report import compare_checkpoints
from grace_plugin.report.checkpoints import read_pair
from tests.pairs import Pair
from tests.tiny import build, make_samples, save


def bare(folder: Path, source: Path) -> Path:
    """A checkpoint without weights: reading them would fail."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def places(llava: Pair, int4: Path, tmp_path: Path) -> dict[str, str]:
    """Checkpoints without their weights, by name."""
    found = {"student": llava.student, "int4": int4, "teacher": llava.teacher}
    made = {name: str(bare(tmp_path / name, source)) for name, source in found.items()}
    save(*build("llava", words="other"), tmp_path / "other_words")
    config = json.loads((int4 / "config.json").read_text())
    config["quantization_config"]["format"] = "float-quantized"
    floats = bare(tmp_path / "floats", int4)
    (floats / "config.json").write_text(json.dumps(config))
    alien = bare(tmp_path / "alien", llava.student)
    (alien / "config.json").write_text(json.dumps({"model_type": "bert"}))
    words = bare(tmp_path / "words", int4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "other_words" / name, words / name)
    silent = bare(tmp_path / "silent", int4)
    for file in (*silent.glob("*token*"), *silent.glob("*processor*")):
        file.unlink()
    return made | {p.name: str(p) for p in (floats, alien, words, silent)} | {"none": str(tmp_path / "none")}


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        ("none", "int4", r"cannot read checkpoint A at '.*none'.* Give the folder of a checkpoint"),
        ("student", "none", r"cannot read checkpoint B at '.*none'"),
        (
            "student",
            "teacher",
            r"different architectures \(A / B\): hidden_size: 256 / 512; .*num_hidden_layers: 3 / 4",
        ),
        ("student", "student", r"checkpoint B at .* has no quantized layers.*\. Give the BF16 model first"),
        ("int4", "student", r"has no quantized layers.*A has them, so give the two the other way round"),
        ("student", "floats", r"checkpoint B at .* is stored as 'float-quantized'; the report reads .*pack-quantized"),
        ("alien", "int4", r"model family 'bert' .* is not known to grace_plugin"),
        ("student", "words", r"the tokenizers of A at .* and B at .*words' differ"),
        ("student", "silent", r"cannot read the processor of checkpoint B at .*silent'"),
    ],
)
def test_read_pair__not_comparable__refused(places: dict[str, str], a: str, b: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compare_checkpoints(places[a], places[b], make_samples(2))


def test_read_pair__no_weights__read_and_harmless_differences_noted(places: dict[str, str]) -> None:
    pair = read_pair(places["student"], places["int4"])
    assert pair.family.model_type == "llava"
    assert pair.notes == []
    settings = Path(places["int4"]) / "processor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_additional_image_tokens": 0}))
    (note,) = read_pair(places["student"], places["int4"]).notes
    assert "num_additional_image_tokens (1 / 0)" in note


def changed(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    row = make_samples(1)[0]
    edit(row)
    return row


def test_compare__no_usable_sample_or_bad_argument__refused(places: dict[str, str], tmp_path: Path) -> None:
    broken = [changed(lambda r: r.update(images=["none.png"])), changed(lambda r: r["messages"].pop())]
    with pytest.raises(
        ValueError, match=r"none of the 2 samples can be used \(1 missing_file, 1 roles_out_of_order\).*data check"
    ):
        compare_checkpoints(places["student"], places["int4"], broken, output_dir=tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="limit is a number of samples, at least 1, got 0"):
        compare_checkpoints(places["student"], places["int4"], make_samples(1), limit=0)
    with pytest.raises(ValueError, match=r"no dataset file at none\.jsonl"):
        compare_checkpoints(places["student"], places["int4"], "none.jsonl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("x")
    with pytest.raises(FileExistsError, match="full exists and is not empty"):
        compare_checkpoints(places["student"], places["int4"], make_samples(1), output_dir=tmp_path / "full")


def test_compare__some_samples_not_usable__left_out_and_counted(llava: Pair, int4: Path) -> None:
    mixed = [changed(lambda r: r.update(images=["none.png"])), *make_samples(2, seed=4)]
    found = compare_checkpoints(llava.student, int4, mixed)
    assert found["samples"] == {"given": 3, "drawn": 3, "used": 2, "rejected": {"missing_file": 1}}
