"""Inject faults into tiny runs and print a table of what was injected, what was seen, and whether anything was lost.

    python -m integration.faults [--rows N] [--only KIND ...] [--output FILE]

Everything is imported once, and each run is a forked process of this one: no import is paid for per row. A row is lost where,
after the fault, neither the same command again, nor resuming, nor `export` ends with the files of an uninterrupted run, bit for
bit (the time stamps of record and verification aside), or where a fault is accepted in silence and gives another result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch
import yaml
from transformers import TrainerCallback

import grace_plugin
from grace_plugin.export.record import environment
from grace_plugin.run import resume
from tests.pairs import Pair, pair, run
from tests.tiny import make_samples

STEPS = 4
LIMIT = 300.0  # seconds of one process
STATE_FILES = (
    "model.safetensors", "grace_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "manifest.json", "",
)  # fmt: skip


class Row(NamedTuple):
    """One injected fault: its kind, what is done, what was seen, and what was lost ("" for nothing)."""

    kind: str
    injected: str
    seen: str
    lost: str
    seconds: float = 0.0


class Bench:
    """A pair, its uninterrupted run and a folder for faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.pair: Pair = Pair("llava", folder / "pair" / "student", folder / "pair" / "teacher")
        wait(begin(lambda: pair("llava", folder / "pair"), folder / "pair.log"))
        started = time.monotonic()
        self.whole = self.uninterrupted(folder / "whole" / "out")
        self.seconds = time.monotonic() - started

    def uninterrupted(self, out: Path, **options: Any) -> Path:
        """The checkpoint of a run that is left alone."""
        log = out.with_name("whole.log")
        log.parent.mkdir()
        if wait(begin(lambda: self.train(out, **options), log)):
            raise RuntimeError(f"the uninterrupted run failed:\n{log.read_text()[-3000:]}")
        return out

    def train(self, out: Path, **options: Any) -> None:
        """Four steps with a state of each; 6 samples by 2, so that the run ends inside an epoch."""
        given: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
        run(self.pair, out, make_samples(6, seed=3), **(given | options))

    def place(self) -> Path:
        """A new destination."""
        self.count += 1
        (self.folder / f"{self.count}").mkdir()
        return self.folder / f"{self.count}" / "out"

    def finish(self, out: Path, whole: Path | None = None, **options: Any) -> tuple[str, str]:
        """Go on as a user would; returns how, and what is lost against `whole`."""
        states = resume.states(run_of(out))
        if out.exists():
            return "the checkpoint was already whole", self.differing(out, whole)
        newest = resume.newest_whole(run_of(out))[0] if states else None
        if states and newest is None:
            shutil.rmtree(run_of(out))
        how = f"resumed from {newest.name}" if newest is not None else "started again"
        log = out.with_name("again.log")
        status = wait(begin(lambda: self.train(out, resume_from_checkpoint=newest is not None, **options), log))
        if status:
            return how, f"exit status {status}: {log.read_text().strip().splitlines()[-1][:200]}"
        return how, self.differing(out, whole)

    def differing(self, out: Path, whole: Path | None = None) -> str:
        """Files of a checkpoint that are not those of the uninterrupted run, "" for none."""
        one, two = contents(whole or self.whole), contents(out)
        names = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
        left = [path.name for path in out.parent.glob(".*partial*")]
        return ", ".join([*names, *left])


def contents(folder: Path) -> dict[str, Any]:
    """Bytes of every file by name, time stamps and hashes that cover them aside."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content: Any = path.read_bytes()
            if path.name in ("record.json", "verification.json"):
                aside = ("time", "date", "created", "second", "sha256", "digest")
                content = {k: v for k, v in json.loads(content).items() if not any(part in k for part in aside)}
                if path.name == "record.json":
                    content["files"] = {k: v for k, v in content["files"].items() if k != "run.yaml"}
            elif path.name == "run.yaml":  # a fault may be a callback of the first run, which the second is not given
                content = {k: v for k, v in yaml.safe_load(content).items() if k != "callbacks"}
            found[str(path.relative_to(folder))] = content
    return found


def run_of(out: Path) -> Path:
    """The run folder of a destination."""
    return out.with_name(f"{out.name}.run")


def begin(work: Callable[[], Any], log: Path) -> int:
    """Fork a process that works and writes what it says to a file; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(child: int, limit: float = LIMIT) -> int:
    """Exit status of a process, negative for a signal; it is killed after the limit."""
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


# ---- kinds of faults ------------------------------------------------------------------------------------------------------


def kills_at_random(bench: Bench) -> Iterator[Row]:
    """SIGKILL at a random moment of a run."""
    for number in range(25):
        out, moment = bench.place(), random.Random(number).uniform(0.02, 1.0) * bench.seconds
        child = begin(lambda out=out: bench.train(out), out.with_name("first.log"))  # type: ignore[misc]
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        wait(child)
        how, lost = bench.finish(out)
        yield Row("kill", f"SIGKILL after {moment / bench.seconds:.0%} of a run", how, lost)


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


def kills_at_files(bench: Bench) -> Iterator[Row]:
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
            while name and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) and not aim.exists():
                pass
            with contextlib.suppress(ProcessLookupError):
                if name and aim.exists():
                    os.kill(child, signal.SIGKILL)
            killed = wait(child) == -signal.SIGKILL
            how, lost = bench.finish(out)
            said = f"SIGKILL at {name or 'the rename'} of the {kind}"
            yield Row("kill at a file", said, how if killed else f"not hit in time; {how}", lost)


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    """The last tenth of a file is missing."""
    file.write_bytes(file.read_bytes()[: -(file.stat().st_size // 10 or 1)])


def corruptions(bench: Bench) -> Iterator[Row]:
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
        told = "not used: checkpoint-3" in out.with_name("again.log").read_text()
        yield Row(
            "corruption", f"{said} in the newest state", f"{how}, the damaged one named", lost if told else "not named"
        )


class Send(TrainerCallback):
    """Sends a signal to its own process inside a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def signals(bench: Bench) -> Iterator[Row]:
    """SIGINT and SIGTERM in each step of a run that was asked for no states, and one at a moment."""
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 100}
    whole = bench.uninterrupted(bench.folder / "whole-signals" / "out", **given)
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
            yield Row("signal", f"{number.name} {where}", f"exit status {found}; {how}", lost)


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
    """Another program takes all but a few bytes of a disk after a step."""

    def __init__(self, disk: Path, step: int, left: int) -> None:
        self.disk, self.step, self.left = disk, step, left

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            free = shutil.disk_usage(self.disk).free - self.left
            with (self.disk / "filler").open("wb") as out:
                for _ in range(max(0, free) >> 16):
                    out.write(bytes(1 << 16))


def full_disks(bench: Bench) -> Iterator[Row]:
    """A disk that is too small from the start, or full after a step, for the states or for the checkpoint, or both."""
    state = sum(file.stat().st_size for file in (run_of(bench.whole) / "checkpoint-1").iterdir())
    cases: list[tuple[str, int, int, int]] = [
        *((f"a disk of {share:.1f} states for all", int(state * share), 0, 0) for share in (0.3, 1.2, 2.5)),
        *((f"the disk full after step {step}, {left:.1f} states left", state * 8, step, int(state * left))
          for step in (1, 2, 4) for left in (0.0, 0.4)),
        ("the disk full after step 4, one state left", state * 8, 4, state),
    ]  # fmt: skip
    for said, size, step, left in cases:
        out = bench.place()
        with tmpfs(out.parent / "disk", size) as disk:
            if disk is None:
                yield Row("full disk", said, "skipped: no tmpfs can be mounted here", "")
                continue
            inside, log = disk / "out", out.with_name("first.log")
            options = {"callbacks": [Fill(disk, step, left)]} if step else {}
            child = begin(lambda inside=inside, options=options: bench.train(inside, **options), log)  # type: ignore[misc]
            status, text = wait(child), log.read_text()
            if not step:
                refused = status != 0 and "free" in text and not resume.states(run_of(inside)) and not inside.exists()
                yield Row(
                    "full disk", said, "refused before the first step", "" if refused else f"exit status {status}"
                )
                continue
            warned = "no resume state was written" in text
            (disk / "filler").unlink()
            shutil.copytree(disk, out.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("filler"))
            how, lost = bench.finish(out)
            seen = f"{'a warning, ' if warned else ''}exit status {status}; space made; {how}"
            yield Row("full disk", said, seen, lost)


def pairs(bench: Bench) -> Iterator[Row]:
    """Two processes run the same command at once, the second some time after the first."""
    for number in range(10):
        out, later = bench.place(), bench.seconds * number / 9 * 0.9
        first = begin(lambda out=out: bench.train(out), out.with_name("first.log"))  # type: ignore[misc]
        time.sleep(later)
        second = begin(lambda out=out: bench.train(out), out.with_name("second.log"))  # type: ignore[misc]
        found = wait(first), wait(second)
        how, lost = bench.finish(out)
        yield Row(
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


def exports(bench: Bench) -> Iterator[Row]:
    """The final save fails or is killed, of a run that was asked for no states; `export` finishes it."""

    def train(out: Path, callbacks: list[Any]) -> None:
        run(bench.pair, out, make_samples(6, seed=3), max_steps=STEPS, logging_steps=1, callbacks=callbacks)

    whole = bench.place()
    wait(begin(lambda: train(whole, []), whole.with_name("whole.log")))
    for said, killed in (("the final save fails, default options", False), ("SIGKILL in it, default options", True)):
        out = bench.place()
        callbacks = [] if killed else [Spoil(out)]
        child = begin(lambda out=out, callbacks=callbacks: train(out, callbacks), out.with_name("first.log"))  # type: ignore[misc]
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
        yield Row("export", said, "finished by grace export, without training", lost)


KINDS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "kill": kills_at_random, "file": kills_at_files, "corruption": corruptions, "signal": signals, "disk": full_disks,
    "pair": pairs, "export": exports,
}  # fmt: skip


def inject(kinds: list[str], most: int, folder: Path) -> list[Row]:
    """Run the rows of some kinds, at most so many of each, and print each."""
    bench, found = Bench(folder), []
    for kind in kinds:
        source = KINDS[kind](bench)
        for _ in range(most):
            started = time.monotonic()
            row = next(source, None)
            if row is None:
                break
            row = row._replace(seconds=round(time.monotonic() - started, 1))
            found.append(row)
            print(f"{row.kind:15} | {row.injected:50} | {row.seen:60} | {row.lost or 'nothing'}", flush=True)
    return found


def main() -> int:
    """Entry point; the exit status is 1 where a row was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000, help="at most so many of each kind")
    parser.add_argument("--only", nargs="*", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="grace-faults-"))
    try:
        table = inject(args.only, args.rows, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    lost = [row for row in table if row.lost]
    print(f"{len(table)} faults injected, {len(lost)} lost")
    if args.output is not None:
        result = {
            "command": "python -m integration.faults " + " ".join(sys.argv[1:]), "environment": environment(),
            "injected": len(table), "lost": len(lost), "rows": [row._asdict() for row in table],
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
