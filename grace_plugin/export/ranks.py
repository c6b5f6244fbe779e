"""One writer, and no rank left waiting: what several processes do together when a checkpoint is written.

compressed-tensors saves and loads with collectives, so every rank takes part in both; global rank 0 alone writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["is_writer", "run_on_all_ranks"]

T = TypeVar("T")


def is_writer() -> bool:
    """Whether this process writes: global rank 0, one writer however many nodes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def run_on_all_ranks(work: Callable[[], T], device: torch.device | str = "cpu") -> T:
    """Run `work` on every rank and wait for all; when it fails on one, it fails on all.

    Raises:
        RuntimeError: it failed on another rank; an error of this rank is raised as it is.
    """
    error: BaseException | None = None
    value: Any = None
    try:
        value = work()
    except BaseException as caught:
        error = caught
    several = dist.is_available() and dist.is_initialized()
    if several and dist.get_backend() == "nccl":
        device = "cuda"  # the model may have been moved to host memory by an earlier save
    failures = torch.tensor(float(error is not None), device=device)
    if several:
        dist.all_reduce(failures)
    if error is not None:
        raise error
    if failures.item():
        raise RuntimeError("writing the checkpoint failed on another rank; its log has the error")
    return value
