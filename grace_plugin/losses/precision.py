"""Which floating-point type a loss is computed in.

Hidden states and logits arrive in whatever type the model runs in; bfloat16 has 8 significant bits, too few for a
logarithm of probabilities or for a difference of two of them. Every loss of this room therefore computes in float32,
and in float64 when one of its inputs already is float64 (that is what lets ``torch.autograd.gradcheck`` test the very
code that trains).
"""

import contextlib

import torch
from torch import Tensor


def loss_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any given tensor is float64, float32 otherwise."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on the device of ``tensor``: a surrounding autocast must not change a loss."""
    device = tensor.device.type
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )
