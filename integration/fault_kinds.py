"""The kinds of faults: each yields one `Fault` after another, injected into a run of its own.

A fault is lost where, after it, neither the same command again, nor resuming, nor `export` ends with the files of an
uninterrupted run, bit for bit (time stamps aside), or where it is accepted in silence and gives another result.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import grace_plugin
from grace_plugin.data import load_samples
from grace_plugin.run import resume
from integration.fault_bench import Bench, Fault, begin, begin_ranks, run_of, wait, wait_ranks
from tests.tiny import make_samples

__all__ = ["KINDS"]

STATE_FILES = (
    "model.safetensors", "grace_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "manifest.json", "",
)  # fmt: skip
RANK_FILES = {name.replace("rng_state", "rng_state_0"): 0 for name in STATE_FILES} | {"rng_state_1.pth": 1}
FULL = Path("/dev/full")  # every write to it finds a full disk


def kills_at_random(bench: Bench) -> Iterator[Fault]:
    """SIGKILL at a random moment of a run."""
    for number in range(25):
        out, moment = bench.place(), random.Random(number).uniform(0.02, 1.0) * bench.seconds
        child = begin(lambda out=out: bench.train(out), out.with_name("first.log"))  # type: ignore[misc]
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        wait(child)
        how, lost = bench.finish(out)
        yield Fault("kill", f"SIGKILL after {moment / bench.seconds:.0%} of a run", how, lost)


def kill_at(aim: Path, renamed: bool) -> None:
    """Have this process kill itself where Python opens a file to write it, or renames a folder to it."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not renamed and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            hit = os.fspath(args[0]) == str(aim) if isinstance(args[0], (str, Path)) else False
        else:
            hit = event == "os.rename" and renamed and os.fspath(args[1]) == str(aim)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_when_there(child: int, aim: Path | None) -> None:
    """Kill a process as soon as a file exists; returns when the process has ended otherwise."""
    while aim is not None and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if aim.exists():
            os.kill(child, signal.SIGKILL)
            return


def kills_at_files(bench: Bench) -> Iterator[Fault]:
    """SIGKILL when a given file of a resume state, or of the checkpoint, comes into being; "" is the renamed folder.

    Files that are written outside of Python (weights, optimizer) are watched for from here.
    """
    saved = sorted(path.relative_to(bench.whole).as_posix() for path in bench.whole.rglob("*") if path.is_file())
    for kind, names in (("state", STATE_FILES), ("checkpoint", (*saved, ""))):
        for name in names:
            out = bench.place()
            aside = run_of(out) / "checkpoint-3.partial" if kind == "state" else out.with_name(".out.partial")
            whole = run_of(out) / "checkpoint-3" if kind == "state" else out
            aim = aside / name if name else whole

            def train(out: Path = out, aim: Path = aim, renamed: bool = not name) -> None:
                kill_at(aim, renamed)
                bench.train(out)

            child = begin(train, out.with_name("first.log"))
            kill_when_there(child, aim if name else None)
            killed = wait(child) == -signal.SIGKILL
            how, lost = bench.finish(out)
            said = f"SIGKILL at {name or 'the rename'} of the {kind}"
            yield Fault("kill at a file", said, how if killed else f"not hit in time; {how}", lost)


def kills_of_ranks(bench: Bench) -> Iterator[Fault]:
    """SIGKILL of one of two ranks (gloo) when a given file of a resume state comes into being."""
    whole = bench.uninterrupted("whole-ranks", ranks=2, ddp_backend="gloo")
    for name, rank in RANK_FILES.items():
        out = bench.place()
        final = run_of(out) / "checkpoint-2"
        aim = final.with_name("checkpoint-2.partial") / name if name else final

        def train(out: Path = out, aim: Path = aim, renamed: bool = not name, rank: int = rank) -> None:
            if os.environ["RANK"] == str(rank):
                kill_at(aim, renamed)
            bench.train(out, ddp_backend="gloo")

        children = begin_ranks(train, out, "first", 2)
        kill_when_there(children[rank], aim if name else None)
        statuses = wait_ranks(children)
        how, lost = bench.finish(out, whole, ranks=2, ddp_backend="gloo")
        hit = "" if statuses[rank] == -signal.SIGKILL else "not hit in time; "
        said = f"SIGKILL of rank {rank} of 2 at {name or 'the rename'} of the state"
        yield Fault("kill of a rank", said, f"{hit}exit status {statuses[1 - rank]} of the other; {how}", lost)


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    """The last tenth of a file is missing."""
    file.write_bytes(file.read_bytes()[: -(file.stat().st_size // 10 or 1)])


def corruptions(bench: Bench) -> Iterator[Fault]:
    """The newest state is damaged; the older one is whole."""
    harms: list[tuple[str, Callable[[Path], None]]] = [
        ("one bit of", flip),
        ("a tenth cut from", cut),
        ("no", Path.unlink),
    ]
    cases = [(f"{said} {name}", name, harm) for name in STATE_FILES[:5] for said, harm in harms]
    for said, name, harm in cases:
        out = bench.place()
        for step in (2, 3):
            shutil.copytree(run_of(bench.whole) / f"checkpoint-{step}", run_of(out) / f"checkpoint-{step}")
        harm(run_of(out) / "checkpoint-3" / name)
        how, lost = bench.finish(out)
        told = "not used: checkpoint-3" in out.with_name("again0.log").read_text()
        yield Fault(
            "corruption", f"{said} in the newest state", f"{how}, the damaged one named", lost if told else "not named"
        )


class Send(TrainerCallback):
    """Sends a signal to its own process inside a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def signals(bench: Bench) -> Iterator[Fault]:
    """SIGINT and SIGTERM in each step of a run that was asked for no states, and one at a moment."""
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 100}
    whole = bench.uninterrupted("whole-signals", **given)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        for step in (1, 2, 3, 4, 0):
            out, log = bench.place(), bench.folder / f"{bench.count}" / "first.log"
            options = given | {"callbacks": [Send(number, step)]}
            child = begin(lambda out=out, options=options: bench.train(out, **options), log)  # type: ignore[misc]
            if not step:
                time.sleep(bench.seconds * 0.8)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
            found = wait(child)
            line = next((one for one in log.read_text().splitlines() if one.startswith("stopped by")), "")
            how, lost = bench.finish(out, whole, **given)
            if step and (found != status or "is kept; go on with" not in line):
                lost = lost or f"exit status {found}, said {line!r}"
            where = f"in step {step}" if step else "at a moment"
            yield Fault("signal", f"{number.name} {where}", f"exit status {found}; {how}", lost)


@contextlib.contextmanager
def tmpfs(place: Path, size: int) -> Iterator[Path | None]:
    """A file system of so many bytes; None where none can be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True)
    try:
        yield place if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", place], capture_output=True)


class Fill(TrainerCallback):
    """Another program takes all but a few bytes of a disk after a step; step 0 is before the first."""

    def __init__(self, disk: Path, step: int, left: int) -> None:
        self.disk, self.step, self.left = disk, step, left

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.step == 0:
            self.fill()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.fill()

    def fill(self) -> None:
        free = shutil.disk_usage(self.disk).free - self.left
        with (self.disk / "filler").open("wb") as out:
            for _ in range(max(0, free) >> 16):
                out.write(bytes(1 << 16))


def small_disks(bench: Bench) -> Iterator[Fault]:
    """A disk that is too small from the start: the run is refused before its first step."""
    state = sum(file.stat().st_size for file in (run_of(bench.whole) / "checkpoint-1").iterdir())
    for share in (0.3, 1.2, 2.5):
        out, said = bench.place(), f"a disk of {share:.1f} states for all"
        with tmpfs(out.parent / "disk", int(state * share)) as disk:
            if disk is None:
                yield Fault("full disk", said, "skipped: no tmpfs can be mounted here", "")
                continue
            inside, log = disk / "out", out.with_name("first.log")
            status = wait(begin(lambda inside=inside: bench.train(inside), log))  # type: ignore[misc]
            refused = status != 0 and "free" in log.read_text() and not [p for p in disk.rglob("*") if p.is_file()]
            yield Fault("full disk", said, "refused before the first step", "" if refused else f"exit status {status}")


def full_disks(bench: Bench) -> Iterator[Fault]:
    """A disk that another program fills: before the first step, or after a step, for the states and the checkpoint.

    Lost is also a run that was not refused, ends without a checkpoint and has no whole state to go on from.
    """
    state = sum(file.stat().st_size for file in (run_of(bench.whole) / "checkpoint-1").iterdir())
    plain = bench.uninterrupted("whole-plain", no_states=True)
    filled = [(step, left) for step in (0, 1, 2, 4) for left in (0.0, 0.4)] + [(4, 1.0)]
    cases = [*((step, left, False) for step, left in filled), (0, 0.0, True), (2, 0.0, True), (0, 0.4, True)]
    for step, left, default in cases:
        out = bench.place()
        when = f"after step {step}" if step else "before step 1"
        said = f"the disk full {when}, {left:.1f} states left{', default options' if default else ''}"
        with tmpfs(out.parent / "disk", state * 8) as disk:
            if disk is None:
                yield Fault("full disk", said, "skipped: no tmpfs can be mounted here", "")
                continue
            inside, log = disk / "out", out.with_name("first.log")

            def train(inside: Path = inside, fill: Fill | None = None, default: bool = default) -> None:
                bench.train(inside, callbacks=[fill], no_states=default)

            fill = Fill(disk, step, int(state * left))
            status, text = wait(begin(lambda train=train, fill=fill: train(fill=fill), log)), log.read_text()  # type: ignore[misc]
            warned = "no resume state was written" in text
            saved = inside.exists() or resume.newest_whole(run_of(inside))[0] is not None
            (disk / "filler").unlink()
            shutil.copytree(disk, out.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("filler"))
            how, lost = bench.finish(out, plain if default else None, no_states=default)
            seen = f"{'a warning, ' if warned else ''}exit status {status}; space made; {how}"
            yield Fault("full disk", said, seen, lost if saved else lost or "no state of the run was kept")


def side_outputs(bench: Bench) -> Iterator[Fault]:
    """What a run writes in addition to its states and its checkpoint cannot be written: the run ends with its checkpoint."""
    samples = bench.folder / "samples.jsonl"
    lines = []
    for number, sample in enumerate(make_samples(6, seed=3)):
        sample["images"][0].save(bench.folder / f"{number}.png")
        lines.append(json.dumps(sample | {"images": [f"{number}.png"]}))
    samples.write_text("\n".join(lines) + "\n")
    whole = bench.uninterrupted("whole-file", dataset=load_samples(samples))

    def run_with(
        said: str, warning: str, *, files: tuple[str, ...] = (), streams: tuple[int | None, int | None] = (None, None),
        cache: Path | None = None, pages: int = 0,
    ) -> Fault:  # fmt: skip
        out, data = bench.place(), load_samples(samples) if cache is not None else None
        log = out.with_name("first.log")
        for name in files:
            run_of(out).mkdir(exist_ok=True)
            (run_of(out) / name).symlink_to(FULL)

        def train() -> None:
            if cache is not None:
                os.environ["GRACE_CACHE"] = str(cache)
            bench.train(out, dataset=data)

        with tmpfs(cache, pages * 4096) if pages and cache is not None else contextlib.nullcontext():
            status = wait(begin(train, log, streams))
        lost = bench.differing(out, whole if data is not None else None) if status == 0 else f"exit status {status}"
        told = log.read_text().count(warning)
        if told != 1 and warning:
            lost = lost or f"said {told} times: {warning}"
        return Fault("side output", said, "said once, and the run ends with its checkpoint", lost)

    def broken_pipe() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        return writer

    full = os.open(FULL, os.O_WRONLY)
    yield run_with("metrics.jsonl on a full disk", "metrics.jsonl cannot be written", files=("metrics.jsonl",))
    yield run_with("the report on the data on a full disk", "the report on the data in", files=("data_report.json",))
    yield run_with("run.yaml on a full disk", "run.yaml was not written", files=(".run.yaml",))
    yield run_with(
        "standard output is a closed pipe", "nothing more can be printed (Broken", streams=(broken_pipe(), None)
    )
    yield run_with("standard output is a full disk", "nothing more can be printed (No space", streams=(full, None))
    yield run_with("standard error is a closed pipe", "", streams=(None, broken_pipe()))
    yield run_with("standard output and error are closed pipes", "", streams=(broken_pipe(), broken_pipe()))
    yield run_with(
        "the index in $GRACE_CACHE on a full disk",
        "the check goes on without it",
        cache=bench.folder / "cache",
        pages=1,
    )
    yield run_with("$GRACE_CACHE cannot be made", "the check goes on without it", cache=FULL / "cache")
    os.close(full)


class StopWorkers(TrainerCallback):
    """Stops the loader's workers after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGSTOP)


def stopped_workers(bench: Bench) -> Iterator[Fault]:
    """SIGSTOP to the workers of the loader: the run ends in one sentence after its longest wait, here 3 seconds."""
    many = make_samples(24, seed=3)
    for workers in (1, 2):
        given = {"dataset": many, "max_steps": 8, "dataloader_num_workers": workers, "ddp_timeout": 3}
        whole, out = bench.uninterrupted(f"whole-workers-{workers}", **given), bench.place()
        log = out.with_name("first.log")
        child = begin(lambda out=out, given=given: bench.train(out, callbacks=[StopWorkers()], **given), log)  # type: ignore[misc]
        status, last = wait(child), log.read_text().strip().splitlines()[-1]
        how, lost = bench.finish(out, whole, **given)
        if status != 1 or "has sent nothing for 3 s: it was stopped" not in last:
            lost = lost or f"exit status {status}, said {last[:100]!r}"
        yield Fault("stopped worker", f"SIGSTOP to {workers} of {workers} workers", f"one sentence; {how}", lost)


def pairs(bench: Bench) -> Iterator[Fault]:
    """Two processes run the same command at once, the second some time after the first."""
    for number in range(10):
        out, later = bench.place(), bench.seconds * number / 9 * 0.9
        first = begin(lambda out=out: bench.train(out), out.with_name("first.log"))  # type: ignore[misc]
        time.sleep(later)
        second = begin(lambda out=out: bench.train(out), out.with_name("second.log"))  # type: ignore[misc]
        found = wait(first), wait(second)
        how, lost = bench.finish(out)
        yield Fault(
            "two at once",
            f"the same command {later:.1f} s later",
            f"exit status {found[0]} and {found[1]}; {how}",
            lost,
        )


class Spoil(TrainerCallback):
    """Puts a file where the checkpoint will go, after the last step."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def on_train_end(self, *args: Any, **rest: Any) -> None:
        self.place.write_text("in the way")


def exports(bench: Bench) -> Iterator[Fault]:
    """The final save fails or is killed, of a run that was asked for no states; `export` finishes it."""
    whole = bench.uninterrupted("whole-export", no_states=True)
    for said, killed in (("the final save fails, default options", False), ("SIGKILL in it, default options", True)):
        out = bench.place()
        callbacks: list[Any] = [] if killed else [Spoil(out)]

        def train(out: Path = out, callbacks: list[Any] = callbacks) -> None:
            bench.train(out, callbacks=callbacks, no_states=True)

        child = begin(train, out.with_name("first.log"))
        while killed and not (out.with_name(".out.partial") / "model.safetensors").exists():
            time.sleep(0.0005)
        if killed:
            os.kill(child, signal.SIGKILL)
        wait(child)
        if out.is_file():
            out.unlink()
        shutil.rmtree(out.with_name(".out.partial"), ignore_errors=True)
        status = wait(begin(lambda out=out: grace_plugin.export(run_of(out)), out.with_name("export.log")))  # type: ignore[misc]
        lost = bench.differing(out, whole) if status == 0 else f"export: exit status {status}"
        yield Fault("export", said, "finished by grace export, without training", lost)


KINDS: dict[str, Callable[[Bench], Iterator[Fault]]] = {
    "kill": kills_at_random, "file": kills_at_files, "rank": kills_of_ranks, "corruption": corruptions, "signal": signals,
    "small": small_disks, "disk": full_disks, "side": side_outputs, "worker": stopped_workers, "pair": pairs,
    "export": exports,
}  # fmt: skip
