"""The end of a run can be repeated: by resuming, which trains nothing, and by `export`, which needs no data and no teacher."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor, TrainerCallback

import grace_plugin
from grace_plugin.data.workers import bounded
from grace_plugin.run import resume
from grace_plugin.run.interrupt import ResumeCallback, Terminated
from tests.pairs import Pair, recipe_text, run
from tests.tiny import make_samples

STEPS: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
STAMPS = ("time", "date", "created", "seconds")


def contents(folder: Path) -> dict[str, Any]:
    """Bytes of every file by name; time stamps of the record and the verification aside."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content: Any = path.read_bytes()
            if path.name in ("record.json", "verification.json"):
                content = {k: v for k, v in json.loads(content).items() if not any(stamp in k for stamp in STAMPS)}
            found[str(path.relative_to(folder))] = content
    return found


def differing(left: Path, right: Path) -> list[str]:
    one, two = contents(left), contents(right)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


@pytest.fixture(scope="module")
def whole(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps inside its second epoch, with states of steps 2 and 3; never change it."""
    return run(llava, tmp_path_factory.mktemp("whole") / "out", **STEPS).checkpoint


@pytest.fixture
def ended(whole: Path, tmp_path: Path) -> Path:
    """Where such a run puts its checkpoint, which is not there, next to a copy of its states."""
    shutil.copytree(whole.with_name("out.run"), tmp_path / "out.run")
    return tmp_path / "out"


class Count(TrainerCallback):
    """Optimizer steps that were made."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *args: Any, **rest: Any) -> None:
        self.steps += 1


@pytest.mark.slow
def test_resume__ended_inside_an_epoch__trains_nothing_and_saves_the_same(
    llava: Pair, whole: Path, ended: Path
) -> None:
    count = Count()
    result = run(llava, ended, resume_from_checkpoint=True, callbacks=[count], **STEPS)
    assert count.steps == 0
    assert json.loads((ended / "grace/record.json").read_text())["run"]["steps"] == 3
    assert differing(whole, ended) == []
    assert [log["step"] for log in result.history][-1:] == [3] or not result.history


@pytest.mark.slow
def test_resume__ended_with_an_epoch__saves_the_same(llava: Pair, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}  # 4 samples by 2: one epoch
    first = run(llava, tmp_path / "out", **options)
    first.checkpoint.rename(tmp_path / "kept")
    run(llava, tmp_path / "out", resume_from_checkpoint=True, **options)
    assert differing(tmp_path / "kept", tmp_path / "out") == []


@pytest.mark.slow
def test_export__ended_run__the_same_files_without_data_and_teacher(
    llava: Pair, whole: Path, ended: Path, tmp_path: Path
) -> None:
    result = grace_plugin.export(ended.with_name("out.run"), tmp_path / "exported")
    assert result.verification["verified"] and result.checkpoint == tmp_path / "exported"
    assert differing(whole, tmp_path / "exported") == []
    assert len(resume.states(ended.with_name("out.run"))) == 2  # asked for by save_strategy, so they stay


@pytest.mark.slow
def test_export__teacher_is_gone__still_exports(llava: Pair, tmp_path: Path) -> None:
    teacher = shutil.copytree(llava.teacher, tmp_path / "teacher")
    first = run(llava, tmp_path / "out", recipe=recipe_text(teacher), **STEPS)
    first.checkpoint.rename(tmp_path / "kept")
    shutil.rmtree(teacher)
    grace_plugin.export(tmp_path / "out.run")
    assert differing(tmp_path / "kept", tmp_path / "out") == []


@pytest.mark.slow
def test_export__processor_and_probe_were_passed__the_same_files(llava: Pair, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(llava.student)
    processor.chat_template = processor.chat_template + " "
    first = run(llava, tmp_path / "out", processor=processor, probe=make_samples(1, seed=77), **STEPS)
    first.checkpoint.rename(tmp_path / "kept")
    grace_plugin.export(tmp_path / "out.run")
    assert differing(tmp_path / "kept", tmp_path / "out") == []


def test_export__run_has_not_ended__says_how_far_it_is(ended: Path) -> None:
    shutil.rmtree(ended.with_name("out.run") / "checkpoint-3")
    with pytest.raises(
        ValueError, match=r"checkpoint-2 has trained 2 of 3 steps; go on with .*--resume_from_checkpoint"
    ):
        grace_plugin.export(ended.with_name("out.run"))
    assert not ended.exists()


def test_export__nothing_there__refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no resume state"):
        grace_plugin.export(tmp_path / "none.run")


# ---- states that nobody asked for -----------------------------------------------------------------------------------------


class Spoil(TrainerCallback):
    """Puts a file where the checkpoint will go, after the last step."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def on_train_end(self, *args: Any, **rest: Any) -> None:
        self.place.write_text("in the way")


@pytest.mark.slow
def test_default_run__final_save_fails__end_state_kept_and_exported(
    llava: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = run(llava, tmp_path / "good").checkpoint
    assert resume.states(tmp_path / "good.run") == []  # the checkpoint is there, so the end state is not needed
    out = tmp_path / "out"
    with pytest.raises(FileExistsError):
        run(llava, out, callbacks=[Spoil(out)])
    (state,) = resume.states(tmp_path / "out.run")
    assert resume.damage(state) == "" and not (state / "optimizer.pt").exists()
    assert "finish it without training by: grace export" in caplog.text
    out.unlink()
    grace_plugin.export(tmp_path / "out.run")
    assert differing(good, out) == []
    assert resume.states(tmp_path / "out.run") == []


@pytest.mark.slow
def test_default_run__by_the_clock__newest_state_alone_is_kept(llava: Pair, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append([one.name for one in resume.states(Path(args.output_dir))])

    run(llava, tmp_path / "out", max_steps=3, save_minutes=0, callbacks=[Watch()])
    assert seen[0] == ["checkpoint-1"] and all(len(one) == 1 for one in seen)
    run(llava, tmp_path / "none", max_steps=3, save_minutes=None, callbacks=[Spoil(tmp_path / "x")])
    assert not list((tmp_path / "none.run").glob("checkpoint-*"))


@pytest.mark.slow
def test_save_strategy_no__given__no_state_is_written(
    llava: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with caplog.at_level(logging.ERROR), pytest.raises(FileExistsError):
        run(llava, out, save_strategy="no", callbacks=[Spoil(out)])
    assert resume.states(tmp_path / "out.run") == []
    assert "its save failed, and it holds no resume state" in caplog.text


# ---- signals --------------------------------------------------------------------------------------------------------------


class Send(TrainerCallback):
    """Sends a signal to this process in the second step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signal__in_a_step__state_kept_and_resumed_run_has_the_same_bits(
    llava: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, raised: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    whole = run(llava, tmp_path / "whole", max_steps=4).checkpoint
    with pytest.raises(raised) as ended:
        run(llava, tmp_path / "out", max_steps=4, callbacks=[Send(number)])
    assert getattr(ended.value, "code", 143) == 143 and signal.getsignal(number) == before
    (state,) = resume.states(tmp_path / "out.run")
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped by {number.name} after step 2 of 4; {state} is kept; go on with: call train again with the same arguments "
        "and resume_from_checkpoint=True"
    )
    assert state.name == "checkpoint-2" and resume.damage(state) == "" and (state / "optimizer.pt").is_file()
    run(llava, tmp_path / "out", max_steps=4, resume_from_checkpoint=True)
    assert differing(whole, tmp_path / "out") == []


@pytest.mark.slow
def test_signal__not_asked_for__left_to_the_caller(llava: Pair, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(llava, tmp_path / "out", max_steps=4, save_on_signal=False, callbacks=[Send(signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert resume.states(tmp_path / "out.run") == []


def in_child(work: Any) -> int:
    """Exit status of a forked process, negative for a signal, 3 for an exception; nothing of it returns to pytest."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("pause", "status"), [(0.0, 0), (1.1, -signal.SIGTERM)])
def test_signal__second_one__ends_at_once_unless_within_a_second(pause: float, status: int) -> None:
    def twice() -> None:
        trainer: Any = None
        with ResumeCallback(trainer, on_signal=True, minutes=None).watching():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    assert in_child(twice) == status


class StopWorkers(TrainerCallback):
    """Stops the loader's workers after the first step, as a debugger or a full batch queue of a cluster does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGSTOP)


def test_loader_worker__stopped__ends_in_one_sentence(llava: Pair, tmp_path: Path) -> None:
    """A worker that is stopped is alive, so torch would wait for it without end, and join it without end afterwards."""
    options: dict[str, Any] = {"max_steps": 9, "dataloader_num_workers": 1, "ddp_timeout": 2}
    with pytest.raises(TimeoutError, match=r"has sent nothing for 2 s: it was stopped.*resume_from_checkpoint$"):
        run(llava, tmp_path / "out", make_samples(20, seed=3), callbacks=[StopWorkers()], **options)
    assert multiprocessing.active_children() == [] and not (tmp_path / "out").exists()


def test_loader_worker__slow_but_within_the_limit__waited_for() -> None:
    assert list(bounded(DataLoader(Slow(), batch_size=None, num_workers=1), 30.0)) == [0, 1]


def test_loader_worker__fails__its_own_error() -> None:
    with pytest.raises(ZeroDivisionError):
        list(bounded(DataLoader(Slow(0), batch_size=None, num_workers=1), 30.0))


class Slow(Dataset[int]):
    """Two numbers, 0.1 seconds each."""

    def __init__(self, divisor: int = 1) -> None:
        self.divisor = divisor

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        time.sleep(0.1)
        return index // self.divisor
