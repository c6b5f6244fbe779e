"""Resume states on disk: written aside, proven by a manifest, published by one rename, and the newest whole one found again.

    checkpoint-N.partial    while it is written; removed by the next save
    checkpoint-N            whole: every file is on disk, and `manifest.json`, written last, has its size and SHA-256, one
                            for every 256 MiB
    checkpoint-N.old        an earlier state of the same step while it is replaced

A process or machine that stops at any moment leaves the states before it whole, because a state is removed only after a newer
one is published. What is not promised: file systems that reorder a rename before an fsync, and files changed by others.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

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
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
}

logger = logging.getLogger(__name__)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk; a file system that cannot sync a folder is left as it is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _synced(path: Path) -> int:
    """Size of a file that is on disk from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _digests(sizes: Mapping[Path, int]) -> dict[Path, list[str]]:
    """SHA-256 of every 256 MiB of some files, or what kept one from being read; pieces are read in parallel."""
    pieces = [(path, start) for path, size in sizes.items() for start in range(0, max(size, 1), _PIECE)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashlib and reads release the GIL
        found = list(pool.map(_digest, pieces))
    return {path: [digest for (of, _), digest in zip(pieces, found, strict=True) if of == path] for path in sizes}


def _digest(piece: tuple[Path, int]) -> str:
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


def _own_digest(content: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def publish(partial: Path, final: Path, **facts: Any) -> None:
    """Make a written folder a whole resume state: sync, manifest, rename.

    Args:
        partial: the folder as it was written.
        final: its name from here on; a state of that name is replaced.
        facts: further plain values of the manifest, as the step.
    """
    files = _files(partial)
    with ThreadPoolExecutor(1) as pool:  # the disk writes while the hashes are made
        synced = [pool.submit(_synced, file) for file in files]
        digests = _digests({file: file.stat().st_size for file in files})
        sizes = [one.result() for one in synced]
    entries = {
        file.relative_to(partial).as_posix(): {"bytes": size, "sha256": digests[file]}
        for file, size in zip(files, sizes, strict=True)
    }
    content: dict[str, Any] = {"format": 1, **facts, "files": entries}
    content["sha256"] = _own_digest(content)
    with (partial / MANIFEST).open("w", encoding="utf-8") as out:
        out.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        out.flush()
        os.fsync(out.fileno())
    _sync_folder(partial)
    old = final.with_name(final.name + _OLD)
    if final.exists():  # a folder that holds something cannot be renamed over
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    _sync_folder(final.parent)
    if old.exists():
        remove_state(old)


def _manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        ValueError: none, or not the one that was written; a short reason.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["sha256"] != _own_digest(content):
            raise KeyError("sha256")
    except FileNotFoundError:
        raise ValueError(f"no {MANIFEST}: its save did not end, or an earlier version wrote it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    return content


def manifest_facts(folder: Path) -> dict[str, Any]:
    """The values of a whole state's manifest that are not about its files: step, max_steps, ended, automatic.

    Raises:
        ValueError: no readable manifest.
    """
    return {key: value for key, value in _manifest(folder).items() if key not in ("files", "sha256")}


def damage(folder: Path, *, hashes: bool = True) -> str:
    """Say what makes a folder no whole resume state, "" for a whole one.

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
    """Folders named as resume states, newest first; whole or not."""
    found = [(match, path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    ordered = sorted(found, key=lambda one: (int(one[0][1]), one[0][2] is None), reverse=True)
    return [path for _, path in ordered if path.is_dir()]


def newest_whole(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest whole resume state of a run folder, and what is wrong with each newer one by its name."""
    torn: dict[str, str] = {}
    for state in states(folder):
        reason = damage(state)
        if not reason:
            return state, torn
        torn[state.name] = reason
    return None, torn


def remove_state(folder: Path) -> None:
    """Remove a resume state; stopped halfway, what is left is not taken for a torn one."""
    aside = folder if folder.name.endswith(_PARTIAL) else folder.with_name(folder.name + _PARTIAL)
    if aside != folder:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what stopped saves and removals have left."""
    for path in folder.glob(f"checkpoint-*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, newest: Path, limit: int | None, protected: str | None = None) -> None:
    """Remove older states, now that a newer one is published.

    Args:
        folder: the run folder.
        newest: the state just published; it is kept whatever the limit.
        limit: states to keep (`save_total_limit`); None or 0 for all. Torn ones do not count, and go first.
        protected: a state that is kept in addition, as the best one.
    """
    if not limit or limit < 1:
        return
    others = [one for one in states(folder) if one != newest and str(one) != protected]
    torn = [one for one in others if damage(one, hashes=False)]
    whole = [one for one in others if one not in torn]
    room = max(0, limit - 1 - (protected is not None and protected != str(newest)))
    for state in [*torn, *whole[room:]]:
        remove_state(state)


# ---- space ----------------------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def state_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, optimizer_name: str | None = None
) -> int:
    """Bytes of a resume state: parameters, buffers and optimizer states.

    Args:
        model: the student.
        optimizer: whose states are counted, where it has any.
        optimizer_name: TrainingArguments' `optim`, for states that are not there yet, counted as Adam's; None for none.
    """
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    held = sum(t.numel() * t.element_size() for t in _tensors(dict(optimizer.state))) if optimizer is not None else 0
    if not held and optimizer_name is not None:
        width = 1 if "8bit" in optimizer_name else 4
        held = 2 * width * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return size + held + _MARGIN


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def disk_is_full(folder: Path, needed: int) -> str:
    """A sentence part that says how much to free where `needed` bytes do not fit, "" where they do."""
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free >= needed:
        return ""
    return f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; free {(needed - free) / 1e6:,.1f} MB"


def reserve_space(folder: Path, size: int) -> None:
    """Hold `size` bytes of a disk for the first resume state; without effect where the file system cannot.

    A run that has no state yet loses everything when another program fills the disk. `release_space` gives the bytes back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # not os.posix_fallocate: where a file system knows no fallocate (NFS 3), glibc writes a byte into every block instead
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None:
        return
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with (folder / _RESERVED).open("wb") as file:
        done = allocate(file.fileno(), 0, 0, size) == 0
    if not done:
        release_space(folder)


def release_space(folder: Path) -> bool:
    """Give back what `reserve_space` holds, also what a killed run has left; returns whether there was anything."""
    held = folder / _RESERVED
    found = held.exists()
    held.unlink(missing_ok=True)
    return found


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that a file could not be written, by whatever library it comes."""
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    if isinstance(error, SafetensorError):
        return "os error" in str(error) or "I/O error" in str(error)
    # torch's zip writer: "unexpected pos", "file write failed", behind an error of the disk
    return isinstance(error, RuntimeError) and any(
        part in str(error) for part in ("inline_container", "PytorchStreamWriter")
    )
