"""A folder of teacher states: safetensors files named by their own SHA-256, and `store.json`, which says what made them.

    store.json           teacher, processor and layer (`identity`), and with what it was made
    <sha256>.safetensors `<key>.final` [n, d_t] and `<key>.visual` [m, d_t] of some hundred rows, unpadded, in the
                         teacher's dtype; n supervised positions and m visual tokens in the order of the sequence

A file appears under its name when it is complete, so a stopped build leaves whole files and goes on behind them; the name is
the checksum, and the file's own header is the index. Files are memory-mapped: a row costs the reading of its own bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "REBUILD",
    "WRITING",
    "ShardWriter",
    "StateStore",
    "corrupt_shards",
    "differing",
    "read_store",
    "write_store",
]

STORE, WRITING, FORMAT = "store.json", "writing.partial", 1
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
                names = self._open(path).keys()
            except SafetensorError as error:
                raise ValueError(self._corrupt(path)) from error
            self._shards |= {name.removesuffix(".final"): path for name in names if name.endswith(".final")}

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, key: str) -> tuple[Tensor, Tensor | None]:
        """`final` [n, d_t] and `visual` [m, d_t] of a row; None for `visual` in a store without.

        Raises:
            KeyError: the row is not in the store.
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
            "it drops this file and writes its rows anew"
        )


def read_store(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What `store.json` says: the identity, and with what it was made; None where there is none.

    Raises:
        ValueError: unreadable, or of another version of the format.
    """
    path = folder / STORE
    if not path.is_file():
        return None
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        version, identity, made_with = written["format"], written["identity"], written["made_with"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read; remove {folder} and write it anew") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version} and this version reads {FORMAT}; remove {folder} and write it anew"
        )
    return identity, made_with


def write_store(folder: Path, identity: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Begin a store."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{STORE}.partial"
    written = {"format": FORMAT, "identity": identity, "made_with": made_with}
    partial.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / STORE)


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
    """Collects rows and writes a file whenever `shard_bytes` are full; as a context, the rest at a regular end."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._rows: dict[str, Tensor] = {}
        self._bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.flush()

    def add(self, key: str, final: Tensor, visual: Tensor | None) -> None:
        """Take a row: `final` [n, d_t], `visual` [m, d_t] or None."""
        for name, states in (("final", final), ("visual", visual)):
            if states is not None:
                self._rows[f"{key}.{name}"] = states.detach().cpu().clone(memory_format=torch.contiguous_format)
                self._bytes += states.numel() * states.element_size()
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was taken, if anything."""
        if not self._rows:
            return
        partial = self.folder / WRITING
        save_file(self._rows, partial)
        partial.replace(self.folder / f"{_sha256(partial)}.safetensors")
        self._rows, self._bytes = {}, 0
