"""`grace teacher cache`: what it will take is said first, and bad input is one sentence and status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_commands import in_process, written
from tests.pairs import Pair


def options(pair: Pair, data: Path, out: Path, **other: str) -> list[str]:
    given = {"--model": str(pair.student), "--dataset": str(data), "--output_dir": str(out), "--workers": "0"} | other
    return [part for name, value in given.items() for part in (name, value)]


@pytest.mark.slow
def test_teacher_cache__damaged_file__dropped_and_completed(
    llava: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, data = written(llava, tmp_path)
    given = options(llava, data, tmp_path / "cache", **{"--batch_size": "1", "--shard_bytes": "60000"})
    (tmp_path / "more.jsonl").write_text("".join(line + "\n" for line in data.read_text().splitlines() * 2))
    assert in_process(monkeypatch, "teacher", "cache", str(recipe), *given) == 0
    printed = capsys.readouterr().out
    first, *_, last = printed.strip().splitlines()
    assert first.startswith("predicted size: ") and "for 4 samples" in first and "0 samples are there" in first
    assert last.startswith(f"teacher cache: {tmp_path / 'cache'}, 4 samples in ")
    assert last.endswith(f"train with teacher: {{kind: cached, cache: {tmp_path / 'cache'}}}")
    damaged = sorted((tmp_path / "cache").glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = options(llava, tmp_path / "more.jsonl", tmp_path / "cache")
    assert in_process(monkeypatch, "teacher", "cache", str(recipe), *again) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{damaged.name} is not what was written: dropped")
    assert "for 4 samples" in printed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--dataset": "none.jsonl"}, "no dataset file at none.jsonl"),
        ({"--model": "/no/where"}, "there is no folder '/no/where' for model"),
        ({"--teacher": "/no/teacher"}, "there is no folder '/no/teacher' for teacher"),
        ({"--batch_size": "0"}, "batch_size and shard_bytes are at least 1, got 0"),
        ({"--max_length": "12"}, "max_length is 12"),
    ],
)
def test_teacher_cache__bad_input__one_sentence_and_status_2(
    llava: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: dict[str, str], sentence: str,
) -> None:  # fmt: skip
    recipe, data = written(llava, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert (
        in_process(monkeypatch, "teacher", "cache", str(recipe), *options(llava, data, tmp_path / "c", **change)) == 2
    )
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grace teacher cache:")]
    assert len(error) == 1 and sentence in error[0]
    assert sorted(tmp_path.rglob("*")) == before
