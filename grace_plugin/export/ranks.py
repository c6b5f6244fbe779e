"""Several processes that write one checkpoint: compressed-tensors saves and loads by collectives, so every rank takes part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def is_writer() -> bool:
    """Whether this process writes."""
    # the global rank: with `local_rank == 0` every node would write the same files
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def run_on_all_ranks(work: Callable[[], T], device: torch.device | str = "cpu") -> T:
    """Run `work` on every rank and wait for all; when it fails on one, it fails on all, so that no rank waits for ever.

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
        device = "cuda"  # NCCL reduces nothing in host memory, to which a save may have moved the model
    failures = torch.tensor(float(error is not None), device=device)
    # unconditional: a rank that skipped this because of its own error would leave the others waiting
    if several:
        dist.all_reduce(failures)
    if error is not None:
        raise error
    if failures.item():
        raise RuntimeError("writing the checkpoint failed on another rank; its log has the error")
    return value
