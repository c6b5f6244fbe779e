"""What is known in host memory, on its way to the device without a stop.

A copy from pageable memory waits until it is done. Copies here go through pinned memory and are queued. What is computed of a
batch is small, and torch would wake all of its threads for it: on a host of 16 cores that took milliseconds for each function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["moved", "one_thread"]


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute in host memory with this thread alone; beside a model in host memory, with as many as before."""
    threads = torch.get_num_threads()
    if device.type == "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from the host to a GPU through pinned memory, queued."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
