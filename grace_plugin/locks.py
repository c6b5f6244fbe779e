"""A file lock across processes that names its holder.

The operating system releases the lock when its process ends, however it ends, so a leftover lock file locks nothing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["HeldError", "held"]


class HeldError(RuntimeError):
    """Another process holds the lock; the text names it: process id, host, and since when."""


def _holder(path: Path) -> str:
    """Return the holder that a lock file names."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(found['pid'])} on {str(found['host'])[:80]} since {str(found['since'])[:40]}"
    except (OSError, ValueError, KeyError, TypeError):  # just taken, or written by another program
        return "another process"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside the block; its folder is made where it is missing.

    Raises:
        HeldError: another process, or another block of this one, holds it; it is not waited for.
        OSError: the folder cannot be made or written.
        NotImplementedError: its file system knows no locks.
    """
    lock = FileLock(path, timeout=0)  # not waited for: the holder may run for days
    try:
        lock.acquire()
    except Timeout:
        raise HeldError(_holder(path)) from None
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):  # on a full disk the lock is held all the same, without a name
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        yield
    finally:
        lock.release()
