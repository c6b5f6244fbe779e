"""The format of a quantized weight, and the table of formats whose scales are learned.

`grace_plugin.schemes` makes one :class:`QuantFormat` from a scheme of compressed-tensors; the quantizer, the constraints of
vLLM, the export and the report take it from there. To add a weight format, write a subclass of :class:`IntegerQuantizer` (which
code does a quotient w / s become?) and add one row to the table with :func:`register_format`; `examples/custom_format.py` does
both from outside the package. Codes must be integers that the format's bits hold, so that the checkpoint is an ordinary
pack-quantized one and needs no code of its own to be served.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FORMATS", "STORED_DTYPES", "FormatRow", "IntegerQuantizer", "QuantFormat", "register_format"]

STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes of scales; float64 exists for tests."""


@dataclass(frozen=True)
class QuantFormat:
    """What a linear layer is quantized to.

    Args:
        num_bits: bits of a code, 2 to 8.
        group_size: weights of a row that share a scale; None (or -1) for one scale per output channel.
        stored_dtype: dtype of weights and scales in the checkpoint.
        symmetric: whether codes have no zero point.
        activations: None, activations are not quantized.

    Raises:
        ValueError: names the value that no checkpoint can have.
    """

    num_bits: int = 4
    group_size: int | None = 128
    stored_dtype: torch.dtype = torch.bfloat16
    symmetric: bool = True
    activations: None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"num_bits must be between 2 and 8, got {self.num_bits}; W4A16 has 4")
        if self.stored_dtype not in STORED_DTYPES:
            raise ValueError(f"scales cannot be stored as {self.stored_dtype}; use torch.bfloat16 or torch.float16")
        if self.group_size == -1:  # compressed-tensors' other way to say None
            object.__setattr__(self, "group_size", None)
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size {self.group_size} is not a positive number (-1: one scale per output channel)"
            )

    def __str__(self) -> str:
        return f"{self.num_bits} bits, " + (f"group {self.group_size}" if self.group_size else "per channel")

    @property
    def integer_range(self) -> tuple[int, int]:
        """Smallest and largest integer of the bits: (-8, 7) for 4."""
        return -(1 << (self.num_bits - 1)), (1 << (self.num_bits - 1)) - 1

    @cached_property
    def quantizer(self) -> "IntegerQuantizer":
        """The fake quantizer that learns this format.

        Raises:
            ValueError: the table has no row for it, or its codes do not survive being saved.
        """
        if self.num_bits == 8 and self.stored_dtype == torch.bfloat16:
            # bfloat16 keeps 8 significant bits, so two codes times one scale can round to the same number
            raise ValueError(
                "8-bit codes do not survive being saved as code * scale in bfloat16 (8 significant bits); "
                "use float16 as the stored dtype (scales.stored_dtype: float16 in a recipe), or at most 7 bits"
            )
        # the latest row first, so that a format from outside can replace one of ours
        for row in reversed(FORMATS):
            if self.num_bits in row.num_bits and self.symmetric:
                return row.quantizer
        raise ValueError(f"no fake quantizer learns asymmetric weights of {self.num_bits} bits; use a symmetric scheme")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code that the fake quantizer gives."""
        return self.quantizer.code_range(self)

    def width_problem(self, in_features: int) -> str | None:
        """Return what is wrong with groups of this size in rows of that width, as half a sentence, or None."""
        if self.group_size is not None and in_features % self.group_size:
            return f"input width {in_features} is not divisible by group_size {self.group_size}"
        return None

    def groups(self, in_features: int) -> int:
        """Return the number of scales per output channel.

        Raises:
            ValueError: the group does not divide the width.
        """
        problem = self.width_problem(in_features)
        if problem is not None:
            raise ValueError(f"{problem}; choose a group_size that divides it, or add the layer to ignore")
        return 1 if self.group_size is None else in_features // self.group_size


class IntegerQuantizer:
    """Round quotients to the nearest integer, half to even, and clip them to the range of the bits.

    A subclass may give other codes. The backward pass is LSQ's for all of them: it passes the gradient straight through where
    the clip does not act.

    Attributes:
        has_kernel: whether the Triton kernels, which round in this way and take the range as an argument, may run; not for a
            subclass that rounds in another way.
    """

    @property
    def has_kernel(self) -> bool:
        return type(self).round is IntegerQuantizer.round

    def code_range(self, fmt: QuantFormat) -> tuple[int, int]:
        """Return the smallest and the largest code, both within ``fmt.integer_range``."""
        return fmt.integer_range

    def round(self, quotient: Tensor) -> Tensor:
        """Return a new tensor with the code of each quotient w / s (float32, any shape) before it is clipped."""
        # torch rounds half to even, as compressed-tensors does when it saves: any other rule would flip codes at ties
        return quotient.round()


class FormatRow(NamedTuple):
    """One row of the format table: which symmetric integer formats are learned, and by which fake quantizer."""

    name: str
    num_bits: tuple[int, ...]
    quantizer: IntegerQuantizer


FORMATS = [FormatRow("symmetric integers", tuple(range(2, 9)), IntegerQuantizer())]
"""Formats that are learned; a later row takes precedence over an earlier one."""


def register_format(row: FormatRow) -> None:
    """Add a row to the table; layers attached from now on use it.

    Raises:
        ValueError: a code does not fit into the bits of the format.
    """
    # float16, because 8 bits cannot be saved in bfloat16 and the range does not depend on the dtype
    for num_bits in row.num_bits:
        fmt = QuantFormat(num_bits, stored_dtype=torch.float16)
        (smallest, largest), (low, high) = row.quantizer.code_range(fmt), fmt.integer_range
        if not low <= smallest < largest <= high:
            raise ValueError(
                f"format {row.name!r} has codes from {smallest} to {largest}; {num_bits} bits hold {low} to {high}"
            )
    FORMATS.append(row)
