"""How a command ends: one sentence and a status for expected errors, the traceback for a bug."""

from __future__ import annotations

import errno
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from grace_plugin import VerificationError
from grace_plugin.cli import commands
from grace_plugin.cli.register_grace import COMMANDS, TEACHER_COMMANDS
from tests.pairs import recipe_text


class Ending:
    """A path whose use ends in an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __fspath__(self) -> str:
        raise self.error


def ended(error: BaseException) -> int:
    return commands.run("verify", Namespace(checkpoint=Ending(error), source=None))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("no such thing"), 2, "grace verify: no such thing"),
        (ValueError(), 2, "grace verify: ValueError"),
        (FileExistsError("out exists"), 2, "grace verify: out exists"),
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.json"),
            2,
            "grace verify: No such file or directory: a",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a.json"),
            2,
            "grace verify: Permission denied: a.json",
        ),
        (IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "a"), 2, "grace verify: Is a directory: a"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "grace verify: 'utf-8' codec can't"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"),
            1,
            "grace verify failed: No space left on device: x; free",
        ),
        (
            OSError(errno.EIO, os.strerror(errno.EIO), "a", None, "b"),
            1,
            "grace verify failed: Input/output error: a: b",
        ),
        (BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), 1, "grace verify failed: Broken pipe"),
        (SafetensorError("header too short"), 2, "grace verify: a weights file cannot be read (header too"),
        (VerificationError("codes differ"), 1, "grace verify failed: codes differ"),
        (FloatingPointError("loss is nan"), 1, "grace verify failed: loss is nan"),
        (RuntimeError("CUDA out of memory"), 1, "grace verify failed: CUDA out of memory"),
        (MemoryError(), 1, "grace verify failed: the machine's memory does not hold this"),
        (ValueError("x" * 50_000), 2, "... (50,000 characters)"),
        (ValueError("[/x] in [bold]a path[/bold]"), 2, "grace verify: [/x] in [bold]a path[/bold]"),
        (KeyboardInterrupt(), 130, "grace verify: interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_run__expected_error__one_sentence_and_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
) -> None:
    assert ended(error) == status
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed
    assert printed.count("\n") == 1 and len(printed) < 4100


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("no"), AttributeError("x"), RecursionError(), NotImplementedError()]
)
def test_run__unexpected_error__traceback_and_how_to_report(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert ended(error) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed and "in __fspath__" in printed
    assert printed.endswith(
        f"grace verify: {type(error).__name__} is not expected here and a bug of grace_plugin; please report it with the "
        "lines above and the command\n"
    )


@pytest.mark.parametrize("command", ["train", "oneshot", "teacher cache"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty; write grace_stage"),
        (b"a: [1\n", "no YAML: line "),
        (b"\xff\xfe\x00", "no UTF-8 text"),
        (b"grace_stage: {grace_modifiers: {}}", "the recipe holds 0 GraceModifier(s)"),
        (recipe_text("t", distill={"beta": "a lot"}).encode(), "distill.beta must be a number, got 'a lot'"),
        (recipe_text("t", targets=["re:("]).encode(), "targets must hold regular expressions"),
        (None, "no recipe at "),
    ],
    ids=["empty", "broken", "binary", "without", "value", "pattern", "missing"],
)
def test_run__unusable_recipe__one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: bytes | None, said: str
) -> None:
    recipe, data = tmp_path / "[x].yaml", tmp_path / "samples.jsonl"
    data.write_text("{}\n")
    if content is not None:
        recipe.write_bytes(content)
    parser = ArgumentParser()
    {name: arguments for name, _, arguments in (*COMMANDS, *TEACHER_COMMANDS)}[command.split()[-1]](parser)
    given = [str(recipe), "--model", "no/student", "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    assert commands.run(command, parser.parse_args(given)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"grace {command}: ") and said in printed
    assert str(recipe) in printed or content == b"grace_stage: {grace_modifiers: {}}"
    assert "Traceback" not in printed and printed.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"[x].yaml", "samples.jsonl"}
