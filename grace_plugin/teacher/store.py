"""A folder of teacher states: safetensors files named by their own SHA-256, and `store.json`, which says what made them.

    store.json           teacher, processor and layer (`identity`), and with what it was made
    <sha256>.safetensors `<key>.final` [n, d_t] and `<key>.visual` [m, d_t] of some hundred samples, unpadded, in the
                         teacher's dtype; n supervised positions and m visual tokens in the order of the sequence; what
                         `store.json` says is in its header too
    .build.lock          held by the one process that writes here, which it names

A file is written aside, brought to the disk and renamed, so under its name it is complete: a stopped build leaves whole files
and goes on after them. The name is the checksum, and the file's own header is the index; a `store.json` that was lost or cut is
restored from the headers. Files are memory-mapped: a sample costs the reading of its own bytes.
"""

from __future__ import annotations

import hashlib
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

from grace_plugin.locks import HeldError, held

__all__ = [
    "REBUILD",
    "ShardWriter",
    "StateStore",
    "building",
    "corrupt_shards",
    "differing",
    "foreign_files",
    "holds_states",
    "leftovers",
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


def differing(written: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Every value that two identities do not share, with both; weights files that only one side has are passed over."""
    left, right = dict(_flat(written)), dict(_flat(asked))
    spared = {key for key in left.keys() ^ right.keys() if key.endswith(".safetensors")}
    keys = [key for key in [*left, *(key for key in right if key not in left)] if key not in spared]
    return "; ".join(
        f"{key}: {left.get(key)!r} / {right.get(key)!r}" for key in keys if left.get(key) != right.get(key)
    )


class StateStore:
    """A store opened for reading.

    Args:
        folder: written by `build_cache`.

    Raises:
        ValueError: no store there, or a file of it that cannot be read; says how to build it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        written = read_store(self.folder)
        if written is None:
            raise ValueError(f"no teacher cache at {folder}; write it with {REBUILD.format(folder=folder)}")
        self.identity, self.made_with = written
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
        """`final` [n, d_t] and `visual` [m, d_t] of a sample; None for `visual` in a store without.

        Raises:
            KeyError: the sample is not in the store.
        """
        file = self._open(self._shards[key])
        return file.get_tensor(f"{key}.final"), file.get_tensor(f"{key}.visual") if self.identity["visual"] else None

    def check(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            ValueError: names every file that is not what was written, and the way out.
        """
        bad = corrupt_shards(self.folder)
        if bad:
            raise ValueError("; ".join(self._corrupt(path) for path in bad))

    def _corrupt(self, path: Path) -> str:
        return (
            f"{path} is not what was written (its SHA-256 is not its name); run {REBUILD.format(folder=self.folder)} again: "
            "it drops this file and writes its samples anew"
        )


def read_store(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What `store.json` says: the identity, and with what it was made; None where there is no store.

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
    """Write a `store.json` that is missing or cut again, from the headers of the states; returns whether that was needed.

    Where no states are, a cut one is removed. Call it inside `building`.

    Raises:
        ValueError: the headers do not say one thing, or say nothing.
    """
    try:
        if read_store(folder) is not None or not shards_of(folder):
            return False
    except ValueError:
        written = _format(folder / STORE)
        if written is not None and written != FORMAT:
            raise  # it can be read, and is another version's
    headers: list[Any] = []
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
    """What an opened file says of its store."""
    said = json.loads((file.metadata() or {}).get(_HEADER, "null"))
    return said if isinstance(said, dict) and {"format", "identity", "made_with"} <= said.keys() else None


def _format(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _described(identity: Mapping[str, Any], made_with: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "identity": identity, "made_with": made_with}, indent=1) + "\n"


def write_store(folder: Path, identity: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Begin a store."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / STORE, _described(identity, made_with))


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    """Rename a file to its name once its content is on the disk, and see the name there too."""
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
    """Whether a build has written to the folder."""
    return folder.is_dir() and ((folder / STORE).exists() or bool(shards_of(folder)))


def leftovers(folder: Path) -> list[Path]:
    """Files that a build was writing when it was stopped."""
    return sorted(folder.glob(f"*{PARTIAL}"))


def foreign_files(folder: Path) -> list[Path]:
    """What is in a folder and no build has put there."""
    own = {*shards_of(folder), *leftovers(folder), *(folder / name for name in (STORE, _LOCK))}
    return sorted(path for path in folder.iterdir() if path not in own) if folder.exists() else []


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Inside, this process alone writes to the folder, which is made where it is missing.

    Raises:
        ValueError: another process is writing there; says which, since when, and what to do.
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
            if fresh and not ended:  # nothing may have been written: leave nothing
                lock.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def shards_of(folder: Path) -> list[Path]:
    """The store's complete files, sorted; a file of another kind of name is not the store's."""
    return sorted(path for path in folder.glob("*.safetensors") if len(path.stem) == 64)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corrupt_shards(folder: Path) -> list[Path]:
    """Files whose content is not what their name says."""
    shards = shards_of(folder)
    with ThreadPoolExecutor() as pool:
        return [path for path, found in zip(shards, pool.map(_sha256, shards), strict=True) if found != path.stem]


class ShardWriter:
    """Collects samples and writes a file whenever `shard_bytes` are full; as a context, the rest at a regular end.

    Its folder holds a `store.json`, which every file repeats in its header. `visual`: whether it keeps visual tokens.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        header = (folder / STORE).read_text(encoding="utf-8")
        self.visual = bool(json.loads(header)["identity"]["visual"])
        self._header = {_HEADER: header}
        self._samples: dict[str, Tensor] = {}
        self._bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.flush()

    def add(self, key: str, final: Tensor, visual: Tensor | None) -> None:
        """Take a sample: `final` [n, d_t], `visual` [m, d_t] or None."""
        for name, states in (("final", final), ("visual", visual)):
            if states is not None:
                self._samples[f"{key}.{name}"] = states.detach().cpu().clone(memory_format=torch.contiguous_format)
                self._bytes += states.numel() * states.element_size()
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was taken, if anything.

        Raises:
            RuntimeError: it cannot be written; what was written before stays.
        """
        if not self._samples:
            return
        partial = self.folder / f"writing-{os.getpid()}{PARTIAL}"
        try:
            save_file(self._samples, partial, self._header)
            _publish(partial, self.folder / f"{_sha256(partial)}.safetensors")
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise RuntimeError(
                f"the states cannot be written to {self.folder} ({error}); those written before stay: free some space, and run "
                "the command again to go on after them"
            ) from error
        self._samples, self._bytes = {}, 0
