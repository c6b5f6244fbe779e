"""Work in host memory next to a busy device: copies that are queued, and small computations on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["single_thread", "to_device"]


@contextmanager
def single_thread(device: torch.device) -> Iterator[None]:
    """Compute in host memory on the calling thread alone while the model is on an accelerator.

    Args:
        device: of the model; on the CPU the number of threads is left as it is.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" or threads == 1:
        yield
        return
    # The tensors of a batch are small, and waking all threads for each function took milliseconds on a host of 16 cores.
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`; a copy from the host to a GPU is queued, and the host does not wait for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # A copy from pageable memory blocks the host until it is done, whatever `non_blocking` says.
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
