"""The chunk of `losses.head` in Triton: each row of logits is read twice and becomes its own gradient.

What it does. A first sweep over the vocabulary takes every sum that the losses need (the log-normalisers of both sides at
temperature 1 and T, and the teacher's expectation of the difference), block by block of a row; a second
sweep adds the blocks up and writes dL/dlogits over the student's logits. Everything between reading and writing is float32.

What it refuses. Nothing: `usable` says whether it can run, and `losses.head` runs the same arithmetic in torch where it cannot.

What it costs. 10 bytes of traffic for each logit in bfloat16 (both sides read twice, one written once; 8 where the teacher's
sums are known, whose logits are then read once and come by columns), three exponentials.
At temperature 2 the exponential at 1 is the square of the one at T.

Legend: n positions of a chunk, V vocabulary, y the target of a position. Equations as in `losses.distill`.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grace_plugin.losses.math_triton import triton

__all__ = ["Factors", "TeacherSlices", "blocks", "losses_in_place", "usable"]

BLOCK, WARPS = 2048, 4
"""Logits of a row that one program holds, at most; its warps."""


def usable(logits: Tensor) -> bool:
    """Whether the kernels can run on logits [n, V]: bfloat16 or float32 on CUDA (or in Triton's interpreter), 2 ids or more."""
    placed = logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and placed and logits.dtype in (torch.bfloat16, torch.float32) and logits.shape[1] > 1


class Factors(NamedTuple):
    """How losses are taken: temperature, weights of TCKD and NCKD, and caps of the two sides' logits (None for none)."""

    temperature: float
    alpha: float
    beta_dkd: float
    cap_s: float | None
    cap_t: float | None


class TeacherSlices(NamedTuple):
    """A teacher whose sums over v != y are known: its logits are then needed once, and come some columns at a time."""

    mass: Tensor  # [n], log of the sum of exp(t / T) over v != y
    target: Tensor  # [n], capped logit of y
    spans: list[tuple[int, int]]  # first column and end of each slice
    logits: Callable[[int, int], Tensor]  # of a span, [n, columns]


if triton is not None:
    import triton.language as tl

    from grace_plugin.losses.math_triton import LOG2_E, capped, coin_gap, finite_or_zero, load_logits, weighted

    @triton.jit
    def _loss_parts(  # type: ignore[no-untyped-def]
        student, teacher, targets, parts, losses, n, N, stride_s, stride_t, per_t, cap_s, cap_t,
        V: tl.constexpr, TEACHER: tl.constexpr, SQUARES: tl.constexpr, CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr,
        BLOCK: tl.constexpr, SLICES: tl.constexpr,
    ):  # fmt: skip
        """Of one block of a row, each relative to the largest logit of its side: the sum of exp z, and over v != y those of
        exp(z / T), exp(t / T) and exp(t / T) (t - z)."""
        row = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * BLOCK
        y = tl.load(targets + row)
        local_y = y.to(tl.int32) - first
        holds_y = (local_y >= 0) & (local_y < BLOCK)  # one block of many: only that one is worth a selection
        if holds_y:  # the gradient will stand where these are
            at = tl.load(student + row * stride_s + y).to(tl.float32)
            tl.store(losses + 3 * N + row, capped(at, cap_s, CAPPED_S))
            if TEACHER == 1:
                at = tl.load(teacher + row * stride_t + y).to(tl.float32)
                tl.store(losses + 4 * N + row, capped(at, cap_t, CAPPED_T))
        column = first + tl.arange(0, BLOCK)
        place, size = parts + row * SLICES + tl.program_id(1), n * SLICES
        z = load_logits(student + row * stride_s + column, column < V, cap_s, CAPPED_S)
        top_s = tl.max(z, 0)
        shifted = z - finite_or_zero(top_s)
        e = tl.exp2(shifted * (per_t * LOG2_E))
        tl.store(place, top_s)
        tl.store(place + size, tl.sum(e * e if SQUARES else tl.exp2(shifted * LOG2_E), 0))
        if TEACHER > 0:
            if holds_y:
                e = tl.where(tl.arange(0, BLOCK) == local_y, 0.0, e)
            tl.store(place + 2 * size, tl.sum(e, 0))
        if TEACHER == 1:
            t = load_logits(teacher + row * stride_t + column, column < V, cap_t, CAPPED_T)
            top_t = tl.max(t, 0)
            e_t = tl.exp2((t - finite_or_zero(top_t)) * (per_t * LOG2_E))
            if holds_y:
                e_t = tl.where(tl.arange(0, BLOCK) == local_y, 0.0, e_t)
            tl.store(place + 3 * size, top_t)
            tl.store(place + 4 * size, tl.sum(e_t, 0))
            tl.store(place + 5 * size, tl.sum(tl.where(e_t > 0.0, e_t * (t - z), 0.0), 0))

    @triton.jit
    def _row_sums(  # type: ignore[no-untyped-def]
        gates, scales, parts, losses, row_values, n, N, per_t, alpha, beta_dkd, cap_s,
        TEACHER: tl.constexpr, CAPPED_S: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr,
    ):  # fmt: skip
        """Adds the blocks of a row up: its losses, dL/dlogit of its target, and the numbers its gradient is made of."""
        row = tl.program_id(0).to(tl.int64)
        slot, size = tl.arange(0, PADDED), n * SLICES
        place, known = parts + row * SLICES + slot, slot < SLICES
        z_y = tl.load(losses + 3 * N + row)
        tops = tl.load(place, mask=known, other=float("-inf"))
        top = tl.max(tops, 0)
        normaliser = top + tl.log(tl.sum(tl.load(place + size, mask=known, other=0.0) * tl.exp(tops - top), 0))
        tl.store(losses + row, normaliser - z_y)
        tl.store(row_values + row, normaliser)
        own = tl.load(scales) * (tl.exp(z_y - normaliser) - 1.0)
        if TEACHER > 0:
            rest_s = tl.sum(weighted(place + 2 * size, known, tops - top, per_t), 0)
            mass_s = top * per_t + tl.log(rest_s)
            if TEACHER == 1:
                tops_t = tl.load(place + 3 * size, mask=known, other=float("-inf"))
                top_t = tl.max(tops_t, 0)
                rest_t = tl.sum(weighted(place + 4 * size, known, tops_t - top_t, per_t), 0)
                gap = tl.sum(weighted(place + 5 * size, known, tops_t - top_t, per_t), 0)
                mass_t = top_t * per_t + tl.log(rest_t)
                tl.store(row_values + 2 * n + row, mass_t)
                apart = (top - top_t) * per_t + tl.log(rest_s / rest_t)  # of masses that may be large and alike
                tl.store(losses + 2 * N + row, gap / rest_t * per_t + apart)
            else:
                mass_t = tl.load(row_values + 2 * n + row)
            odds_s = z_y * per_t - mass_s
            odds_t = tl.load(losses + 4 * N + row) * per_t - mass_t
            tl.store(losses + N + row, coin_gap(odds_t, odds_s) + coin_gap(-odds_t, -odds_s))
            side = tl.where(odds_t > 0.0, -1.0, 1.0)  # the smaller probabilities differ more exactly
            pull = side * (tl.sigmoid(side * odds_s) - tl.sigmoid(side * odds_t))
            weight = tl.load(scales + 1) * tl.load(gates + row) / per_t  # T^2 of the loss, 1/T of the inner derivative
            own += alpha * weight * pull
            tl.store(row_values + n + row, mass_s)
            tl.store(row_values + 3 * n + row, (beta_dkd - alpha * pull) * weight)
            tl.store(row_values + 4 * n + row, beta_dkd * weight)
            tl.store(row_values + 5 * n + row, tl.exp(2.0 * mass_s - normaliser))
        tl.store(losses + 3 * N + row, own * (1.0 - (z_y / cap_s) * (z_y / cap_s)) if CAPPED_S else own)

    @triton.jit(do_not_specialize=["done"])
    def _gradient(  # type: ignore[no-untyped-def]
        student, teacher, targets, owns, scales, row_values, gaps, n, first, done, all_blocks, stride_s, stride_t,
        per_t, cap_s, cap_t, V: tl.constexpr, TEACHER: tl.constexpr, SQUARES: tl.constexpr, CAPPED_S: tl.constexpr,
        CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Writes dL/dlogits over one block of V columns from `first` on, whose logits of the teacher begin at its own column 0;
        adds NCKD up where the teacher's mass was known before (TEACHER is 2)."""
        row = tl.program_id(0).to(tl.int64)
        local = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (local < V) | (V % BLOCK == 0)
        place = student + row * stride_s + first + local
        z = load_logits(place, inside, cap_s, CAPPED_S)
        y = (tl.load(targets + row) - first).to(tl.int32) - tl.program_id(1) * BLOCK
        holds_y = (y >= 0) & (y < BLOCK) & (y < V - tl.program_id(1) * BLOCK)  # V is where the next slice begins
        scale_ce = tl.load(scales)
        if TEACHER > 0:
            mass_s = tl.load(row_values + n + row)
            mass_t = tl.load(row_values + 2 * n + row)
            away, weight_n = tl.load(row_values + 3 * n + row), tl.load(row_values + 4 * n + row)
            t = load_logits(teacher + row * stride_t + local, inside, cap_t, CAPPED_T)
            u = tl.exp2(z * (per_t * LOG2_E) - mass_s * LOG2_E)
            u_t = tl.exp2(t * (per_t * LOG2_E) - mass_t * LOG2_E)
            if holds_y:  # these are over v != y, and the target's gradient comes by itself
                at_y = tl.arange(0, BLOCK) == y
                u, u_t = tl.where(at_y, 0.0, u), tl.where(at_y, 0.0, u_t)
            if SQUARES:
                grad = u * (u * (scale_ce * tl.load(row_values + 5 * n + row)) + away)
            else:
                grad = scale_ce * tl.exp2((z - tl.load(row_values + row)) * LOG2_E) + away * u
            grad -= weight_n * u_t
            if TEACHER == 2:
                gap = tl.where(u_t > 0.0, (t - z) * per_t + (mass_s - mass_t), 0.0)
                tl.store(gaps + row * all_blocks + done + tl.program_id(1), tl.sum(u_t * gap, 0))
        else:
            grad = scale_ce * tl.exp2((z - tl.load(row_values + row)) * LOG2_E)
        if CAPPED_S:
            grad *= 1.0 - (z / cap_s) * (z / cap_s)
        tl.store(place, grad, mask=inside)
        if holds_y:
            tl.debug_barrier()  # behind what stands there by now
            tl.store(student + row * stride_s + first + tl.program_id(1) * BLOCK + y, tl.load(owns + row))


def blocks(vocabulary: int) -> dict[str, int]:
    """A row's blocks: how long, and how many of them."""
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    return {"V": vocabulary, "BLOCK": block, "SLICES": triton.cdiv(vocabulary, block), "num_warps": WARPS}


def losses_in_place(
    logits_s: Tensor,
    teacher: Tensor | TeacherSlices | None,
    targets: Tensor,
    gate: Tensor | None,
    scales: Tensor,
    losses: Tensor,
    how: Factors,
) -> None:
    """CE, TCKD and NCKD of each position in nats (ungated); the student's logits become their gradient.

    Args:
        logits_s: [n, V], rows contiguous; overwritten with d(scales[0] CE + scales[1] gate DKD) / dlogits in its own dtype.
        teacher: logits [n, V], or slices of them where their mass is known, or None for cross-entropy alone.
        targets: [n] int64.
        gate: [n] float32.
        scales: [2] float32 on the device: factor of CE, factor of gated DKD.
        losses: [5, n] float32, columns contiguous; receives CE, TCKD, NCKD, the gradient of the target's own logit, unrounded,
            and the teacher's logit of it.
    """
    n, vocabulary = logits_s.shape
    if not n:
        return
    shape = blocks(vocabulary)
    slices, block = shape["SLICES"], shape["BLOCK"]
    parts = torch.empty(6, n, slices, dtype=torch.float32, device=logits_s.device)
    row_values = torch.empty(6, n, dtype=torch.float32, device=logits_s.device)
    mode, per_t, caps = 0 if teacher is None else 1, 1.0 / how.temperature, (how.cap_s or 1.0, how.cap_t or 1.0)
    read, spans = teacher if isinstance(teacher, Tensor) else logits_s, [(0, vocabulary)]
    if isinstance(teacher, TeacherSlices):
        mode, spans = 2, teacher.spans
        row_values[2], losses[4] = teacher.mass, teacher.target
    counts = [triton.cdiv(end - first, block) for first, end in spans]
    gaps = torch.empty(n, sum(counts), dtype=torch.float32, device=logits_s.device)
    flags = {
        "TEACHER": mode, "SQUARES": mode > 0 and how.temperature == 2.0, "CAPPED_S": how.cap_s is not None,
        "CAPPED_T": how.cap_t is not None, "BLOCK": block, "num_warps": WARPS,
    }  # fmt: skip
    with torch.cuda.device_of(logits_s):  # Triton starts kernels on the current device
        _loss_parts[(n, slices)](
            logits_s, read, targets, parts, losses, n, losses.stride(0), logits_s.stride(0), read.stride(0), per_t, *caps,
            V=vocabulary, SLICES=slices, **flags,
        )  # fmt: skip
        _row_sums[(n,)](
            scales if gate is None else gate, scales, parts, losses, row_values, n, losses.stride(0), per_t, how.alpha,
            how.beta_dkd, caps[0], TEACHER=mode, CAPPED_S=flags["CAPPED_S"], SLICES=slices,
            PADDED=triton.next_power_of_2(slices), num_warps=1,
        )  # fmt: skip
        for number, ((first, end), count) in enumerate(zip(spans, counts, strict=True)):
            logits_t = teacher.logits(first, end) if isinstance(teacher, TeacherSlices) else read
            _gradient[(n, count)](
                logits_s, logits_t, targets, losses[3], scales, row_values, gaps, n, first, sum(counts[:number]),
                gaps.shape[1], logits_s.stride(0), logits_t.stride(0), per_t, *caps, V=end - first, **flags,
            )  # fmt: skip
    if mode == 2:
        torch.sum(gaps, dim=1, out=losses[2])
