"""Distribute rows to processes, and processes to GPUs.

Small models leave a GPU idle between kernels, so many processes share it; each keeps photographs, questions and the teacher's
states on its device. Rows wait for what they need (the pair, the search of their rate) and are made in the order asked.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import cycle
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.rows import Store
from benchmarks.accuracy.study import Row, Size
from benchmarks.accuracy.work import Work

__all__ = ["make_all"]

_WORK: list[Work] = []


class _InTurn(SpawnContext):
    """Processes that see one GPU each, in turn. It is in the environment they start with: imports alone may look for GPUs."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        self.names = cycle(named if len(named) == devices else map(str, range(devices)))

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - the name that ProcessPoolExecutor calls
        os.environ["CUDA_VISIBLE_DEVICES"] = next(self.names)
        return super().Process(*args, **kwargs)


def _begin(kind: type[Work], *arguments: Any) -> None:
    torch.set_num_threads(1)
    _WORK.append(kind(*arguments))


def _make(row: Row) -> Row:
    _WORK[0].make(row)
    return row


def make_all(
    rows: list[Row], arguments: tuple[Size, Store, Path, str], workers: int, until: float, kind: type[Work] = Work
) -> list[Row]:
    """Make rows and what they need, in `workers` processes; none is begun after the time `until`. Returns what is left.

    kind: of data, made of `arguments` in each process.
    """
    size, store = arguments[:2]
    left: list[Row] = []

    def there(row: Row) -> bool:
        return store.done(row) and (not row.kept or (arguments[2] / row.name.replace("/", "-")).is_dir())

    def given_up(row: Row) -> bool:
        """A rate or weight at which training failed is not chosen, and holds nothing up."""
        return row.searching and row not in left and row not in running.values()

    def add(row: Row) -> None:
        for need in row.needs(size):
            if not there(need):
                add(need)
        if row not in left:
            left.append(row)

    for row in rows:
        if not store.done(row):
            add(row)
    devices = torch.cuda.device_count()
    context = _InTurn(devices) if devices > 1 else multiprocessing.get_context("spawn")
    running: dict[Future[Row], Row] = {}
    with ProcessPoolExecutor(workers, context, _begin, (kind, *arguments)) as pool:
        while left or running:
            ready = [row for row in left if all(there(need) or given_up(need) for need in row.needs(size))]
            for row in ready[: workers - len(running)] if time.time() < until else []:
                left.remove(row)
                running[pool.submit(_make, row)] = row
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                row = running.pop(future)
                future.result()
                record = store.read(row) or {}
                shown = record["failed"].splitlines()[-1] if "failed" in record else f"{100 * record['accuracy']:.2f} %"
                print(f"{row.name}: {shown}, {record['seconds']:.0f} s", flush=True)
    return left
