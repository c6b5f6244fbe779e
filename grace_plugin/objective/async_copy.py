"""Copy a tensor to the host without stopping the queue of the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AsyncHostCopy"]


class AsyncHostCopy:
    """A copy of a tensor to host memory that is queued now and read later.

    `Tensor.item` waits for everything that is queued on the device. This waits for one event: the work queued before the copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor.detach(), None
        if tensor.is_cuda:
            # only a copy into pinned memory is asynchronous; one into pageable memory stops the host
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[float]:
        """Wait for the copy and return its values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._host.tolist()
        return values
