"""Resume states on disk: damage is named, the newest whole one is taken, and an older one goes only after a newer is whole."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from grace_plugin.run import resume
from grace_plugin.run.states import choose_state
from tests.pairs import Pair, run

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "grace_state.json", "trainer_state.json")


def written(folder: Path, step: int) -> Path:
    """A published state of small files whose contents depend on the step."""
    partial = folder / f"checkpoint-{step}.partial"
    partial.mkdir(parents=True)
    for name in FILES:
        (partial / name).write_bytes(f"{name} of step {step:2} ".encode() * 50)
    final = folder / f"checkpoint-{step}"
    resume.publish(partial, final, step=step, max_steps=9, ended=False)
    return final


def flip(file: Path, place: int = 100) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def of_another_step(file: Path) -> None:
    file.write_bytes(f"{file.name} of step  4 ".encode() * 50)


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    *((name, flip, f"{name} is not what was written") for name in FILES),
    *((name, cut, f"{name} has ") for name in FILES),
    *((name, Path.unlink, f"{name} is missing") for name in FILES),
    ("optimizer.pt", empty, "optimizer.pt has 0 bytes"),
    ("optimizer.pt", of_another_step, "optimizer.pt is not what was written"),
    ("manifest.json", Path.unlink, "no manifest.json"),
    ("manifest.json", flip, "manifest.json is damaged"),
    ("manifest.json", cut, "manifest.json is damaged"),
    ("manifest.json", empty, "manifest.json is damaged"),
]


@pytest.mark.parametrize(("name", "harm", "said"), DAMAGES)
def test_damaged_state__named_and_the_older_whole_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: Callable[[Path], None], said: str
) -> None:
    older, newer = written(tmp_path, 5), written(tmp_path, 10)
    assert (resume.damage(older), resume.damage(newer)) == ("", "")
    harm(newer / name)
    assert resume.damage(newer).startswith(said)
    with caplog.at_level(logging.WARNING):
        assert choose_state(True, tmp_path) == older
    assert f"not used: checkpoint-10: {said}" in caplog.text
    with pytest.raises(
        ValueError, match=rf"cannot resume from .*checkpoint-10: {said}.*take another one \(checkpoint-5\)"
    ):
        choose_state(newer, tmp_path)


def test_manifest__every_value_is_proven(tmp_path: Path) -> None:
    state = written(tmp_path, 3)
    content = json.loads((state / "manifest.json").read_text())
    assert set(content["files"]) == set(FILES)
    (state / "manifest.json").write_text(json.dumps(content | {"step": 4}))
    assert resume.damage(state) == "manifest.json is damaged"


def test_no_whole_state__refused_with_what_each_lacks(tmp_path: Path) -> None:
    for step in (5, 10):
        (written(tmp_path, step) / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"no whole resume state \(checkpoint-10: no manifest.json.*checkpoint-5: no man"
    ):
        choose_state(True, tmp_path)
    with pytest.raises(ValueError, match="holds no resume state; remove the folder and start"):
        choose_state(True, tmp_path / "none")


def test_partial_folder__is_no_state(tmp_path: Path) -> None:
    state = written(tmp_path, 5)
    shutil.copytree(state, tmp_path / "checkpoint-10.partial")
    assert resume.states(tmp_path) == [state]
    resume.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [state]


def test_same_step_again__replaced_whole(tmp_path: Path) -> None:
    flip(written(tmp_path, 5) / "model.safetensors")
    state = written(tmp_path, 5)
    assert resume.damage(state) == "" and list(tmp_path.iterdir()) == [state]
    state.rename(tmp_path / "checkpoint-5.old")  # a process that stops between two renames leaves this
    assert choose_state(True, tmp_path) == tmp_path / "checkpoint-5.old"


def test_rotation__torn_states_do_not_count(tmp_path: Path) -> None:
    kept = [written(tmp_path, step) for step in (1, 2, 3, 4, 5)]
    (kept[3] / "manifest.json").unlink()
    resume.rotate(tmp_path, kept[4], 2)
    assert resume.states(tmp_path) == [kept[4], kept[2]]
    resume.rotate(tmp_path, kept[4], None)
    assert len(resume.states(tmp_path)) == 2


def test_rotation__best_state_is_kept(tmp_path: Path) -> None:
    kept = [written(tmp_path, step) for step in (1, 2, 3)]
    resume.rotate(tmp_path, kept[2], 2, str(kept[0]))
    assert resume.states(tmp_path) == [kept[2], kept[0]]


# ---- with a training ------------------------------------------------------------------------------------------------------

STEPS: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an uninterrupted run with a state of every step; never change it."""
    return run(llava, tmp_path_factory.mktemp("whole") / "out", **STEPS).checkpoint


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """Where a run would write, next to a copy of that run's states."""
    shutil.copytree(whole.with_name("out.run"), tmp_path / "out.run")
    return tmp_path / "out"


@pytest.mark.slow
def test_train__torn_newest_state__resumes_from_the_older_with_the_same_bits(
    llava: Pair, whole: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(copied.with_name("out.run") / "checkpoint-3")
    (copied.with_name("out.run") / "checkpoint-2" / "optimizer.pt").unlink()
    run(llava, copied, resume_from_checkpoint=True, **STEPS)
    assert "not used: checkpoint-2: optimizer.pt is missing" in caplog.text
    assert (copied / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [resume.damage(state) for state in resume.states(copied.with_name("out.run"))] == ["", "", ""]


def test_train__random_states__resumed_run_draws_the_numbers_of_the_uninterrupted_run(
    llava: Pair, tmp_path: Path
) -> None:
    """NEFTune draws noise in every forward pass, so other random states would give other weights."""
    options = STEPS | {"neftune_noise_alpha": 5.0}
    run(llava, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole.run" / "checkpoint-2", tmp_path / "resumed.run" / "checkpoint-2")
    run(llava, tmp_path / "resumed", resume_from_checkpoint=True, **options)
    states = [
        torch.load(tmp_path / f"{name}.run" / f"checkpoint-{step}" / "rng_state.pth", weights_only=False)
        for name, step in (("whole", 2), ("whole", 3), ("resumed", 3))
    ]
    assert torch.equal(states[1]["cpu"], states[2]["cpu"]) and not torch.equal(states[0]["cpu"], states[1]["cpu"])
    assert set(states[0]) >= {"python", "numpy", "cpu"}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


def test_train__save_only_model__refused(llava: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_only_model=True .* leaves out optimizer and schedule"):
        run(llava, tmp_path / "out", save_only_model=True, **STEPS)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a tmpfs of so many bytes; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int, *options: str) -> Path:
        asked = ",".join([f"size={size}", *options])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", asked, "none", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


@pytest.mark.slow
def test_train__disk_full_at_a_resume_state__older_state_kept_and_training_goes_on(
    llava: Pair, whole: Path, small_disk: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = whole.with_name("out.run") / "checkpoint-1"
    size = sum(file.stat().st_size for file in state.iterdir())
    disk = small_disk(size * 7 // 2)
    (tmp_path / "out.run").symlink_to(disk)

    class Fill(TrainerCallback):
        """Another program takes the space after the first state."""

        def on_save(self, *args: Any, **rest: Any) -> None:
            (disk / "other").write_bytes(bytes(size * 2))

    run(llava, tmp_path / "out", callbacks=[Fill()], **STEPS)
    said = [record.message for record in caplog.records if "no resume state was written" in record.message]
    assert len(said) == 2 and "at step 2" in said[0] and "checkpoint-1 is kept, and training goes on" in said[0]
    assert "MB are free; free " in said[0]
    assert (resume.damage(disk / "checkpoint-1"), resume.states(disk)) == ("", [disk / "checkpoint-1"])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_train__disk_full_before_the_first_state__first_state_takes_the_reserved_space(
    llava: Pair, whole: Path, small_disk: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = sum(file.stat().st_size for file in (whole.with_name("out.run") / "checkpoint-1").iterdir())
    disk = small_disk(size * 5)
    (tmp_path / "out.run").symlink_to(disk)

    class Fill(TrainerCallback):
        """Another program takes the whole disk before the first step, but what the run has reserved."""

        def on_train_begin(self, *args: Any, **rest: Any) -> None:
            assert (disk / "checkpoint.reserved").stat().st_size >= size
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free))

    run(llava, tmp_path / "out", callbacks=[Fill()], **STEPS)
    assert resume.states(disk) == [disk / "checkpoint-1"] and resume.damage(disk / "checkpoint-1") == ""
    assert "no resume state was written at step 2" in caplog.text
    assert "no resume state was written at step 1" not in caplog.text
    assert not (disk / "checkpoint.reserved").exists()


def test_train__ends_in_an_error__reserved_space_given_back(llava: Pair, tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_train_begin(self, args: Any, *rest: Any, **_: Any) -> None:
            assert (Path(args.output_dir) / "checkpoint.reserved").exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(llava, tmp_path / "out", callbacks=[Fail()])
    assert not (tmp_path / "out.run" / "checkpoint.reserved").exists()
    run(llava, tmp_path / "out")
    assert not (tmp_path / "out.run" / "checkpoint.reserved").exists()


@pytest.mark.slow
def test_train__states_will_not_fit__refused_before_the_first_step(
    llava: Pair, whole: Path, small_disk: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = sum(file.stat().st_size for file in (whole.with_name("out.run") / "checkpoint-1").iterdir())
    disk = small_disk(size * 9 // 5)
    (tmp_path / "out.run").symlink_to(disk)
    with pytest.raises(
        ValueError, match=r"do not fit into .*up to 3 at a time\): .* MB are free; free .*save_total_limit"
    ):
        run(llava, tmp_path / "out", **STEPS)
    assert list(disk.iterdir()) == []
    run(llava, tmp_path / "out", max_steps=3, save_minutes=0)
    assert "no resume states are written by the clock" in caplog.text and not resume.states(disk)


def test_train__checkpoint_will_not_fit_next_to_the_states__refused_before_the_first_step(
    llava: Pair, whole: Path, small_disk: Callable[..., Path]
) -> None:
    size = sum(file.stat().st_size for file in (whole.with_name("out.run") / "checkpoint-1").iterdir())
    checkpoint = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    disk = small_disk(3 * (size + 2**20) + checkpoint // 2)  # three states alone would fit
    with pytest.raises(ValueError, match=r"the resume states that save_strategy asks for do not fit"):
        run(llava, disk / "out", **STEPS)


@pytest.mark.slow
def test_train__disk_refuses_a_file_of_a_state__partial_removed_and_older_state_kept(
    llava: Pair, small_disk: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk without inodes says that bytes are free, so the write itself fails."""
    disk = small_disk(2**30, "nr_inodes=15")
    (tmp_path / "out.run").symlink_to(disk)
    run(llava, tmp_path / "out", **STEPS)
    said = [record.message for record in caplog.records if "no resume state was written" in record.message]
    assert len(said) == 2 and "the disk refused it (" in said[0] and "No space left on device" in said[0]
    assert (resume.damage(disk / "checkpoint-1"), list(disk.glob("checkpoint-*"))) == ("", [disk / "checkpoint-1"])


def test_disk_error__of_every_library__is_known(small_disk: Callable[..., Path]) -> None:
    from safetensors.torch import save_file

    file, much = small_disk(2**20) / "file", torch.zeros(2**19)
    for write in (
        lambda: save_file({"x": much}, file),
        lambda: torch.save(much, file),
        lambda: file.write_bytes(bytes(2**21)),
    ):
        with pytest.raises(Exception, match=r"No space left|unexpected pos|write failed") as raised:
            write()
        assert resume.is_disk_error(raised.value), repr(raised.value)
    assert not resume.is_disk_error(RuntimeError("CUDA error: device-side assert triggered"))
