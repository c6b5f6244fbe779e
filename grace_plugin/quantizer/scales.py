"""Group scales: how a weight is grouped, where a scale starts, and how it is rounded to what the file will hold.

What it does. Along the input dimension every ``group_size`` weights of a row share one scale s = exp(theta). theta is
learned in float32; the scale itself is rounded to the *stored* dtype (that of the checkpoint) wherever it is used, so
what is trained is what is shipped. The start value is the best of 20 candidates by squared error, not max|w| / 7.

What it refuses. An input width that the group does not divide, bits outside 2..8, a stored dtype no checkpoint has, and
8 bits in bfloat16: there the product ``code * scale`` does not determine the code any more (7 bits and fewer, and
float16 at any width, always do: shown for every positive scale of the dtype).

What it costs. The start search reads a weight once per candidate, in blocks of rows: 16 MiB of float32 at a time.

Legend: out, in are the dimensions of a linear weight; groups = in / group_size.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a scale can be stored in; float64 exists for tests."""

BLOCK_ELEMENTS = 1 << 22
"""Weights that are worked on at one time; bounds the float32 temporaries of a large layer."""

LARGEST_CODE = 128
"""No code is larger in magnitude (8 bits): a scale is kept below the dtype's largest number divided by it."""


def code_range(num_bits: int) -> tuple[int, int]:
    """Smallest and largest code of a symmetric format: (-8, 7) for 4 bits.

    Raises:
        ValueError: bits outside 2..8.
    """
    if not 2 <= num_bits <= 8:
        raise ValueError(f"num_bits must be between 2 and 8, got {num_bits}; W4A16 has 4")
    return -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1


def check_format(num_bits: int, stored_dtype: torch.dtype) -> None:
    """Refuse a pair of bits and stored dtype whose codes do not survive being saved.

    Raises:
        ValueError: bits outside 2..8, a dtype that is not stored, or 8 bits in bfloat16.
    """
    code_range(num_bits)
    if stored_dtype not in STORED_DTYPES:
        raise ValueError(f"scales cannot be stored as {stored_dtype}; use torch.bfloat16 or torch.float16")
    if num_bits == 8 and stored_dtype == torch.bfloat16:
        raise ValueError(
            "8-bit codes do not survive being saved as code * scale in bfloat16 (8 significant bits); "
            "use float16 as the stored dtype (scales.stored_dtype: float16 in a recipe), or at most 7 bits"
        )


@functools.cache
def holds(dtype: torch.dtype, stored_dtype: torch.dtype) -> bool:
    """Whether every number of ``stored_dtype`` is a number of ``dtype``."""
    return torch.promote_types(dtype, stored_dtype) == dtype


_autocast_there = functools.cache(torch.amp.is_autocast_available)


def autocasts(device: str) -> bool:
    """Whether autocast is on for this kind of device."""
    return _autocast_there(device) and torch.is_autocast_enabled(device)


def forward_dtype(weight: Tensor) -> torch.dtype:
    """What a layer computes in: autocast's dtype when autocast is on, the weight's otherwise."""
    return torch.get_autocast_dtype(weight.device.type) if autocasts(weight.device.type) else weight.dtype


def validate_group(in_features: int, group_size: int | None) -> str | None:
    """None when the group fits, otherwise what is wrong with it, as half a sentence.

    Args:
        in_features: width of the layer's input.
        group_size: weights that share a scale; None or -1 for one scale per row.
    """
    if group_size is None or group_size == -1:
        return None
    if group_size < 1:
        return f"group_size {group_size} is not a positive number (-1: one scale per output channel)"
    if in_features % group_size:
        return f"input width {in_features} is not divisible by group_size {group_size}"
    return None


def group_count(in_features: int, group_size: int | None) -> int:
    """Scales per output row.

    Raises:
        ValueError: the group does not divide the width.
    """
    problem = validate_group(in_features, group_size)
    if problem is not None:
        raise ValueError(f"{problem}; choose a group_size that divides it, or add the layer to ignore")
    return 1 if group_size is None or group_size == -1 else in_features // group_size


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over the rows of a matrix, each of at most BLOCK_ELEMENTS elements (and at least one row)."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """float64 for a float64 weight, float32 otherwise: what it is divided in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def scale_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Smallest and largest scale stored in ``dtype``: a normal number whose product with any code is finite."""
    limits = torch.finfo(dtype)
    return limits.tiny, limits.max / LARGEST_CODE


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A positive scale as a normal number of ``dtype`` whose product with any code is finite."""
    return scale.clamp(*scale_limits(dtype)).to(dtype)


class _StoredScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
        # float32 exponentials differ in the last bit between devices and even between vector lanes; float64's do not
        # once they are rounded to what is stored.
        scale = round_scale(log_scale.double().exp(), dtype)
        ctx.save_for_backward(scale)
        ctx.grad_dtype = log_scale.dtype
        return scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scale: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad_scale.to(ctx.grad_dtype) * scale, None


def stored_scale(log_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s = exp(theta) rounded to the stored dtype, never 0 and never infinite; straight-through: ds/dtheta = s.

    Args:
        log_scale: theta [out, groups], float32 (float64 in tests).
        dtype: of the checkpoint: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        [out, groups] in ``dtype``, inside its normal range and below its largest number / 128.
    """
    scale: Tensor = _StoredScale.apply(log_scale, dtype)
    return scale


@torch.no_grad()
def start_scales(
    weight: Tensor,
    group_size: int | None,
    *,
    num_bits: int = 4,
    candidates: int = 20,
    low: float = 0.3,
    high: float = 1.2,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """theta of least squared error among ``candidates`` values of c * max|w| / q_max, c evenly spaced in [low, high].

    Each candidate is judged as it would be stored (rounded to ``dtype``). The first of equal candidates wins. A group
    of zeros starts at the geometric mean of the layer's other groups (at 1 when all are zero).

    Args:
        weight: [out, in], any floating type.
        group_size: weights that share a scale; None or -1 for one scale per row.
        num_bits: 2..8; q_max = 2^(num_bits - 1) - 1.
        candidates: how many values are tried, at least 1.
        low: smallest c.
        high: largest c.
        dtype: the stored dtype.

    Returns:
        log_scale [out, in / group_size], float32 (float64 for a float64 weight).

    Raises:
        ValueError: the group does not divide the width, or bits outside 2..8.
    """
    smallest, largest = code_range(num_bits)
    groups = group_count(weight.shape[1], group_size)
    found = torch.empty(weight.shape[0], groups, dtype=compute_dtype(weight), device=weight.device)
    for rows in row_blocks(*weight.shape):
        block = weight[rows].to(found.dtype).unflatten(1, (groups, -1))
        unit = block.abs().amax(dim=2) / largest
        best = torch.full_like(unit, torch.inf)
        chosen = torch.zeros_like(unit)
        for factor in torch.linspace(low, high, candidates, dtype=torch.float64).tolist():
            scale = round_scale(unit * factor, dtype).to(found.dtype)
            codes = (block / scale.unsqueeze(2)).round_().clamp_(smallest, largest)
            error = codes.mul_(scale.unsqueeze(2)).sub_(block).square_().sum(dim=2)
            chosen = torch.where(error < best, scale, chosen)
            best = torch.minimum(error, best)
        found[rows] = torch.where(unit > 0, chosen, 0.0).log()
    alive = found > -torch.inf
    mean = torch.where(alive, found, 0.0).sum() / alive.sum().clamp(min=1)
    return torch.where(alive, found, mean)


def check_shapes(weight: Tensor, scale: Tensor) -> None:
    """ValueError for scales that are not one row per output row, or whose number does not divide the width."""
    _check_shapes(weight.shape, scale.shape)


def _check_shapes(weight: torch.Size, scale: torch.Size) -> None:
    fits = len(weight) == 2 and len(scale) == 2 and weight[0] == scale[0] and scale[1] > 0
    if not fits or weight[1] % scale[1]:
        raise ValueError(
            f"scales {tuple(scale)} do not fit a weight {tuple(weight)}; "
            "give one row of scales per output row and a number of groups that divides the input width"
        )


def check_fit(
    weight: Tensor, log_scale: Tensor, group_size: int | None, num_bits: int, stored_dtype: torch.dtype
) -> None:
    """ValueError for a format that cannot be saved, or scales that do not fit the weight."""
    _check_fit(weight.shape, log_scale.shape, group_size, num_bits, stored_dtype)


@functools.lru_cache(4096)  # each call of each layer asks
def _check_fit(
    weight: torch.Size, scale: torch.Size, group_size: int | None, num_bits: int, stored_dtype: torch.dtype
) -> None:
    check_format(num_bits, stored_dtype)
    _check_shapes(weight, scale)
    if scale[1] != group_count(weight[1], group_size):
        raise ValueError(f"{scale[1]} scales per row for groups of {group_size} in a width of {weight[1]}")
