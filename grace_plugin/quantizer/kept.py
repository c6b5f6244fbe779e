"""Weights that a function of autograd keeps for its backward pass, outside `save_for_backward`.

What it refuses. To be read after one of them was written to, as torch does.

What it costs. Nothing: references. torch's hooks on saved tensors cost the host some microseconds a tensor, twice under
activation checkpointing, and would move weights to the host and back where activations are offloaded.
"""

from torch import Tensor

__all__ = ["Kept"]


class Kept:
    """Tensors that a function of autograd keeps itself, and that they stand as they stood.

    torch's hooks on saved tensors (checkpointing, offloading) then run for activations alone: weights need none.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors, self._versions = tensors, [tensor._version for tensor in tensors]

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors; RuntimeError when one was written to since."""
        if self._versions != [tensor._version for tensor in self._tensors]:
            raise RuntimeError(
                "a weight or what it is quantized with was modified by an inplace operation between forward and backward; "
                "step the optimizer after the backward pass"
            )
        return self._tensors
