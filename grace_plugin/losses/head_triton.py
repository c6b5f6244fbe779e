"""The chunk of `losses.head` in Triton: each row of logits is read twice and becomes its own gradient.

What it does. A first sweep over the vocabulary takes every sum that the losses need (the log-normalisers of both sides at
temperature 1 and T, and the teacher's expectation of the difference), block by block of a row; a second
sweep adds the blocks up and writes dL/dlogits over the student's logits. Everything between reading and writing is float32.

What it refuses. Nothing: `usable` says whether it can run, and `losses.head` runs the same arithmetic in torch where it cannot.

What it costs. 10 bytes of traffic for each logit in bfloat16 (both sides read twice, one written once), three exponentials.
At temperature 2 the exponential at 1 is the square of the one at T.

Legend: n positions of a chunk, V vocabulary, y the target of a position. Equations as in `losses.distill`.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["blocks", "losses_in_place", "scale_in_place", "usable"]

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:  # torch for CPUs comes without
    triton = None

BLOCK, WARPS = 2048, 4
"""Logits of a row that one program holds, at most; its warps."""


def usable(logits: Tensor) -> bool:
    """Whether the kernels can run on logits [n, V]: bfloat16 or float32 on CUDA (or in Triton's interpreter), 2 ids or more."""
    placed = logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and placed and logits.dtype in (torch.bfloat16, torch.float32) and logits.shape[1] > 1


if triton is not None:

    @triton.jit
    def _log1p(x):  # type: ignore[no-untyped-def]
        """log(1 + x) for x in [0, 1], to float32 rounding also where 1 + x == 1."""
        above = 1.0 + x
        return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))

    @triton.jit
    def _logsigmoid(x):  # type: ignore[no-untyped-def]
        return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))

    @triton.jit
    def _coin_gap(odds_p, odds_q):  # type: ignore[no-untyped-def]
        """p (log p - log q) of the event with log-odds odds_p and odds_q; 0 where p is 0."""
        p = tl.sigmoid(odds_p)
        return tl.where(p > 0.0, p * (_logsigmoid(odds_p) - _logsigmoid(odds_q)), 0.0)

    @triton.jit
    def finite_or_zero(top):  # type: ignore[no-untyped-def]
        """What exponents are taken from: 0 where nothing but -inf was seen, whose difference would be NaN."""
        return tl.where(top > float("-inf"), top, 0.0)

    @triton.jit
    def _weighted(part, known, below, per_t):  # type: ignore[no-untyped-def]
        return tl.load(part, mask=known, other=0.0) * tl.exp(below * per_t)

    @triton.jit
    def _loss_parts(  # type: ignore[no-untyped-def]
        student, teacher, targets, parts, losses, n, N, stride_s, stride_t, per_t,
        V: tl.constexpr, TEACHER: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
    ):  # fmt: skip
        """Of one block of a row, each relative to the largest logit of its side: the sum of exp z, and over v != y those of
        exp(z / T), exp(t / T) and exp(t / T) (t - z)."""
        row = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * BLOCK
        y = tl.load(targets + row)
        if (y >= first) & (y < first + BLOCK):  # the gradient will stand where these are
            tl.store(losses + 3 * N + row, tl.load(student + row * stride_s + y).to(tl.float32))
            tl.store(losses + 4 * N + row, tl.load(teacher + row * stride_t + y).to(tl.float32))
        column = first + tl.arange(0, BLOCK)
        place = parts + row * SLICES + tl.program_id(1)
        size = n * SLICES
        z = tl.load(student + row * stride_s + column, mask=column < V, other=float("-inf")).to(tl.float32)
        top_s = tl.max(z, 0)
        shifted = z - finite_or_zero(top_s)
        e = tl.exp(shifted * per_t)
        tl.store(place, top_s)
        tl.store(place + size, tl.sum(e * e if SQUARES else tl.exp(shifted), 0))
        if TEACHER:
            others = column != y
            t = tl.load(teacher + row * stride_t + column, mask=column < V, other=float("-inf")).to(tl.float32)
            top_t = tl.max(t, 0)
            e_t = tl.where(others, tl.exp((t - finite_or_zero(top_t)) * per_t), 0.0)
            tl.store(place + 2 * size, tl.sum(tl.where(others, e, 0.0), 0))
            tl.store(place + 3 * size, top_t)
            tl.store(place + 4 * size, tl.sum(e_t, 0))
            tl.store(place + 5 * size, tl.sum(tl.where(e_t > 0.0, e_t * (t - z), 0.0), 0))

    @triton.jit
    def _row_sums(  # type: ignore[no-untyped-def]
        gates, scales, parts, losses, row_values, n, N, per_t, alpha, beta_dkd,
        TEACHER: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr,
    ):  # fmt: skip
        """Adds the blocks of a row up: its losses, and the seven numbers its gradient is made of."""
        row = tl.program_id(0).to(tl.int64)
        slot = tl.arange(0, PADDED)
        place = parts + row * SLICES + slot
        size = n * SLICES
        known = slot < SLICES
        z_y = tl.load(losses + 3 * N + row)
        tops = tl.load(place, mask=known, other=float("-inf"))
        top = tl.max(tops, 0)
        normaliser = top + tl.log(tl.sum(tl.load(place + size, mask=known, other=0.0) * tl.exp(tops - top), 0))
        tl.store(losses + row, normaliser - z_y)
        tl.store(row_values + row, normaliser)
        tl.store(row_values + n + row, tl.exp(z_y - normaliser))
        if TEACHER:
            mass_s = top * per_t + tl.log(tl.sum(_weighted(place + 2 * size, known, tops - top, per_t), 0))
            tops_t = tl.load(place + 3 * size, mask=known, other=float("-inf"))
            top_t = tl.max(tops_t, 0)
            rest_t = tl.sum(_weighted(place + 4 * size, known, tops_t - top_t, per_t), 0)
            gap = tl.sum(_weighted(place + 5 * size, known, tops_t - top_t, per_t), 0)
            mass_t = top_t * per_t + tl.log(rest_t)
            odds_s = z_y * per_t - mass_s
            odds_t = tl.load(losses + 4 * N + row) * per_t - mass_t
            tl.store(losses + N + row, _coin_gap(odds_t, odds_s) + _coin_gap(-odds_t, -odds_s))
            tl.store(losses + 2 * N + row, gap / rest_t * per_t + (mass_s - mass_t))
            above = tl.sigmoid(-odds_t) - tl.sigmoid(-odds_s)
            below = tl.sigmoid(odds_s) - tl.sigmoid(odds_t)
            pull = tl.where(odds_t > 0.0, above, below)
            weight = tl.load(scales + 1) * tl.load(gates + row) / per_t  # T^2 of the loss, 1/T of the inner derivative
            tl.store(row_values + 2 * n + row, mass_s)
            tl.store(row_values + 3 * n + row, mass_t)
            tl.store(row_values + 4 * n + row, alpha * weight * pull)
            tl.store(row_values + 5 * n + row, beta_dkd * weight)
            tl.store(row_values + 6 * n + row, tl.exp(2.0 * mass_s - normaliser))

    @triton.jit
    def _gradient(  # type: ignore[no-untyped-def]
        student, teacher, targets, scales, row_values, n, stride_s, stride_t, per_t,
        V: tl.constexpr, TEACHER: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Writes dL/dlogits over one block of a row."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < V
        z = tl.load(student + row * stride_s + column, mask=inside, other=float("-inf")).to(tl.float32)
        at_y = column == tl.load(targets + row)
        scale_ce = tl.load(scales)
        normaliser = tl.load(row_values + row)
        p_y = tl.load(row_values + n + row)
        if TEACHER:
            mass_s = tl.load(row_values + 2 * n + row)
            mass_t = tl.load(row_values + 3 * n + row)
            toward = tl.load(row_values + 4 * n + row)
            weight_n = tl.load(row_values + 5 * n + row)
            u = tl.where(at_y, 0.0, tl.exp(z * per_t - mass_s))
            t = tl.load(teacher + row * stride_t + column, mask=inside, other=float("-inf")).to(tl.float32)
            u_t = tl.where(at_y, 0.0, tl.exp(t * per_t - mass_t))
            p = u * u * tl.load(row_values + 6 * n + row) if SQUARES else tl.exp(z - normaliser)
            grad = scale_ce * tl.where(at_y, p_y - 1.0, p) + (weight_n - toward) * u - weight_n * u_t
            grad += tl.where(at_y, toward, 0.0)
        else:
            grad = scale_ce * (tl.exp(z - normaliser) - tl.where(at_y, 1.0, 0.0))
        tl.store(student + row * stride_s + column, grad, mask=inside)

    @triton.jit
    def _scale(numbers, factor, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        by = tl.load(factor)
        if by != 1.0:
            place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = place < count
            tl.store(numbers + place, tl.load(numbers + place, mask=inside).to(tl.float32) * by, mask=inside)


def scale_in_place(numbers: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by a 0-dimensional one; a factor of 1, the usual one, costs no traffic and no sync."""
    if numbers.numel():
        _scale[(triton.cdiv(numbers.numel(), 8192),)](numbers, factor, numbers.numel(), BLOCK=8192, num_warps=8)


def blocks(vocabulary: int) -> dict[str, int]:
    """A row's blocks: how long, and how many of them."""
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    return {"V": vocabulary, "BLOCK": block, "SLICES": triton.cdiv(vocabulary, block), "num_warps": WARPS}


def losses_in_place(
    logits_s: Tensor,
    logits_t: Tensor | None,
    targets: Tensor,
    gate: Tensor | None,
    scales: Tensor,
    losses: Tensor,
    temperature: float,
    alpha: float,
    beta_dkd: float,
) -> None:
    """CE, TCKD and NCKD of each position in nats (ungated); the student's logits become their gradient.

    Args:
        logits_s: [n, V], rows contiguous; overwritten with d(scales[0] CE + scales[1] gate DKD) / dlogits in its own dtype.
        logits_t: [n, V], or None for cross-entropy alone.
        targets: [n] int64.
        gate: [n] float32.
        scales: [2] float32 on the device: factor of CE, factor of gated DKD.
        losses: [5, n] float32, columns contiguous; receives CE, TCKD, NCKD and the two logits of the target.
    """
    n, vocabulary = logits_s.shape
    if not n:
        return
    shape = blocks(vocabulary)
    slices, warps = shape["SLICES"], shape["num_warps"]
    teaches = logits_t is not None
    teacher = logits_s if logits_t is None else logits_t
    parts = torch.empty(6, n, slices, dtype=torch.float32, device=logits_s.device)
    row_values = torch.empty(7, n, dtype=torch.float32, device=logits_s.device)
    strides, per_t = (logits_s.stride(0), teacher.stride(0)), 1.0 / temperature
    flags = {"V": vocabulary, "TEACHER": teaches, "SQUARES": teaches and temperature == 2.0, "BLOCK": shape["BLOCK"]}
    _loss_parts[(n, slices)](
        logits_s,
        teacher,
        targets,
        parts,
        losses,
        n,
        losses.stride(0),
        *strides,
        per_t,
        SLICES=slices,
        num_warps=warps,
        **flags,
    )
    _row_sums[(n,)](
        scales if gate is None else gate, scales, parts, losses, row_values, n, losses.stride(0), per_t, alpha, beta_dkd,
        TEACHER=teaches, SLICES=slices, PADDED=triton.next_power_of_2(slices), num_warps=1,
    )  # fmt: skip
    _gradient[(n, slices)](
        logits_s, teacher, targets, scales, row_values, n, *strides, per_t, num_warps=warps, **flags
    )  # fmt: skip
