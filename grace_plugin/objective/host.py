"""Values read back from the device without a stop.

`.item()` waits for all that is queued. A copy into pinned memory is queued itself; `Reading.numbers` waits for one event alone,
the device's work that was queued before it, and not for what was queued since.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Reading"]


class Reading:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor.detach(), None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> list[float]:
        """Its numbers, once the device has come to them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._host.tolist()
        return found
