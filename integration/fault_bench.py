"""Run tiny trainings in forked processes, go on after a fault as a user would, and compare the checkpoints.

Everything is imported once, and each run is a forked process of this one: no import is paid for per fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch
import yaml

from grace_plugin.run import resume
from tests.pairs import Pair, pair, run
from tests.tiny import make_samples

__all__ = ["Bench", "Fault", "begin", "begin_ranks", "run_of", "wait", "wait_ranks"]

STEPS = 4
LIMIT = 300.0  # seconds of one process


class Fault(NamedTuple):
    """One injected fault: its kind, what is done, what was seen, and what was lost ("" for nothing)."""

    kind: str
    injected: str
    seen: str
    lost: str
    seconds: float = 0.0


class Bench:
    """A pair of models, their uninterrupted run, and a folder for faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.pair: Pair = Pair("llava", folder / "pair" / "student", folder / "pair" / "teacher")
        wait(begin(lambda: pair("llava", folder / "pair"), folder / "pair.log"))
        started = time.monotonic()
        self.whole = self.uninterrupted("whole")
        self.seconds = time.monotonic() - started

    def uninterrupted(self, name: str, ranks: int = 1, **options: Any) -> Path:
        """Return the checkpoint of a run that is left alone."""
        out = self.folder / name / "out"
        out.parent.mkdir()
        children = begin_ranks(lambda: self.train(out, **options), out, "whole", ranks)
        if any(wait_ranks(children)):
            raise RuntimeError(f"the uninterrupted run failed:\n{out.with_name('whole0.log').read_text()[-3000:]}")
        return out

    def train(self, out: Path, dataset: Any = None, **options: Any) -> None:
        """Train four steps with a state of each; 6 samples by 2, so that one process ends inside an epoch."""
        given: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
        given |= options
        if given.pop("no_states", False):  # the default of a user: states by the clock, and one of the end
            del given["save_strategy"], given["save_steps"]
        run(self.pair, out, make_samples(6, seed=3) if dataset is None else dataset, **given)

    def place(self) -> Path:
        """Return a new destination."""
        self.count += 1
        (self.folder / f"{self.count}").mkdir()
        return self.folder / f"{self.count}" / "out"

    def finish(self, out: Path, whole: Path | None = None, ranks: int = 1, **options: Any) -> tuple[str, str]:
        """Go on as a user would; return how, and what is lost against `whole`."""
        states = resume.states(run_of(out))
        if out.exists():
            return "the checkpoint was already whole", self.differing(out, whole)
        newest = resume.newest_whole(run_of(out))[0] if states else None
        if states and newest is None:
            shutil.rmtree(run_of(out))
        how = f"resumed from {newest.name}" if newest is not None else "started again"

        def again() -> None:
            self.train(out, resume_from_checkpoint=newest is not None, **options)

        statuses = wait_ranks(begin_ranks(again, out, "again", ranks))
        if any(statuses):
            return (
                how,
                f"exit status {statuses}: {out.with_name('again0.log').read_text().strip().splitlines()[-1][:200]}",
            )
        return how, self.differing(out, whole)

    def differing(self, out: Path, whole: Path | None = None) -> str:
        """Return the files of a checkpoint that are not those of the uninterrupted run, "" for none."""
        one, two = contents(whole or self.whole), contents(out)
        names = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
        left = [path.name for path in out.parent.glob(".*partial*")]
        left += [path.name for path in run_of(out).glob("*.reserved")]
        return ", ".join([*names, *left])


def contents(folder: Path) -> dict[str, Any]:
    """Return the bytes of every file by name, time stamps and hashes that cover them aside."""
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
    """Return the run folder of a destination."""
    return out.with_name(f"{out.name}.run")


def begin(work: Callable[[], Any], log: Path, streams: tuple[int | None, int | None] = (None, None)) -> int:
    """Fork a process that works; return its id.

    Args:
        work: what it does.
        log: the file that gets its standard output and error.
        streams: descriptors that it has instead as standard output and error; None for the log.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard, other in zip((1, 2), streams, strict=True):
            os.dup2(descriptor if other is None else other, standard)
        torch.set_num_threads(1)
        work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(child: int, limit: float = LIMIT) -> int:
    """Return the exit status of a process, negative for a signal; it is killed after the limit."""
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def begin_ranks(work: Callable[[], Any], out: Path, name: str, ranks: int) -> list[int]:
    """Fork the ranks of a run (gloo), or one process without ranks; return their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def of_rank(rank: int) -> None:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        work()

    return [
        begin(lambda rank=rank: of_rank(rank), out.with_name(f"{name}{rank}.log"))  # type: ignore[misc]
        for rank in range(ranks)
    ]


def wait_ranks(children: list[int]) -> list[int]:
    """Return the exit statuses of ranks; once one has failed the others are ended, as a launcher ends them."""
    running, statuses, end = list(children), dict.fromkeys(children, 0), time.monotonic() + LIMIT
    while running:
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.remove(child)
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    end = min(end, time.monotonic() + 5.0)
        if running and time.monotonic() > end:
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[child] for child in children]
