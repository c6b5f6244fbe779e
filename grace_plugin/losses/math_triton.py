"""Functions that the kernels of this package share: blocks of a row, float32 formulas, a multiplication in place."""

# mypy: allow-untyped-defs

from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["WARPS", "blocks", "multiply_in_place", "triton"]

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:  # torch for CPUs comes without it
    triton = None

BLOCK, WARPS = 2048, 4
"""Logits of a row that one program holds, at most; its warps."""

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) is 2^(x log2 e): the factor joins one that multiplies anyway

    @triton.jit
    def weighted(part, valid, below, per_t):
        """Sums of blocks, each taken relative to the block's largest logit, now relative to the row's, `below` apart."""
        return tl.load(part, mask=valid, other=0.0) * tl.exp(below * per_t)

    @triton.jit
    def _log1p(x):
        """log(1 + x) for x in [0, 1], to float32 rounding also where 1 + x == 1."""
        above = 1.0 + x
        return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))

    @triton.jit
    def _logsigmoid(x):
        return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))

    @triton.jit
    def coin_gap(odds_p, odds_q):
        """p (log p - log q) of the event with log-odds odds_p and odds_q; 0 where p is 0."""
        p = tl.sigmoid(odds_p)
        return tl.where(p > 0.0, p * (_logsigmoid(odds_p) - _logsigmoid(odds_q)), 0.0)

    @triton.jit
    def finite_or_zero(top):
        """What exponents are taken from: 0 where nothing but -inf was seen, whose difference would be NaN."""
        return tl.where(top > float("-inf"), top, 0.0)

    @triton.jit
    def capped(z, cap, CAPPED: tl.constexpr):
        """cap * tanh(z / cap), or z as it is."""
        return cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0) if CAPPED else z

    @triton.jit
    def load_logits(place, inside, cap, CAPPED: tl.constexpr):
        """Logits in float32, capped; -inf outside the row."""
        z = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
        return tl.where(inside, capped(z, cap, CAPPED), float("-inf")) if CAPPED else z

    @triton.jit
    def _multiply(numbers, factor, count, BLOCK: tl.constexpr):
        by = tl.load(factor)
        if by != 1.0:
            place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = place < count
            tl.store(numbers + place, tl.load(numbers + place, mask=inside).to(tl.float32) * by, mask=inside)


def blocks(vocabulary: int) -> dict[str, int]:
    """Return how long the blocks of a row of logits are, and how many, as the kernels' arguments."""
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    return {"V": vocabulary, "BLOCK": block, "SLICES": triton.cdiv(vocabulary, block), "num_warps": WARPS}


def multiply_in_place(numbers: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by a 0-dimensional one; a factor of 1, the usual one, costs no traffic and no sync."""
    if numbers.numel():
        with torch.cuda.device_of(numbers):
            _multiply[(triton.cdiv(numbers.numel(), 8192),)](numbers, factor, numbers.numel(), BLOCK=8192, num_warps=8)
