"""Destinations are tried before the first step: any that can be written works, others are refused in one sentence."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grace_plugin.export.stage import check_space, locate, rehearse

LONG = "n" * 249


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system at a name; skipped where that is not permitted."""
    done: list[Path] = []

    def mount(name: str, options: str = "size=64m") -> Path:
        place = tmp_path / name
        place.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"mounting is not permitted here: {made.stderr.strip()}")
        done.append(place)
        return place

    yield mount
    for place in done:
        subprocess.run(["umount", str(place)], check=True)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def publish(output_dir: Path) -> list[str]:
    """What a save does: stage three files, let them appear; returns the order in which they came."""
    found = locate(output_dir)
    found.clear()
    found.stage.mkdir(parents=True)
    (found.stage / "grace").mkdir()
    for name in ("config.json", "grace/record.json", "weights"):
        (found.stage / name).write_text(name)
    found.publish()
    return everything(output_dir)


CHECKPOINT = ["config.json", "grace", "grace/record.json", "weights"]


@pytest.mark.parametrize("kind", ["new", "nested", "empty", "link", "link chain", "long", "relative"])
def test_rehearse__usable_destination__no_trace_and_then_filled(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    aim = {"nested": tmp_path / "a/b/c", "long": tmp_path / LONG, "relative": Path("out")}.get(kind, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    if kind == "empty":
        aim.mkdir()
    if kind.startswith("link"):
        (tmp_path / "elsewhere").mkdir()
        aim.symlink_to(tmp_path / "elsewhere")
    if kind == "link chain":
        aim = tmp_path / "first"
        aim.symlink_to(tmp_path / "out")
    before = everything(tmp_path)
    rehearse(aim, aim.with_name(aim.name + ".run"))
    assert everything(tmp_path) == before
    assert publish(aim) == CHECKPOINT
    assert not [name for name in everything(tmp_path) if "partial" in name]
    assert aim.is_symlink() == kind.startswith("link")


def test_publish__mount_point__filled_in_place(mounted: Callable[..., Path], tmp_path: Path) -> None:
    """No rename can replace it; the files are moved in, the record last."""
    aim = mounted("out")
    with pytest.raises(OSError, match="busy"):
        aim.rename(tmp_path / "other")
    rehearse(aim, tmp_path / "out.run")
    assert everything(tmp_path) == ["out"]
    assert publish(aim) == CHECKPOINT


def test_publish__move_fails__record_last_and_files_taken_back(tmp_path: Path) -> None:
    found = locate(tmp_path)
    (found.stage / "grace").mkdir(parents=True)
    (found.stage / "grace/record.json").write_text("{}")
    (found.stage / "weights").write_text("w")
    (tmp_path / "grace").mkdir()
    (tmp_path / "grace/mine").write_text("in the way")  # came during the run
    with pytest.raises(OSError, match="not empty"):
        found.publish()
    assert not (tmp_path / "weights").exists() and (tmp_path / "grace/mine").read_text() == "in the way"


def test_publish__stage_of_a_killed_run__replaced(tmp_path: Path) -> None:
    for aim in (tmp_path / "new", tmp_path / "empty"):
        if aim.name == "empty":
            aim.mkdir()
        left = locate(aim).stage
        left.mkdir()
        (left / "half a file").write_text("x")
        rehearse(aim)
        assert publish(aim) == CHECKPOINT


def full(path: Path) -> None:
    path.mkdir()
    (path / "notes").write_text("mine")


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def loop(path: Path) -> None:
    path.symlink_to(path)


def file_at_stage(path: Path) -> None:
    path.with_name(f".{path.name}.partial").write_text("mine")


def link_at_stage(path: Path) -> None:
    path.with_name(f".{path.name}.partial").symlink_to(path.parent)


def file_at_run(path: Path) -> None:
    path.with_name(f"{path.name}.run").write_text("mine")


@pytest.mark.parametrize(
    ("name", "prepare", "error", "message"),
    [
        ("out", full, FileExistsError, "out exists and is not empty; choose another output_dir or remove it"),
        ("out", lambda path: path.write_text("x"), FileExistsError, "out exists and is not empty"),
        ("out", dangling, ValueError, "out is a symbolic link to .*nowhere, which does not exist; create that folder"),
        ("out", loop, ValueError, "out is a symbolic link to .*out, which does not exist"),
        (
            "out",
            file_at_stage,
            ValueError,
            r"\.out\.partial has the name of the temporary folder of .* and is none; move it away",
        ),
        ("out", link_at_stage, ValueError, r"\.out\.partial has the name of the temporary folder"),
        ("out", file_at_run, ValueError, r"no checkpoint can be written to .*out: File exists"),
        ("parent/out", lambda path: path.parent.write_text("x"), ValueError, "Not a directory|File exists"),
        ("n" * 256, lambda path: None, ValueError, "has 256 bytes, more than a file system takes; use a shorter one"),
        ("n" * 253, lambda path: None, ValueError, "has 257 bytes, more than a file system takes"),
        ("ä" * 128, lambda path: None, ValueError, "has 256 bytes"),
    ],
)
def test_rehearse__unusable_destination__refused_and_untouched(
    tmp_path: Path, name: str, prepare: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    aim = tmp_path / name
    prepare(aim)
    before = everything(tmp_path)
    with pytest.raises(error, match=message) as caught:
        rehearse(aim, aim.with_name(aim.name[:253] + ".run"))
    assert everything(tmp_path) == before
    assert len(str(caught.value).splitlines()) == 1


def test_rehearse__empty_name__refused() -> None:
    with pytest.raises(ValueError, match="output_dir is empty"):
        rehearse("")


def test_rehearse__read_only_parent__refused(mounted: Callable[..., Path]) -> None:
    parent = mounted("parent", "ro,size=1m")
    with pytest.raises(ValueError, match=r"no checkpoint can be written to .*parent/out: Read-only file system"):
        rehearse(parent / "out")


def test_check_space__small_disk__refused_with_both_sizes(mounted: Callable[..., Path]) -> None:
    found = locate(mounted("disk", "size=32m") / "out")
    check_space(found, 2**20)
    with pytest.raises(
        ValueError, match=r"the checkpoint needs about 1\.02 GiB and .*disk has 0\.03 GiB free; free some"
    ):
        check_space(found, 2**30)


def test_rehearse__several_ranks__one_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others check names alone: two that try at once would be in each other's way."""
    (tmp_path / ".out.partial").write_text("mine")
    monkeypatch.setenv("RANK", "1")
    assert rehearse(tmp_path / "out").stage == tmp_path / ".out.partial"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="move it away"):
        rehearse(tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.partial"]
