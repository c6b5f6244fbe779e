"""The files of a teacher cache.

    store.json           `identity` (teacher, processor, layer), and the versions it was made with
    <sha256>.safetensors `<key>.final` [n, d_t] and `<key>.visual` [m, d_t] of some hundred samples, unpadded, in the teacher's
                         dtype; n supervised positions and m visual tokens in the order of the sequence. The header repeats
                         the content of `store.json`
    .build.lock          held by the process that writes here, which it names

A file is written under a temporary name, synced to disk and renamed, so a file under its own name is complete and a stopped
build can continue. The name is the checksum and the file's header is the index; a `store.json` that was lost or cut is restored
from the headers. Files are memory-mapped, so a sample costs the reading of its own bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grace_plugin.digest import file_digest
from grace_plugin.locks import HeldError, held

__all__ = [
    "REBUILD",
    "ShardWriter",
    "StateStore",
    "build_lock",
    "check_folder",
    "differences",
    "drop_damaged",
    "holds_states",
    "read_store",
    "restore_store",
    "write_store",
]

STORE, PARTIAL, FORMAT = "store.json", ".partial", 2
_LOCK, _HEADER = ".build.lock", "grace_store"
REBUILD = "`grace teacher cache RECIPE --model STUDENT --dataset DATASET --output_dir {folder}`"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differences(written: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Describe every value in which two identities differ, with both values.

    Weights files that only one side has are ignored: a checkpoint without some of them can still serve a cache.
    """
    left, right = dict(_flat(written)), dict(_flat(asked))
    ignored = {key for key in left.keys() ^ right.keys() if key.endswith(".safetensors")}
    keys = [key for key in [*left, *(key for key in right if key not in left)] if key not in ignored]
    return "; ".join(
        f"{key}: {left.get(key)!r} / {right.get(key)!r}" for key in keys if left.get(key) != right.get(key)
    )


class StateStore:
    """A cache opened for reading.

    Args:
        folder: written by `build_cache`.

    Raises:
        ValueError: no cache there, or a file of it that cannot be read; says how to build it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        written = read_store(self.folder)
        if written is None:
            raise ValueError(f"no teacher cache at {folder}; write it with {REBUILD.format(folder=folder)}")
        self.identity, self.made_with = written
        # Each open file is a memory map and a file descriptor; the limit of descriptors is often 1024.
        self._open = lru_cache(maxsize=128)(lambda path: safe_open(path, framework="pt"))
        self._shards: dict[str, Path] = {}
        for path in shards_of(self.folder):
            try:
                file = self._open(path)
                names, header = file.keys(), _header(file)
            except (SafetensorError, ValueError) as error:
                raise ValueError(self._corrupt(path)) from error
            if header is None or header["identity"] != self.identity:
                raise ValueError(
                    f"{path} was written for another teacher or processor than {STORE} next to it says; move it elsewhere"
                )
            self._shards |= {name.removesuffix(".final"): path for name in names if name.endswith(".final")}

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, key: str) -> tuple[Tensor, Tensor | None]:
        """Read `final` [n, d_t] and `visual` [m, d_t] of a sample; `visual` is None in a cache without them.

        Raises:
            KeyError: the sample is not in the cache.
        """
        file = self._open(self._shards[key])
        return file.get_tensor(f"{key}.final"), file.get_tensor(f"{key}.visual") if self.identity["visual"] else None

    def check(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            ValueError: names every damaged file and how to fix it.
        """
        bad = corrupt_shards(self.folder)
        if bad:
            raise ValueError("; ".join(self._corrupt(path) for path in bad))

    def _corrupt(self, path: Path) -> str:
        return (
            f"{path} is not what was written (its SHA-256 is not its name); run {REBUILD.format(folder=self.folder)} again: "
            "it drops this file and writes its samples again"
        )


def read_store(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the identity and the versions of `store.json`; None if the folder has no cache.

    Raises:
        ValueError: unreadable, missing next to states, or of another version of the format.
    """
    path, again = folder / STORE, REBUILD.format(folder=folder)
    if not path.is_file():
        if shards_of(folder):
            raise ValueError(
                f"{path} is missing where states are; run {again} again: it restores it from their headers"
            )
        return None
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        version, identity, made_with = written["format"], written["identity"], written["made_with"]
        whole = isinstance(identity, dict) and isinstance(made_with, dict)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read; run {again} again: it restores it from the states' headers"
        ) from error
    if version != FORMAT:
        older = ", which knew its teacher by samples of its files alone" if version == 1 else ""
        raise ValueError(
            f"{path} has format {version}{older}, and this version reads {FORMAT}; remove {folder} and write it again, with "
            f"{again}"
        )
    if not whole:
        raise ValueError(f"{path} cannot be read; run {again} again: it restores it from the states' headers")
    return identity, made_with


def restore_store(folder: Path) -> bool:
    """Restore a missing or cut `store.json` from the headers of the states; returns whether that was needed.

    Without states, a cut one is removed. Call it inside `build_lock`.

    Raises:
        ValueError: the headers contradict each other or hold nothing.
    """
    try:
        if read_store(folder) is not None or not shards_of(folder):
            return False
    except ValueError:
        written = _format(folder / STORE)
        if written is not None and written != FORMAT:
            raise  # readable, but of another version of the format
    headers: list[Any] = []
    # The newest header wins: `made_with` may differ between builds of one cache, the identity may not.
    for path in sorted(shards_of(folder), key=lambda path: path.stat().st_mtime_ns):
        with suppress(SafetensorError, ValueError), safe_open(path, framework="pt") as file:
            headers.append(_header(file))
    if any(header is None or header["identity"] != headers[0]["identity"] for header in headers):
        raise ValueError(
            f"{folder / STORE} cannot be read and the states' headers do not say one thing; give a new folder"
        )
    if not headers and foreign_files(folder):
        raise ValueError(f"{folder} holds something else than a teacher cache; give a new folder")
    (folder / STORE).unlink(missing_ok=True)
    if headers:
        _write_whole(folder / STORE, json.dumps(headers[-1], indent=1) + "\n")
    return True


def _header(file: Any) -> dict[str, Any] | None:
    """Return the content of `store.json` that an opened file repeats, or None."""
    content = json.loads((file.metadata() or {}).get(_HEADER, "null"))
    return content if isinstance(content, dict) and {"format", "identity", "made_with"} <= content.keys() else None


def _format(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _described(identity: Mapping[str, Any], made_with: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "identity": identity, "made_with": made_with}, indent=1) + "\n"


def write_store(folder: Path, identity: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Write `store.json` of a new cache."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / STORE, _described(identity, made_with))


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    """Rename a file to its final name durably."""
    # Content first, then the directory entry: after a power failure a file under its final name is complete.
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds_states(folder: Path) -> bool:
    """Return whether a build has written to the folder."""
    return folder.is_dir() and ((folder / STORE).exists() or bool(shards_of(folder)))


def partial_files(folder: Path) -> list[Path]:
    """Return files that a build was writing when it was stopped."""
    return sorted(folder.glob(f"*{PARTIAL}"))


def foreign_files(folder: Path) -> list[Path]:
    """Return the files of a folder that no build has written."""
    ours = {*shards_of(folder), *partial_files(folder), *(folder / name for name in (STORE, _LOCK))}
    return sorted(path for path in folder.iterdir() if path not in ours) if folder.exists() else []


@contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for one writing process; the folder is created if it is missing.

    Raises:
        ValueError: another process is writing there; names it and says what to do.
    """
    made, lock, ended = not folder.exists(), folder / _LOCK, False
    fresh = not lock.exists()
    with ExitStack() as stack:
        try:
            stack.enter_context(held(lock))
        except HeldError as error:
            raise ValueError(
                f"{folder} is being written by {error}; wait until it has ended, or end it, and run the command again: it goes "
                "on with the states that are there. Another folder can be written at the same time"
            ) from None
        try:
            yield
            ended = True
        finally:
            if fresh and not ended:  # a build that was refused leaves the disk as it was
                lock.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def shards_of(folder: Path) -> list[Path]:
    """Return the complete files of a cache, sorted; their names are 64 hexadecimal digits."""
    return sorted(path for path in folder.glob("*.safetensors") if len(path.stem) == 64)


def corrupt_shards(folder: Path) -> list[Path]:
    """Return the files whose content does not have the checksum that is their name."""
    shards = shards_of(folder)
    # hashlib releases the interpreter's lock, so threads read and hash in parallel
    with ThreadPoolExecutor() as pool:
        return [path for path, found in zip(shards, pool.map(file_digest, shards), strict=True) if found != path.stem]


def check_folder(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Refuse a folder that is neither new nor empty nor of the same identity; returns whether it keeps visual tokens.

    Raises:
        ValueError: names what differs, with both values.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder")
    written = read_store(folder)
    if written is None:
        foreign = foreign_files(folder)
        if foreign:
            raise ValueError(
                f"{folder} holds something else than a teacher cache ({foreign[0].name[:100]}); give a new folder"
            )
        return bool(identity["visual"])
    visual = bool(identity["visual"] or written[0]["visual"])
    different = differences(written[0], {**identity, "visual": visual})
    if different:
        raise ValueError(
            f"{folder} holds states written otherwise (there / asked for): {different}; give a new folder, or ask for the same"
        )
    return visual


def drop_damaged(folder: Path) -> tuple[str, ...]:
    """Remove partial files and damaged files; returns the names of the latter."""
    damaged = corrupt_shards(folder)
    for path in (*damaged, *partial_files(folder)):
        path.unlink(missing_ok=True)
    return tuple(path.name for path in damaged)


class ShardWriter:
    """Collects states of samples and writes a file whenever they reach `shard_bytes`; as a context, the rest at its end.

    The folder must hold a `store.json`, which every file repeats in its header. `visual`: whether visual tokens are kept.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        header = (folder / STORE).read_text(encoding="utf-8")
        self.visual = bool(json.loads(header)["identity"]["visual"])
        self._header = {_HEADER: header}
        self._states: dict[str, Tensor] = {}
        self._bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.flush()

    def add(self, key: str, final: Tensor, visual: Tensor | None) -> None:
        """Add a sample: `final` [n, d_t], `visual` [m, d_t] or None."""
        for name, states in (("final", final), ("visual", visual)):
            if states is not None:
                # A copy: a slice of the batch's states would keep the whole batch in memory and in the file.
                self._states[f"{key}.{name}"] = states.detach().cpu().clone(memory_format=torch.contiguous_format)
                self._bytes += states.numel() * states.element_size()
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the collected states, if any.

        Raises:
            RuntimeError: they cannot be written; files written before stay.
        """
        if not self._states:
            return
        # The name is the checksum of the content, so the file is written under another name first.
        partial = self.folder / f"writing-{os.getpid()}{PARTIAL}"
        try:
            save_file(self._states, partial, self._header)
            _publish(partial, self.folder / f"{file_digest(partial)}.safetensors")
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise RuntimeError(
                f"the states cannot be written to {self.folder} ({error}); those written before stay: free some space, and run "
                "the command again to go on after them"
            ) from error
        self._states, self._bytes = {}, 0
