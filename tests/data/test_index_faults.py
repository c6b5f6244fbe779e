"""The index of a dataset under checks that run at once, are killed, or cannot write: no wrong entry, no lost check."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from grace_plugin.data import ConversationCollator, load_samples, prepare
from grace_plugin.data.index import scan
from grace_plugin.data.json_samples import JsonLines
from grace_plugin.locks import HeldError, held
from tests.tiny import build

COLLATOR = ConversationCollator(build("llava")[1])
COUNT = 512  # eight chunks


class StopError(Exception):
    """Raised inside a check to stop it."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text samples of different lengths, every fifth without an answer: no entry fits another place."""
    lines = [
        {
            "id": n,
            "messages": [
                {"role": "user", "content": "one two three " * (n % 97) + "?"},
                {"role": "assistant", "content": "red" if n % 5 else " "},
            ],
        }
        for n in range(COUNT)
    ]
    path = tmp_path_factory.mktemp("set") / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def truth(path: Path) -> list[Any]:
    return [entry._replace(content="") for entry in scan(load_samples(str(path)), COLLATOR)]


def same(found: list[Any], truth: list[Any]) -> bool:
    return [entry._replace(content="") for entry in found] == truth


def test_two_checks_stopped_together__index_is_not_poisoned(
    path: Path, truth: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second check begins after the first one's second chunk and stops after two more; the first goes on for two."""
    file = tmp_path / "index.jsonl"
    said: list[str] = []

    def second(done: int, _total: int) -> None:
        if done == 4 * 64:
            raise StopError

    def first(done: int, _total: int) -> None:
        if done == 2 * 64:
            with caplog.at_level(logging.WARNING), pytest.raises(StopError):
                scan(load_samples(str(path)), COLLATOR, file=file, progress=second)
            said.extend(record.getMessage() for record in caplog.records)
        if done == 4 * 64:
            raise StopError

    with pytest.raises(StopError):
        scan(load_samples(str(path)), COLLATOR, file=file, progress=first)
    assert len(said) == 1
    assert f"{file}, is being written by process {os.getpid()} on " in said[0]
    assert len(file.read_text().splitlines()) == 4 * 64
    assert same(scan(load_samples(str(path)), COLLATOR, file=file), truth)
    assert len(file.read_text().splitlines()) == COUNT


def entries_of(file: Path) -> list[list[Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("error", ["shuffled", "doubled", "of another dataset", "no hash", "damaged", "wrong types"])
def test_index_with_wrong_lines__each_line_used_for_its_own_sample_only(
    path: Path, truth: list[Any], tmp_path: Path, error: str
) -> None:
    """Two checks without a lock (a file system that knows none) mix their lines; files are edited and copied."""
    file = tmp_path / "index.jsonl"
    scan(load_samples(str(path)), COLLATOR, file=file)
    lines = file.read_text().splitlines(keepends=True)
    mixed = list(lines)
    random.Random(0).shuffle(mixed)
    changed = {
        "shuffled": mixed,
        "doubled": lines[:64] + lines[:64] + lines[64:-64],
        "damaged": [*lines[:9], "[1, 2\n", *lines[10:]],
        "of another dataset": [line.replace('"]', '0"]') for line in lines],
        "wrong types": ["[1]\n", "7\n", *lines[2:]],
        "no hash": [json.dumps(json.loads(line)[:-1]) + "\n" for line in lines],
    }
    file.write_text("".join(changed[error]))
    assert same(scan(load_samples(str(path)), COLLATOR, file=file), truth)
    assert [entry[:3] for entry in entries_of(file)] == [list(entry[:3]) for entry in truth]


def test_index_of_a_file_written_over_with_the_same_size_and_time__its_samples_are_inspected_again(
    tmp_path: Path,
) -> None:
    file, samples = tmp_path / "index.jsonl", tmp_path / "samples.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "red"}]})
    samples.write_text(line)
    stat = samples.stat()
    [before] = scan(load_samples(str(samples)), COLLATOR, file=file)
    samples.write_text(line.replace('"red"', '"   "'))
    os.utime(samples, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    [after] = scan(load_samples(str(samples)), COLLATOR, file=file)
    assert (before.reason, after.reason) == ("", "empty_conversation")


def _check(path: Path, file: Path) -> None:
    """A check in a process of its own, slowed so that it can be killed in its middle."""
    scan(load_samples(str(path)), COLLATOR, file=file, progress=lambda _done, _total: time.sleep(0.02))


@pytest.mark.slow
def test_two_processes_killed_together__five_times__final_check_is_right(
    path: Path, truth: list[Any], tmp_path: Path
) -> None:
    draw, fork = random.Random(0), multiprocessing.get_context("fork")
    file = tmp_path / "index.jsonl"
    for _ in range(5):
        started = [fork.Process(target=_check, args=(path, file)) for _ in range(2)]
        for process in started:
            process.start()
        time.sleep(draw.uniform(0.02, 0.25))
        for process in started:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        if file.exists():
            whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            found = [json.loads(line)[:3] for line in whole]
            assert found == [list(entry[:3]) for entry in truth[: len(found)]]
    assert same(scan(load_samples(str(path)), COLLATOR, file=file), truth)


@pytest.mark.parametrize("where", ["read-only folder", "a file as folder", "index is a folder"])
def test_index_that_cannot_be_written__said_once_and_the_check_goes_on(
    path: Path, truth: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    cache = tmp_path / "cache"
    if where == "read-only folder":
        cache = Path("/proc/none")  # cannot be written by the superuser either
    elif where == "a file as folder":
        cache.write_text("")
    with caplog.at_level(logging.WARNING):
        if where == "index is a folder":
            (cache / "index.jsonl").mkdir(parents=True)
            entries = scan(load_samples(str(path)), COLLATOR, file=cache / "index.jsonl")
        else:
            entries = prepare(load_samples(str(path)), COLLATOR, cache=cache, max_bad_samples=1.0).entries
    assert same(entries, truth)
    said = [record.getMessage() for record in caplog.records if "the index of this dataset" in record.getMessage()]
    assert len(said) == 1
    assert "goes on without it. Free space there, or name another folder in $GRACE_CACHE" in said[0]


def _check_with_little_space(path: Path, file: Path, log: Path) -> None:
    logging.basicConfig(filename=log, level=logging.WARNING, force=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    raise SystemExit(0 if len(scan(load_samples(str(path)), COLLATOR, file=file)) == COUNT else 1)


def test_index_on_a_disk_that_fills__whole_lines_stay_usable(path: Path, truth: list[Any], tmp_path: Path) -> None:
    """Under a limit of file size the kernel cuts a write short, as a disk does that fills."""
    file, log = tmp_path / "index.jsonl", tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=_check_with_little_space, args=(path, file, log))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert log.read_text().count("the index of this dataset") == 1
    assert "File too large" in log.read_text()
    assert file.stat().st_size == 20_000
    assert not file.read_bytes().endswith(b"\n")
    assert same(scan(load_samples(str(path)), COLLATOR, file=file), truth)
    assert [entry[:3] for entry in entries_of(file)] == [list(entry[:3]) for entry in truth]


def test_lock__held_in_a_block__names_its_holder_and_is_free_after_it(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    with held(lock):
        with pytest.raises(HeldError, match=rf"^process {os.getpid()} on \S+ since 20\d\d-"), held(lock):
            pass
        lock.write_text("{}")
        with pytest.raises(HeldError, match=r"^another process$"), held(lock):
            pass
    with held(lock):
        pass
    with pytest.raises(OSError, match="none"), held(Path("/proc/none/a.lock")):
        pass


def test_lock__holder_is_killed__free(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    fork = multiprocessing.get_context("fork")

    def hold() -> None:
        with held(lock):
            time.sleep(60)

    process = fork.Process(target=hold)
    process.start()
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    with pytest.raises(HeldError, match=f"^process {process.pid} on "), held(lock):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with held(lock):
        pass


def test_index__entries_known__file_is_not_parsed_again(path: Path, tmp_path: Path) -> None:
    """What a second check costs: the hash of each line, and no sample is read as JSON."""
    copy, file = tmp_path / "samples.jsonl", tmp_path / "index.jsonl"
    shutil.copy(path, copy)
    scan(load_samples(str(copy)), COLLATOR, file=file)
    given = load_samples(str(copy))

    class Unread(JsonLines):
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("a sample was parsed")

    assert isinstance(given.sets[0].samples, JsonLines)
    given.sets[0].samples.__class__ = Unread
    assert len(scan(given, COLLATOR, file=file)) == COUNT
