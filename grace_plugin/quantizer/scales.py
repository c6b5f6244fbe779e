"""Group scales: where they start, and how they are rounded to what the checkpoint holds.

Along the input dimension every ``group_size`` weights of a row share one scale s = exp(theta). theta is learned in float32; the
scale is rounded to the dtype of the checkpoint wherever it is used, so what is trained is what is stored. The start value is
the best of 20 candidates by squared error instead of max|w| / 7.

Legend: out, in are the dimensions of a linear weight; groups = in / group_size.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grace_plugin.quantizer.format import QuantFormat

BLOCK_ELEMENTS = 1 << 22
"""Weights that are worked on at one time: 16 MiB of float32 for each temporary, however large the layer."""

LARGEST_CODE = 128
"""No code is larger in magnitude (8 bits): a scale is kept below the dtype's largest number divided by it."""


@functools.cache
def holds(dtype: torch.dtype, stored_dtype: torch.dtype) -> bool:
    """Return whether every number of ``stored_dtype`` is a number of ``dtype``."""
    return torch.promote_types(dtype, stored_dtype) == dtype


_autocast_available = functools.cache(torch.amp.is_autocast_available)


def autocasts(device: str) -> bool:
    """Return whether autocast is on for a device type; a device without autocast (meta) raises in torch's own question."""
    return _autocast_available(device) and torch.is_autocast_enabled(device)


def forward_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype a layer computes in: autocast's when it is on, else the weight's."""
    return torch.get_autocast_dtype(weight.device.type) if autocasts(weight.device.type) else weight.dtype


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype a weight is divided in: float64 for float64 weights, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices over the rows of a matrix, each of at most BLOCK_ELEMENTS elements (and at least one row)."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def scale_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and largest scale stored in ``dtype``: normal numbers whose product with any code is finite."""
    limits = torch.finfo(dtype)
    # no subnormal numbers: GPUs may flush them to zero, and a scale of zero divides by zero
    return limits.tiny, limits.max / LARGEST_CODE


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive scales to numbers of ``dtype`` within :func:`scale_limits`."""
    return scale.clamp(*scale_limits(dtype)).to(dtype)


class _StoredScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
        # float32 exponentials differ in the last bit between devices and even between vector lanes; float64's do not
        # once they are rounded to what is stored
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
    """Return s = exp(theta) rounded to the stored dtype, never 0 nor infinite; straight-through: ds/dtheta = s.

    Args:
        log_scale: theta [out, groups], float32 (float64 in tests).
        dtype: of the checkpoint: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        [out, groups] in ``dtype``, inside its normal range and at most its largest number / 128.
    """
    # straight-through: the derivative of the rounded scale by theta is taken to be that of exp, the scale itself
    scale: Tensor = _StoredScale.apply(log_scale, dtype)
    return scale


@torch.no_grad()
def start_scales(
    weight: Tensor, fmt: QuantFormat, *, candidates: int = 20, low: float = 0.3, high: float = 1.2
) -> Tensor:
    """Return theta of least squared error among ``candidates`` values of c * max|w| / q_max, c evenly spaced in [low, high].

    Each candidate is judged as it would be stored. The first of equal candidates wins. A group of zeros starts at the geometric
    mean of the layer's other groups (at 1 when all are zero).

    Args:
        weight: [out, in], any floating type.
        fmt: the format; q_max is its largest code.
        candidates: number of values, at least 1.
        low: smallest c.
        high: largest c.

    Returns:
        log_scale [out, groups], float32 (float64 for a float64 weight).

    Raises:
        ValueError: the group does not divide the width.
    """
    smallest, largest = fmt.code_range
    groups = fmt.groups(weight.shape[1])
    found = torch.empty(weight.shape[0], groups, dtype=compute_dtype(weight), device=weight.device)
    # by blocks of rows: 20 candidates of a whole layer would take several times its float32 weights
    for rows in row_blocks(*weight.shape):
        block = weight[rows].to(found.dtype).unflatten(1, (groups, -1))
        unit = block.abs().amax(dim=2) / largest
        best = torch.full_like(unit, torch.inf)
        chosen = torch.zeros_like(unit)
        for factor in torch.linspace(low, high, candidates, dtype=torch.float64).tolist():
            # judged as it will be stored; the best float32 scale may round to one that is worse than its neighbour
            scale = round_scale(unit * factor, fmt.stored_dtype).to(found.dtype)
            codes = fmt.quantizer.round(block / scale.unsqueeze(2)).clamp_(smallest, largest)
            error = codes.mul_(scale.unsqueeze(2)).sub_(block).square_().sum(dim=2)
            # strictly less: the first of equal candidates wins
            chosen = torch.where(error < best, scale, chosen)
            best = torch.minimum(error, best)
        found[rows] = torch.where(unit > 0, chosen, 0.0).log()
    # a group of zeros has no best scale; its weights may grow, so it starts where its neighbours are
    alive = found > -torch.inf
    mean = torch.where(alive, found, 0.0).sum() / alive.sum().clamp(min=1)
    return torch.where(alive, found, mean)


def check_shapes(weight: Tensor, scale: Tensor) -> None:
    """Raise ValueError for scales that are not one row per output row, or whose number does not divide the width."""
    _check_shapes(weight.shape, scale.shape)


def _check_shapes(weight: torch.Size, scale: torch.Size) -> None:
    fits = len(weight) == 2 and len(scale) == 2 and weight[0] == scale[0] and scale[1] > 0
    if not fits or weight[1] % scale[1]:
        raise ValueError(
            f"scales {tuple(scale)} do not fit a weight {tuple(weight)}; "
            "give one row of scales per output row and a number of groups that divides the input width"
        )


@functools.lru_cache(4096)  # asked by every layer at every call, and an answer takes microseconds of the host
def check_fit(weight: torch.Size, scale: torch.Size, fmt: QuantFormat) -> None:
    """Raise ValueError for a format that cannot be learned, or scales [out, groups] that do not fit a weight [out, in]."""
    _ = fmt.quantizer
    _check_shapes(weight, scale)
    if scale[1] != fmt.groups(weight[1]):
        raise ValueError(f"{scale[1]} scales per row for groups of {fmt.group_size} in a width of {weight[1]}")
