"""Fake quantization in one Triton kernel each way, bit for bit what `quantizer.fake_quant` computes in torch.

A program owns a few groups. Forward: it reads weight and scale and writes code * scale. Backward: it computes the codes again
from the weight and writes the weight's gradient and the group's sum for its scale. Quotients are rounded to nearest even as
torch's are, and so are codes, so kernels and torch agree in every code. Each number is read once and written once: 6 bytes a
weight forward and 10 backward for a float32 weight with a bfloat16 result, 4 and 6 for a bfloat16 weight.

Legend: weight [out, in] of out * in / size groups of ``size`` neighbours; code range [smallest, largest].
"""

# mypy: allow-untyped-defs

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from grace_plugin.quantizer.format import QuantFormat
from grace_plugin.quantizer.scales import scale_limits

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:  # torch for CPUs comes without it
    triton = None

TILE, WARPS = 2048, 4
"""Weights that a program holds at one time, and its warps."""

ALIGNED = 16
"""Triton compiles a kernel of its own for addresses and whole numbers that are multiples of it, and for the number 1."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in Python; it decides when they are defined."""


def usable(weight: Tensor, fmt: QuantFormat) -> bool:
    """Return whether the kernels take this weight and format: float32 or bfloat16 on CUDA (or interpreted), rows contiguous."""
    placed = weight.is_cuda or INTERPRETED
    supported = weight.dtype in (torch.bfloat16, torch.float32) and fmt.stored_dtype != torch.float64
    return triton is not None and placed and supported and weight.is_contiguous() and fmt.quantizer.has_kernel


def _kind(argument: Tensor | int | float) -> object:
    """What Triton compiles for: dtype and alignment of a tensor; of a whole number whether it is 1, aligned, or long."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNED == 0
    if isinstance(argument, int):
        return argument == 1, argument % ALIGNED == 0, argument.bit_length() > 31
    return float


class Kernel:
    """A function of `triton.jit` that is started again without asking Triton which compiled kernel its arguments need.

    Triton looks it up by the arguments' types and alignments at every start, in more of the host's time than a layer's other
    work takes. Here it is kept by the same properties. `benchmarks/speed/simplify.py` measures what that gains.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[object, Any] = {}

    def start(
        self, programs: int, arguments: tuple[Tensor | int | float, ...], constants: tuple[Any, ...], warps: int
    ) -> None:
        """Start that many programs on the current device, which must be the first argument's.

        Args:
            programs: size of the grid.
            arguments: in the function's order.
            constants: its `tl.constexpr` parameters, which come last.
            warps: of a program.
        """
        first = arguments[0]
        assert isinstance(first, Tensor)
        key = (first.device, constants, warps, *map(_kind, arguments))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*arguments, *constants)
            return
        compiled = self._function[programs,](*arguments, *constants, num_warps=warps)
        if compiled is not None:  # None from Triton's interpreter
            self._compiled[key] = compiled


if triton is not None:

    @triton.jit
    def _quotient(weight, scale, per_scale, EXACT: tl.constexpr):
        """w / s rounded to nearest, half to even: Markstein's correction of w * RN(1 / s), 3 operations instead of a division.

        It is exact where multiply-add is fused and the divisor's significand is not all ones, as none of 11 bits is.
        """
        if EXACT:
            return tl.div_rn(weight, tl.broadcast_to(scale[:, None], weight.shape))
        # three operations give the bits of a division, which takes several times as many
        guess = weight * per_scale[:, None]
        rest = tl.fma(-guess, tl.broadcast_to(scale[:, None], weight.shape), weight)
        better = tl.fma(rest, tl.broadcast_to(per_scale[:, None], weight.shape), guess)
        return tl.where(tl.abs(guess) < 1e6, better, guess)  # overflow: clipped either way

    @triton.jit
    def _nearest(x):
        """Nearest integer, half to even, of |x| < 2^22: adding 1.5 * 2^23 leaves no bits behind the point."""
        return (x + 12582912.0) - 12582912.0

    @triton.jit
    def _to_bfloat16(x):
        """The nearest bfloat16 (half to even) of finite float32, still as float32: Triton's interpreter would truncate."""
        # rounded by hand: the interpreter truncates, and both must agree
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)

    @triton.jit
    def _stored(log_scale, scale, group, groups, tiny, huge, STORED: tl.constexpr):
        """Writes the stored scales of the groups numbered `group`, and gives them back in float32."""
        theta = tl.load(log_scale + group, mask=group < groups, other=0.0).to(tl.float64)
        # theta in float64: float32 exponentials of host and device differ in the last bit
        s = tl.minimum(tl.maximum(tl.exp(theta), tiny), huge).to(tl.float32)
        s = _to_bfloat16(s) if STORED == tl.bfloat16 else s.to(STORED).to(tl.float32)
        tl.store(scale + group, s, mask=group < groups)
        return s

    @triton.jit
    def _scales(log_scale, scale, groups, tiny, huge, STORED: tl.constexpr, BLOCK: tl.constexpr):
        group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _stored(log_scale, scale, group, groups, tiny, huge, STORED)

    @triton.jit
    def forward_tile(
        weight, s, out, group, groups, smallest, largest,
        size: tl.constexpr, STORED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """w^ of the groups numbered `group` [ROWS] of one weight, whose scales are s."""
        per_s = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), s)
        for start in range(0, size, WIDTH):
            column = start + tl.arange(0, WIDTH)
            place = group[:, None] * size + column[None, :]
            inside = (group < groups)[:, None] & (column < size)[None, :]
            w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
            exact = _quotient(w, s, per_s, EXACT)
            value = _nearest(tl.minimum(tl.maximum(exact, smallest), largest)) * s[:, None]
            value = _to_bfloat16(value) if STORED == tl.bfloat16 else value.to(STORED)
            tl.store(out + place, value, mask=inside)

    @triton.jit
    def _forward(
        weight,
        log_scale,
        scale,
        out,
        groups,
        smallest,
        largest,
        tiny,
        huge,
        size: tl.constexpr,
        STORED: tl.constexpr,
        EXACT: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        s = _stored(log_scale, scale, group, groups, tiny, huge, STORED)
        forward_tile(weight, s, out, group, groups, smallest, largest, size, STORED, EXACT, ROWS, WIDTH)

    @triton.jit
    def backward_tile(
        weight, scale, grad, grad_weight, grad_log_scale, group, groups, smallest, largest,
        size: tl.constexpr, EXACT: tl.constexpr, WEIGHT: tl.constexpr, SCALE: tl.constexpr,
        ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Gradients of the groups numbered `group` [ROWS] of one weight and of their scales."""
        s = tl.load(scale + group, mask=group < groups, other=1.0).to(tl.float32)
        per_s = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), s)
        total = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, size, WIDTH):
            column = start + tl.arange(0, WIDTH)
            place = group[:, None] * size + column[None, :]
            inside = (group < groups)[:, None] & (column < size)[None, :]
            w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            exact = _quotient(w, s, per_s, EXACT)
            # clipped one beyond the range first: `_nearest` is exact below 2^22 only, and the clip must still be seen
            rounded = _nearest(tl.minimum(tl.maximum(exact, smallest - 1.0), largest + 1.0))
            kept = (rounded >= smallest) & (rounded <= largest)
            if SCALE:
                code = tl.minimum(tl.maximum(rounded, smallest), largest)
                total += tl.sum(g * (code - tl.where(kept, exact, 0.0)), 1)
            if WEIGHT:
                tl.store(grad_weight + place, tl.where(kept, g, 0.0), mask=inside)
        if SCALE:
            tl.store(grad_log_scale + group, total * s, mask=group < groups)

    @triton.jit
    def _backward(
        weight,
        scale,
        grad,
        grad_weight,
        grad_log_scale,
        groups,
        smallest,
        largest,
        size: tl.constexpr,
        EXACT: tl.constexpr,
        WEIGHT: tl.constexpr,
        SCALE: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        backward_tile(
            weight,
            scale,
            grad,
            grad_weight,
            grad_log_scale,
            group,
            groups,
            smallest,
            largest,
            size,
            EXACT,
            WEIGHT,
            SCALE,
            ROWS,
            WIDTH,
        )

    _forward_kernel, _backward_kernel = Kernel(_forward), Kernel(_backward)


def divides(scale: Tensor) -> bool:
    """Whether quotients need a division: float32 scales may have a significand of ones; the interpreter's fma rounds twice."""
    return scale.dtype == torch.float32 or INTERPRETED


def tile_of(size: int) -> dict[str, Any]:
    """A program's tile for groups of `size` weights."""
    width = min(triton.next_power_of_2(size), 1024)
    return {"size": size, "ROWS": max(1, TILE // width), "WIDTH": width, "num_warps": WARPS}


@lru_cache(1024)  # asked by every layer at every call, and Triton's own helpers take microseconds
def _launch(groups: int, size: int) -> tuple[int, tuple[int, int]]:
    """Programs, and rows and width of a program's tile, for so many groups of `size` weights."""
    tile = tile_of(size)
    return -(-groups // tile["ROWS"]), (tile["ROWS"], tile["WIDTH"])


def scales(log_scale: Tensor, stored_dtype: torch.dtype) -> Tensor:
    """Return the stored scales of any number of groups, in one launch."""
    scale = torch.empty(log_scale.shape, dtype=stored_dtype, device=log_scale.device)
    least, most = scale_limits(stored_dtype)
    grid, constants = (triton.cdiv(scale.numel(), 128),), {"STORED": stored_type(stored_dtype), "BLOCK": 128}
    with torch.cuda.device_of(scale):  # Triton starts kernels on the current device
        _scales[grid](log_scale, scale, scale.numel(), least, most, num_warps=WARPS, **constants)
    return scale


def stored_type(dtype: torch.dtype) -> Any:
    """The stored dtype as Triton calls it."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def forward(weight: Tensor, log_scale: Tensor, fmt: QuantFormat, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return w^ [out, in] in ``out_dtype``, rounded to the stored dtype on the way, and the stored scales [out, groups]."""
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    scale = torch.empty(log_scale.shape, dtype=fmt.stored_dtype, device=weight.device)
    groups, size = log_scale.numel(), weight.shape[1] // log_scale.shape[1]
    programs, tile = _launch(groups, size)
    numbers = (groups, *map(float, fmt.code_range), *scale_limits(fmt.stored_dtype))
    constants = (size, stored_type(fmt.stored_dtype), divides(scale), *tile)
    with torch.cuda.device_of(weight):
        _forward_kernel.start(programs, (weight, log_scale, scale, out, *numbers), constants, WARPS)
    return out, scale


def backward(
    weight: Tensor,
    scale: Tensor,
    grad: Tensor,
    fmt: QuantFormat,
    grad_weight: Tensor | None,
    grad_log_scale: Tensor | None,
) -> None:
    """Fill the gradients that are not None from dL/dw^ = ``grad`` [out, in], contiguous; ``grad_weight`` may be ``grad``."""
    groups, size = scale.numel(), weight.shape[1] // scale.shape[1]
    programs, tile = _launch(groups, size)
    wanted = grad if grad_weight is None else grad_weight, scale if grad_log_scale is None else grad_log_scale
    numbers = (groups, *map(float, fmt.code_range))
    constants = (size, divides(scale), grad_weight is not None, grad_log_scale is not None, *tile)
    with torch.cuda.device_of(weight):
        _backward_kernel.start(programs, (weight, scale, grad, *wanted, *numbers), constants, WARPS)
