"""Limits on code that others wrote: chat templates may loop for ever, and multiply a text to gigabytes in one call."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["TimeLimitError", "memory_limit", "time_limit"]


class TimeLimitError(Exception):
    """The time is over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitError` inside the block when it takes longer.

    By SIGALRM, which only the main thread of a process can receive (that of a loader's worker is one): in other threads, and
    where an alarm is already set, there is no limit.
    """
    inner = threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0] > 0
    if inner or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise TimeLimitError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let an allocation fail (MemoryError) inside the block that takes the process `more` bytes above its address space.

    A signal does not interrupt a call of C that builds a text of gigabytes, and the kernel may end the process for it. The
    limit holds for all threads, so it is for the moments before training; only Linux has one.
    """
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(pages.read_text().split()[0]) * resource.getpagesize()
    limits = [held + more, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
