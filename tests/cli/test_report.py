"""`grace report` as a user runs it: two checkpoints, a finished training, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_commands import in_process, written
from tests.conftest import Finished
from tests.pairs import Pair


def test_report__two_checkpoints__page_and_summary(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # a terminal wide enough for a layer's name in one line
    _, data = written(finished.pair, tmp_path)
    arguments = ["--dataset", str(data), "--output_dir", str(tmp_path / "r"), "--limit", "3", "--worst", "1"]
    assert (
        in_process(monkeypatch, "report", "--compare", str(finished.pair.student), str(finished.folder), *arguments)
        == 0
    )
    printed = capsys.readouterr().out
    assert "3 of 4 samples" in printed and "KL(A || B)" in printed and f"{tmp_path / 'r'}/page.html" in printed
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["layers"][0]["name"] in printed
    assert len(report["worst"]) == 1 and report["samples"]["drawn"] == 3


def test_report__finished_training__page_once(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, "report", str(finished.folder), "--output_dir", str(tmp_path / "r")) == 0
    assert json.loads((tmp_path / "r" / "report.json").read_text())["steps"] == 8
    assert in_process(monkeypatch, "report", str(finished.folder), "--output_dir", str(tmp_path / "r")) == 2
    assert "is not empty; choose another output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say what to report on: a training"),
        (["run", "--compare", "A", "B"], "say what to report on"),
        (["--compare", "{student}", "{student}"], "--compare A B needs samples to compare on: --dataset FILE"),
        (["--compare", "{student}", "{student}", "--dataset", "x.jsonl"], "has no quantized layers"),
        (["--compare", "{student}", "{teacher}", "--dataset", "x.jsonl"], "of different architectures"),
        (["--compare", "/no/where", "{student}", "--dataset", "x.jsonl"], "cannot read checkpoint A at '/no/where'"),
        (["nothing"], "no log of a training at 'nothing'"),
    ],
)
def test_report__bad_input__one_sentence_and_status_2(
    llava: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    bare = {}
    for role in ("student", "teacher"):  # without weights: reading them would fail
        source = getattr(llava, role)
        shutil.copytree(source, tmp_path / role, ignore=shutil.ignore_patterns("*.safetensors"))
        bare[role] = str(tmp_path / role)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert in_process(monkeypatch, "report", *(one.format(**bare) for one in arguments)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grace report:")]
    assert len(error) == 1 and sentence in error[0]
    assert not (tmp_path / "report").exists()
