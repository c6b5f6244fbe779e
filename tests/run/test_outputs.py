"""What a run writes in addition to its checkpoint may fail without ending it: terminal, pipe, metrics.jsonl, data report."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest

from grace_plugin.run.metrics import METRICS, MetricsFile
from grace_plugin.run.outputs import SideOutput, kept_streams
from tests.pairs import Pair, run

FULL = Path("/dev/full")  # every write to it finds a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def broken_pipe() -> io.TextIOWrapper:
    """A text stream into a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", encoding="utf-8")


def test_kept_streams__pipe_without_reader__said_once() -> None:
    said, pipe = io.StringIO(), broken_pipe()
    with redirect_stderr(said), redirect_stdout(pipe), kept_streams():
        for _ in range(3):
            print("x" * 100_000, flush=True)
        assert sys.stdout.isatty() is False  # the rest is a stream's
    assert said.getvalue() == "grace: nothing more can be printed (Broken pipe); the run goes on\n"
    with suppress(BrokenPipeError):  # what the lost stream may still hold
        pipe.close()


@needs_full
def test_kept_streams__full_disk__said_once() -> None:
    said = io.StringIO()
    with FULL.open("w", buffering=1) as full, redirect_stderr(said):
        with redirect_stdout(full), kept_streams():
            print("one\ntwo")
            print("three")
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert said.getvalue() == "grace: nothing more can be printed (No space left on device); the run goes on\n"


def test_kept_streams__letters_outside_the_encoding__escaped() -> None:
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, encoding="ascii", write_through=True)), kept_streams():
        print("f\u00fcr \U0001f600")
        sys.stdout.flush()
        assert raw.getvalue() == b"f\\xfcr \\U0001f600\n"


def test_kept_streams__nested__restored_and_wrapped_once() -> None:
    before = sys.stdout, sys.stderr
    with kept_streams():
        inner = sys.stdout
        with kept_streams():
            assert sys.stdout is inner
        assert sys.stdout is inner is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_side_output__first_failure__ends_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output, done = SideOutput("notes.txt"), []
    output.write(lambda: done.append(1))
    output.write(lambda: (tmp_path / "no" / "folder").write_text("x"))
    output.write(lambda: done.append(2))
    assert done == [1] and output.lost
    said = capsys.readouterr().err
    assert said == "grace: notes.txt cannot be written (No such file or directory); the run goes on without it\n"
    with pytest.raises(ZeroDivisionError):  # a fault of ours is no lost output
        SideOutput("x").write(lambda: 1 / 0)


@pytest.mark.slow
@needs_full
def test_metrics__full_disk__run_continues(llava: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out.run"
    folder.mkdir()
    for name in (METRICS, "data_report.json"):
        (folder / name).symlink_to(FULL)
    result = run(llava, tmp_path / "out", logging_steps=1)
    assert result.verification["verified"] and len(result.history) >= 2
    said = capsys.readouterr().err
    assert said.count(f"grace: {folder / METRICS} cannot be written (No space left on device); the run goes on") == 1
    assert said.count(f"grace: the report on the data in {folder} cannot be written (No space left on device)") == 1


def test_metrics_file__folder_removed__ends_at_the_first_failure(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "a")
    file.begin([{"step": 1}])
    file.append({"step": 2})
    assert [json.loads(line)["step"] for line in (tmp_path / "a" / METRICS).read_text().splitlines()] == [1, 2]
    (tmp_path / "a" / METRICS).unlink()
    (tmp_path / "a").rmdir()
    file.append({"step": 3})
    (tmp_path / "a").mkdir()
    file.append({"step": 4})
    assert not (tmp_path / "a" / METRICS).exists()


@pytest.mark.slow
def test_kept_streams__output_closed__exit_status_kept() -> None:
    """The interpreter's flush at its end would otherwise make it 120."""
    script = "import sys; from grace_plugin.run.outputs import kept_streams\nwith kept_streams(): print('x' * 99)\nsys.exit(3)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    os.close(write)
    assert done.returncode == 3
    assert done.stderr.count("nothing more can be printed") == 1 and "Exception ignored" not in done.stderr
