"""A teacher cache is written by one process, is never half there, and belongs to every byte of its teacher."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import grace_plugin
from grace_plugin.digest import file_digests
from grace_plugin.teacher import StateStore, open_store
from grace_plugin.teacher.checkpoint import open_checkpoint
from grace_plugin.teacher.store import ShardWriter, build_lock, write_store
from tests.pairs import Pair, mixed_samples
from tests.teacher.caches import asked, build, everything
from tests.tiny import make_samples

SMALL = {"batch_size": 1, "shard_bytes": 100_000}
HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from locks import held
with held(Path(sys.argv[1]) / ".build.lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(llava: Pair, tmp_path: Path) -> Path:
    """A cache of four samples in several files."""
    build(llava, tmp_path / "cache", mixed_samples(4), **SMALL)
    return tmp_path / "cache"


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new folder of remembered digests."""
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path / "digests"))
    return tmp_path / "digests" / "sha256"


def test_fingerprint__one_weight_negated__other_teacher(llava: Pair, tmp_path: Path, remembered: Path) -> None:
    """Sixteen pieces of 64 KiB were read before: here each of 1.85 million weights outside of them has another sign."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for name in ("config.json",):
        (folder / name).write_bytes((llava.teacher / name).read_bytes())
    weights = {"lm_head.weight": torch.randn(2_500_000, generator=torch.Generator().manual_seed(0))}
    save_file(weights, folder / "model.safetensors")
    before, size = open_checkpoint(str(folder)).fingerprint(), (folder / "model.safetensors").stat().st_size
    content = bytearray((folder / "model.safetensors").read_bytes())
    signs = np.arange(size - 4 * 2_500_000 + 3, size, 4)  # the byte of each weight that holds its sign
    sampled = [place * (size - 65536) // 15 for place in range(16)]
    outside = np.all([(signs < place) | (signs >= place + 65536) for place in sampled], axis=0)
    np.frombuffer(content, dtype=np.uint8)[signs[outside][:1_850_000]] ^= 0x80
    (folder / "model.safetensors").write_bytes(content)
    after = open_checkpoint(str(folder)).fingerprint()
    assert before["config.json"] == after["config.json"]
    assert before["model.safetensors"] != after["model.safetensors"]


def test_file_digests__file_changed__computed_again(tmp_path: Path, remembered: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"1" * 1000)
    first = file_digests({"a": file})
    assert not [note for note in remembered.iterdir() if len(note.name) == 64], (
        "written just now: its times may not move yet"
    )
    time.sleep(2.1)
    assert file_digests({"a": file}) == first
    (note,) = [note for note in remembered.iterdir() if len(note.name) == 64]
    assert note.read_text() == first["a"]
    note.write_text("0" * 64)
    assert file_digests({"a": file}) == {"a": "0" * 64}, "read from the note"
    note.write_text("torn")
    assert file_digests({"a": file}) == first
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    note.write_text(first["a"])
    with file.open("r+b") as out:
        out.write(b"2")
    os.utime(file, ns=times)
    assert file.stat().st_mtime_ns == times[1]
    assert file_digests({"a": file}) != first, "content with its old size and time"


def test_file_digests__no_writable_cache__computed_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path / "file"))
    assert file_digests({"f": tmp_path / "file"}) == {
        "f": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    }


def test_read_store__earlier_format__refused(llava: Pair, store: Path) -> None:
    written = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(written | {"format": 1}))
    said = (
        r"has format 1, which knew its teacher by samples of its files alone, and this version reads 2; remove .*cache"
    )
    with pytest.raises(ValueError, match=said):
        open_store(asked(llava, store), visual=True)
    with pytest.raises(ValueError, match=said):
        build(llava, store, mixed_samples(4))


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that builds into the folder, for as long as its input is open."""
    package = Path(grace_plugin.__file__).parent
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(package)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def test_build_lock__other_process__named(llava: Pair, store: Path) -> None:
    other, before = hold(store), everything(store)
    try:
        said = rf"cache is being written by process {other.pid} on .* since .*; wait until it has ended, or end it"
        with pytest.raises(ValueError, match=said):
            build(llava, store, mixed_samples(6), **SMALL)
        assert everything(store).keys() == before.keys()
        assert len(open_store(asked(llava, store), visual=True)) == 4, "training reads what is there"
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    more = build(llava, store, mixed_samples(6), **SMALL)
    assert (more.samples, len(StateStore(store))) == (6, 6)


def test_build_cache__two_processes__one_whole_cache(llava: Pair, tmp_path: Path) -> None:
    """In two processes: transformers' loading is not safe for two threads, and leaves the second a model without weights."""
    folder = tmp_path / "cache"

    def one() -> str:
        try:
            return str(build(llava, folder, mixed_samples(8), **SMALL).samples)
        except ValueError as error:
            return str(error)

    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(into, one().encode())
        finally:
            os._exit(0)
    ends = [one(), os.read(out, 65536).decode()]
    os.waitpid(child, 0)
    os.close(out)
    os.close(into)
    refused = [end for end in ends if end != "8"]
    assert len(refused) <= 1
    # "another process" in the moment between taking the lock and writing its owner's name into it
    owner = rf"(process ({os.getpid()}|{child}) on |another process)"
    assert all(re.search(f"is being written by {owner}", end) for end in refused), ends
    assert len(open_store(asked(llava, folder), visual=True)) == 8
    assert not list(folder.glob("*.partial"))


def test_build_lock__exception_before_writing__folder_unchanged(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with build_lock(folder):
            raise KeyError(str((folder / ".build.lock").exists()))

    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(KeyError, match="True"):
            fail(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"format": 2}', '{"format": 2, "identity": 1, "made_with": {}}', None]
)
def test_restore_store__cut_or_lost__restored_from_headers(llava: Pair, store: Path, damage: str | None) -> None:
    file, before, states = store / "store.json", (store / "store.json").read_text(), everything(store)
    if damage is None:
        file.unlink()
    else:
        file.write_text(damage)
    said = (
        r"store\.json (cannot be read|is missing where states are); run `grace teacher cache .*` again: it restores it"
    )
    with pytest.raises(ValueError, match=said):
        open_store(asked(llava, store), visual=True)
    again = build(llava, store, mixed_samples(4), **SMALL)
    assert (again.stored, again.tokens) == (4, 0), "no sample is run again"
    assert file.read_text() == before
    assert len(open_store(asked(llava, store), visual=True)) == 4
    assert everything(store).keys() == states.keys()


def test_build_cache__leftover_files__removed(llava: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("store.json.partial", "writing-17.partial", ".build.lock"):
        (folder / name).write_text("half")
    build(llava, folder, make_samples(1))
    assert not list(folder.glob("*.partial"))
    assert len(open_store(asked(llava, folder), visual=True)) == 1


def test_build_cache__store_file_of_another_program__left_alone(llava: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "store.json").write_text("not ours")
    (folder / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"cache holds something else than a teacher cache"):
        build(llava, folder, make_samples(1))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"store.json": "not ours", "notes": "mine"}


def test_state_store__foreign_shard__named(llava: Pair, store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_store(other, {"teacher": {"commit": "x"}, "processor": {}, "visual": True}, {"teacher": "t"})
    with ShardWriter(other, 1) as writer:
        writer.add("k", torch.zeros(1, 4), torch.zeros(1, 4))
    (file,) = other.glob("*.safetensors")
    (store / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=rf"{file.name} was written for another teacher or processor than store\.json"):
        open_store(asked(llava, store), visual=True)
    (store / "store.json").unlink()
    with pytest.raises(ValueError, match=r"the states' headers do not say one thing; give a new folder"):
        build(llava, store, mixed_samples(4))


def test_shard_writer__full_disk__written_files_kept(llava: Pair, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        folder = disk / "cache"

        def fill(what: str, done: int, of: int) -> None:
            if what == "running the teacher" and done == 3:  # another process writes to that disk
                with (disk / "other").open("wb", buffering=0) as out, suppress(OSError):
                    while True:
                        out.write(b"\0" * 65536)

        with pytest.raises(
            RuntimeError, match=r"the states cannot be written to .*No space left.*those written before stay"
        ):
            build(llava, folder, mixed_samples(6), batch_size=1, shard_bytes=1, progress=fill)
        assert len(open_store(asked(llava, folder), visual=True)) == 3
        assert not list(folder.glob("*.partial"))
        (disk / "other").unlink()
        again = build(llava, folder, mixed_samples(6), batch_size=1, shard_bytes=1)
        assert (again.stored, len(StateStore(folder))) == (3, 6)
        del again
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_build_cache__file_as_folder__refused(llava: Pair, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    with pytest.raises(ValueError, match=r"cache is a file; give a new folder"):
        build(llava, tmp_path / "cache", make_samples(1))


def test_shard_writer__headers__repeat_store_json(store: Path) -> None:
    from safetensors import safe_open

    for path in store.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()["grace_store"]) == json.loads((store / "store.json").read_text())
        assert load_file(path)
