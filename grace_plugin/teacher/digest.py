"""SHA-256 of whole files, taken once: a result is remembered until the file changes.

Samples of a file do not tell one set of weights from another: in a file of 7 GB, 1.8 million weights can change between them.
All of it is read, by several threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from grace_plugin.data.index import cache_folder

__all__ = ["file_digests"]

_SETTLED = 2.0  # seconds after which a write shows in a file's times on every file system
_PATIENCE = 600.0  # seconds to wait for another process that reads the same file


def file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 by name. Remembered in `$GRACE_CACHE` by path, size, times of content and entry, inode and device; where that
    folder cannot be written, each call reads the files again."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(_remembered, files.values()), strict=True))


def _stamp(path: Path) -> list[str | int]:
    # the time of the entry as well: a tool may set the time of the content back, as cp -p and rsync do
    at = path.stat()
    return [str(path.resolve()), at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino, at.st_dev]


def _read(note: Path) -> str | None:
    try:
        text = note.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _remembered(path: Path) -> str:
    folder, stamp = cache_folder() / "sha256", _stamp(path)
    note = folder / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    found = _read(note)
    if found is not None:
        return found
    lock = FileLock(f"{note}.lock", timeout=_PATIENCE)  # of several processes of a run, one reads
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, Timeout):
        return _digest(path)
    try:
        found = _read(note) or _digest(path)
        times = stamp[2:4]
        if stamp == _stamp(path) and time.time() - max(int(t) for t in times) / 1e9 > _SETTLED:
            with suppress(OSError):
                partial = Path(f"{note}.{os.getpid()}.partial")
                partial.write_text(found, encoding="ascii")
                partial.replace(note)
        return found
    finally:
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink()  # a process that still waits for it reads the file itself


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
