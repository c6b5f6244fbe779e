"""Starts a Triton kernel again without asking Triton which one it is.

What it does. Triton looks for the compiled kernel of its arguments' types and alignments at every start. Here it is kept by the
same properties and started itself, as Triton's tutorials start theirs, which takes the host less time for each layer and step.

What it refuses. Nothing. Where nothing is compiled (Triton's interpreter), every start is Triton's own.
"""

from typing import Any

from torch import Tensor

__all__ = ["ALIGNED", "Kernel"]

ALIGNED = 16
"""Addresses and whole numbers that are multiples of it have a kernel of their own, as has the number 1."""


def _kind(argument: Tensor | int | float) -> object:
    """What Triton compiles for: dtype and alignment of a tensor; of a whole number whether it is 1, aligned, or long."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNED == 0
    if isinstance(argument, int):
        return argument == 1, argument % ALIGNED == 0, argument.bit_length() > 31
    return float


class Kernel:
    """A function of `triton.jit`, with what was compiled of it."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[object, Any] = {}

    def start(
        self, programs: int, arguments: tuple[Tensor | int | float, ...], constants: tuple[Any, ...], warps: int
    ) -> None:
        """Start so many programs on the current device, which is the first argument's.

        arguments: in the function's order. constants: its `tl.constexpr` parameters, which come last.
        """
        first = arguments[0]
        assert isinstance(first, Tensor)
        key = (first.device, constants, warps, *map(_kind, arguments))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*arguments, *constants)
        else:
            compiled = self._function[programs,](*arguments, *constants, num_warps=warps)
            if compiled is not None:
                self._compiled[key] = compiled
