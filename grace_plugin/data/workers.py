"""A bounded wait for the worker processes of a DataLoader, whose own `timeout` does not cover a stopped worker."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

__all__ = ["WORKER_SECONDS", "bounded"]

WORKER_SECONDS = 1800.0
"""Longest wait for a worker by default: that of a collective (TrainingArguments' `ddp_timeout`)."""

T = TypeVar("T")


def bounded(batches: Iterable[T], seconds: float) -> Iterator[T]:
    """Yield what a loader yields; a wait of more than `seconds` for one batch kills its workers. 0 waits without end.

    Raises:
        TimeoutError: no batch came: a worker was stopped (SIGSTOP), or waits for a file that does not answer.
    """
    source, waiting = iter(batches), threading.get_ident()
    while True:
        late = threading.Event()
        # A thread, and not DataLoader(timeout=...): a tensor comes as a file descriptor that a thread of the worker hands over,
        # and for that thread torch waits without a limit (torch 2.13, multiprocessing/reductions.py, rebuild_storage_fd).
        watch = threading.Timer(seconds, _kill_workers, (waiting, late))
        watch.daemon = True
        if seconds:
            watch.start()
        try:
            batch = next(source)
        except StopIteration:
            return
        except Exception:
            if not late.is_set():
                raise
            # torch's handler of SIGCHLD raises in this thread, once for each worker that is not reaped yet
            while watch.is_alive():
                with suppress(RuntimeError):
                    watch.join()
            raise TimeoutError(
                f"a worker of the data loader has sent nothing for {seconds:g} s: it was stopped, or waits for a file that does"
                " not answer; start the same command again, a training with resume_from_checkpoint"
            ) from None
        finally:
            watch.cancel()
        yield batch


def _kill_workers(waiting: int, late: threading.Event) -> None:
    """Kill the workers of the loader that a thread waits in; the death of a worker ends the wait with an error."""
    late.set()
    frame = sys._current_frames().get(waiting)
    while frame is not None:
        for worker in getattr(frame.f_locals.get("self"), "_workers", ()):
            worker.kill()  # not terminate(): a stopped process does not take SIGTERM, and would be joined without end
            worker.join()
        frame = frame.f_back
