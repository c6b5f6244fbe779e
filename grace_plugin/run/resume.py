"""Resume states on disk: written to a partial folder, hashed into a manifest, and published by one rename.

    checkpoint-N.partial    while it is written; the next save removes it
    checkpoint-N            complete: every file is on disk, and `manifest.json`, written last, has its size and SHA-256, one
                            for every 256 MiB
    checkpoint-N.old        an earlier state of the same step while it is replaced
    checkpoint.reserved     space of the first state, while the run has none

A process or machine that stops at any moment leaves the states before it complete, because a state is removed only after a
newer one is published. Not promised: file systems that reorder a rename before an fsync, and files changed by others.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from grace_plugin.export.record import read_sealed, write_sealed

__all__ = [
    "MANIFEST",
    "damage",
    "disk_is_full",
    "is_disk_error",
    "manifest_facts",
    "nearest_folder",
    "newest_whole",
    "publish",
    "release_space",
    "remove_leftovers",
    "remove_state",
    "reserve_space",
    "rotate",
    "state_bytes",
    "states",
]

MANIFEST = "manifest.json"
_PARTIAL, _OLD, _RESERVED = ".partial", ".old", "checkpoint.reserved"
_NAME = re.compile(r"checkpoint-(\d+)(\.old)?")
_PIECE, _BLOCK = 2**28, 2**22  # bytes of a hash, and of a read
_MARGIN = 2**20  # bytes that small files and the folder itself may take
_DISK_ERRORS = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EIO EROFS ESTALE EACCES EPERM".split() if hasattr(errno, name)
}


# ---- writing --------------------------------------------------------------------------------------------------------------


def _sync(path: Path) -> int:
    """Put a file, or the names in a folder, on disk; returns its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder, and have its names on disk anyway
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
    return size


def _digests(sizes: Mapping[Path, int]) -> dict[Path, list[str]]:
    """Return the SHA-256 of every 256 MiB of each file; where one cannot be read, the error instead."""
    # pieces, because one thread hashes a file of 28 GB in 20 seconds and more; hashlib and reads release the GIL
    pieces = [(path, start) for path, size in sizes.items() for start in range(0, max(size, 1), _PIECE)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = list(pool.map(_piece_digest, pieces))
    return {path: [digest for (of, _), digest in zip(pieces, found, strict=True) if of == path] for path in sizes}


def _piece_digest(piece: tuple[Path, int]) -> str:
    path, start = piece
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(start)
            left = _PIECE
            while left and (block := file.read(min(left, _BLOCK))):
                found.update(block)
                left -= len(block)
    except OSError as error:
        return str(error)
    return found.hexdigest()


def publish(partial: Path, final: Path, **facts: Any) -> None:
    """Make a written folder a complete resume state: sync, manifest, rename.

    Args:
        partial: the folder as it was written.
        final: its name from here on; a state of that name is replaced.
        facts: further plain values of the manifest, such as the step.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path != partial / MANIFEST)
    with ThreadPoolExecutor(1) as pool:  # the disk writes while the hashes are made
        synced = pool.map(_sync, files)
        digests = _digests({file: file.stat().st_size for file in files})
        entries = {
            file.relative_to(partial).as_posix(): {"bytes": size, "sha256": digests[file]}
            for file, size in zip(files, synced, strict=True)
        }
    write_sealed(partial / MANIFEST, {"format": 1, **facts, "files": entries})
    _sync(partial / MANIFEST)
    _sync(partial)
    old = final.with_name(final.name + _OLD)
    if final.exists():  # os.rename does not replace a folder that is not empty
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    if old.exists():
        remove_state(old)


def remove_state(folder: Path) -> None:
    """Remove a resume state; when the process stops halfway, the rest is a partial folder and no damaged state."""
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the partial folders of stopped saves and removals."""
    for path in folder.glob(f"checkpoint-*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, newest: Path, limit: int | None, protected: str | None = None) -> None:
    """Remove older states, now that a newer one is published.

    Args:
        folder: the run folder.
        newest: the state just published; it is kept whatever the limit.
        limit: states to keep (`save_total_limit`); None or 0 for all. Damaged ones do not count, and are removed first.
        protected: a state that is kept in addition, such as the best one.
    """
    if not limit or limit < 1:
        return
    others = [state for state in states(folder) if state != newest and str(state) != protected]
    damaged = [state for state in others if damage(state, hashes=False)]
    complete = [state for state in others if state not in damaged]
    kept = max(0, limit - 1 - (protected is not None and protected != str(newest)))
    for state in [*damaged, *complete[kept:]]:
        remove_state(state)


# ---- reading --------------------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        ValueError: there is none, or not the one that was written; a short reason.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"no {MANIFEST}: its save did not end, or an earlier version wrote it")
    try:
        return read_sealed(folder / MANIFEST)
    except ValueError:
        raise ValueError(f"{MANIFEST} is damaged") from None


def manifest_facts(folder: Path) -> dict[str, Any]:
    """Return the values of a manifest that are not about files: step, max_steps, ended, automatic.

    Raises:
        ValueError: no readable manifest.
    """
    return {key: value for key, value in _manifest(folder).items() if key not in ("files", "sha256")}


def damage(folder: Path, *, hashes: bool = True) -> str:
    """Return why a folder is no complete resume state, "" for a complete one.

    Args:
        folder: checkpoint-N.
        hashes: read every file; without, only names and sizes are compared.
    """
    try:
        entries: dict[str, Any] = _manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {entry['bytes']} were written"
    found = _digests({folder / name: entry["bytes"] for name, entry in entries.items()}) if hashes else {}
    for name, entry in entries.items():
        if hashes and found[folder / name] != entry["sha256"]:
            return f"{name} is not what was written (another SHA-256)"
    return ""


def states(folder: Path) -> list[Path]:
    """Return the folders that are named as resume states, newest first; complete or not."""
    found = [(match, path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    ordered = sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][2] is None), reverse=True)
    return [path for _, path in ordered if path.is_dir()]


def newest_whole(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest complete resume state of a run folder, and by its name the damage of each newer one."""
    damaged: dict[str, str] = {}
    for state in states(folder):
        reason = damage(state)
        if not reason:
            return state, damaged
        damaged[state.name] = reason
    return None, damaged


# ---- space ----------------------------------------------------------------------------------------------------------------


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def state_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, optimizer_name: str | None = None
) -> int:
    """Return the bytes of a resume state: parameters, buffers and optimizer states.

    Args:
        model: the student.
        optimizer: whose states are counted, where it has any.
        optimizer_name: TrainingArguments' `optim`, for states that are not there yet, counted as Adam's; None for none.
    """
    size = _tensor_bytes([*model.parameters(), *model.buffers()])
    held = _tensor_bytes(dict(optimizer.state)) if optimizer is not None else 0
    if not held and optimizer_name is not None:
        width = 1 if "8bit" in optimizer_name else 4
        held = 2 * width * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return size + held + _MARGIN


def nearest_folder(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def disk_is_full(folder: Path, needed: int) -> str:
    """Return a sentence part that says how much to free where `needed` bytes do not fit, "" where they do."""
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free >= needed:
        return ""
    return f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; free {(needed - free) / 1e6:,.1f} MB"


def reserve_space(folder: Path, size: int) -> None:
    """Hold `size` bytes of a disk for the first resume state; without effect where the file system cannot.

    A run that has no state yet loses everything when another program fills the disk. `release_space` gives the bytes back.
    """
    # not os.posix_fallocate: where a file system knows no fallocate (NFS 3), glibc writes a byte into every block instead
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None:
        return
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _RESERVED).open("wb") as file:
            done = allocate(file.fileno(), 0, 0, size) == 0
    except OSError:  # the first state will say what is wrong with the disk
        done = False
    if not done:
        release_space(folder)


def release_space(folder: Path) -> bool:
    """Give back what `reserve_space` holds, also what a killed run has left; returns whether there was anything."""
    found = (folder / _RESERVED).exists()
    (folder / _RESERVED).unlink(missing_ok=True)
    return found


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that a file could not be written, whichever library raises it."""
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    if isinstance(error, SafetensorError):
        return "os error" in str(error) or "I/O error" in str(error)
    # torch's zip writer raises "unexpected pos" or "file write failed" after an error of the disk, without its errno
    return isinstance(error, RuntimeError) and any(
        part in str(error) for part in ("inline_container", "PytorchStreamWriter")
    )
