"""What is known in host memory, on its way to the device without a stop.

A copy from pageable memory waits until it is done. Copies here go through pinned memory and are queued.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["moved"]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from the host to a GPU through pinned memory, queued."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
