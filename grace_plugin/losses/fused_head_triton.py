"""A chunk of the fused head in Triton: each row of logits is read twice and becomes its own gradient.

A first sweep over the vocabulary takes every sum that the losses need (the log-normalisers of both sides at temperature 1 and
T, and the teacher's expectation of the difference), block by block of a row; `fused_head_rows_triton` adds the blocks up; a
second sweep writes dL/dlogits over the student's logits. Everything between reading and writing is float32.

Traffic is 10 bytes for each logit in bfloat16 (both sides read twice, one written once; 8 where the teacher's log-sum-exp is
given, whose logits are then read once), and three exponentials: at temperature 2 the one at 1 is the square of the one at T.

Legend: n positions of a chunk, V vocabulary, y the target of a position. Equations as in `losses.distill`.
"""

# mypy: allow-untyped-defs

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace_plugin.losses.fused_head_rows_triton import Product
from grace_plugin.losses.math_triton import WARPS, blocks, triton

__all__ = ["Factors", "TeacherSlices", "losses_in_place", "usable"]


def usable(logits: Tensor) -> bool:
    """Return whether the kernels take logits [n, V]: bfloat16 or float32 on CUDA (or interpreted), 2 ids or more."""
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
    """A teacher whose log-sum-exp over v != y is given: its logits are then needed once, and come some columns at a time."""

    logsumexp: Tensor  # [n], log of the sum of exp(t / T) over v != y
    target: Tensor  # [n], capped logit of y
    spans: list[tuple[int, int]]  # first column and end of each slice
    logits: Callable[[int, int], Tensor]  # of a span, [n, columns]


if triton is not None:
    import triton.language as tl

    from grace_plugin.losses.fused_head_rows_triton import row_sums
    from grace_plugin.losses.math_triton import LOG2_E, capped, finite_or_zero, load_logits

    @triton.jit
    def _loss_parts(
        student,
        teacher,
        targets,
        parts,
        losses,
        n,
        N,
        stride_s,
        stride_t,
        per_t,
        cap_s,
        cap_t,
        V: tl.constexpr,
        TEACHER: tl.constexpr,
        SQUARES: tl.constexpr,
        CAPPED_S: tl.constexpr,
        CAPPED_T: tl.constexpr,
        BLOCK: tl.constexpr,
        SLICES: tl.constexpr,
    ):
        """Of one block of a row, each relative to the largest logit of its side: the sum of exp z, and over v != y those of
        exp(z / T), exp(t / T) and exp(t / T) (t - z)."""
        row = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * BLOCK
        y = tl.load(targets + row)
        local_y = y.to(tl.int32) - first
        holds_y = (local_y >= 0) & (local_y < BLOCK)
        # a branch, because a selection in every block would cost more than one in the block that holds y
        if holds_y:  # read now: the second sweep writes the gradient over these logits
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
        # exp2 is one instruction, exp two; the factor joins a multiplication that is there anyway
        e = tl.exp2(shifted * (per_t * LOG2_E))
        # relative to the block's largest logit; `row_sums` makes all blocks relative to the row's
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
            # where: t - z of two ids that are cut is -inf - -inf
            tl.store(place + 5 * size, tl.sum(tl.where(e_t > 0.0, e_t * (t - z), 0.0), 0))

    @triton.jit
    def _pull(
        z,
        u,
        u_t,
        weight_ce,
        lse,
        squared,
        weight_s,
        weight_n,
        cap_s,
        TEACHER: tl.constexpr,
        SQUARES: tl.constexpr,
        CAPPED_S: tl.constexpr,
    ):
        """dL/dlogit of any id but the target's; u and u_t are what both sides give it among those, at T."""
        if TEACHER == 0:
            grad = weight_ce * tl.exp2((z - lse) * LOG2_E)
        elif SQUARES:
            grad = u * (u * (weight_ce * squared) + weight_s) - weight_n * u_t
        else:
            grad = weight_ce * tl.exp2((z - lse) * LOG2_E) + weight_s * u - weight_n * u_t
        return grad * (1.0 - (z / cap_s) * (z / cap_s)) if CAPPED_S else grad

    @triton.jit(do_not_specialize=["done"])
    def _gradient(
        student, teacher, targets, target_grads, loss_weights, row_values, masses_t, gaps, n, first, done, all_blocks,
        stride_s, stride_t, per_t, cap_s, cap_t, V: tl.constexpr, TEACHER: tl.constexpr, SQUARES: tl.constexpr,
        CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr, UNROUNDED: tl.constexpr,
    ):  # fmt: skip
        """Writes dL/dlogits over one block of V columns from `first` on, whose logits of the teacher begin at its own column 0;
        adds NCKD up where the teacher's log-sum-exp was given (TEACHER is 2)."""
        row, local = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (local < V) | (V % BLOCK == 0)
        at, at_t = student + row * stride_s + first, teacher + row * stride_t
        z = load_logits(at + local, inside, cap_s, CAPPED_S)
        y = (tl.load(targets + row) - first).to(tl.int32) - tl.program_id(1) * BLOCK
        ids = tl.minimum(BLOCK, V - tl.program_id(1) * BLOCK)  # at V begins the next slice, which others write
        holds_y = (y >= 0) & (y < ids)
        if UNROUNDED:
            best = tl.load(row_values + 7 * n + row).to(tl.int32) - first - tl.program_id(1) * BLOCK
        weight_ce, lse, u, u_t = tl.load(loss_weights), tl.load(row_values + row), z, z
        squared, weight_s, weight_n, mass_s, mass_t = 0.0, 0.0, 0.0, 0.0, 0.0
        if TEACHER > 0:
            mass_s, mass_t = tl.load(row_values + n + row), tl.load(masses_t + row)
            weight_s, weight_n = tl.load(row_values + 3 * n + row), tl.load(row_values + 4 * n + row)
            squared = tl.load(row_values + 5 * n + row)
            t = load_logits(at_t + local, inside, cap_t, CAPPED_T)
            u = tl.exp2(z * (per_t * LOG2_E) - mass_s * LOG2_E)
            u_t = tl.exp2(t * (per_t * LOG2_E) - mass_t * LOG2_E)
            if holds_y:  # these are over v != y; the target has a gradient of its own
                at_y = tl.arange(0, BLOCK) == y
                u, u_t = tl.where(at_y, 0.0, u), tl.where(at_y, 0.0, u_t)
        grad = _pull(z, u, u_t, weight_ce, lse, squared, weight_s, weight_n, cap_s, TEACHER, SQUARES, CAPPED_S)
        tl.store(at + local, grad, mask=inside)
        if TEACHER == 2:
            gap = tl.sum(u_t * tl.where(u_t > 0.0, (t - z) * per_t + (mass_s - mass_t), 0.0), 0)
        if holds_y:
            tl.debug_barrier()  # another thread has just written there; the later write must win
            tl.store(at + tl.program_id(1) * BLOCK + y, tl.load(target_grads + row))
        if UNROUNDED:
            if (best >= 0) & (best < ids) & (best != y):
                z_best, u_best, u_t_best = tl.load(row_values + 6 * n + row), 0.0, 0.0
                if TEACHER > 0:
                    t_best = capped(tl.load(at_t + tl.program_id(1) * BLOCK + best).to(tl.float32), cap_t, CAPPED_T)
                    u_best = tl.exp2(z_best * (per_t * LOG2_E) - mass_s * LOG2_E)
                    u_t_best = tl.exp2(t_best * (per_t * LOG2_E) - mass_t * LOG2_E)
                if TEACHER == 2:
                    gap -= u_t_best * per_t * tl.load(row_values + 8 * n + row)
                tl.debug_barrier()  # as above
                grad_best = _pull(
                    z_best,
                    u_best,
                    u_t_best,
                    weight_ce,
                    lse,
                    squared,
                    weight_s,
                    weight_n,
                    cap_s,
                    TEACHER,
                    SQUARES,
                    CAPPED_S,
                )
                tl.store(at + tl.program_id(1) * BLOCK + best, grad_best)
        if TEACHER == 2:
            tl.store(gaps + row * all_blocks + done + tl.program_id(1), gap)


def losses_in_place(
    logits_s: Tensor,
    teacher: Tensor | TeacherSlices | None,
    targets: Tensor,
    gate: Tensor | None,
    loss_weights: Tensor,
    losses: Tensor,
    factors: Factors,
    product: Product | None = None,
) -> None:
    """Compute CE, TCKD and NCKD of each position in nats (not gated); the student's logits become their gradient.

    Args:
        logits_s: [n, V], rows contiguous; overwritten with the loss differentiated by them, in their own dtype.
        teacher: logits [n, V], or slices of them where their log-sum-exp is given, or None for cross-entropy alone.
        targets: [n] int64.
        gate: [n] float32.
        loss_weights: [2] float32 on the device, of CE and of gated DKD.
        losses: [5, n] float32, columns contiguous; receives CE, TCKD, NCKD, the gradient of the target's own logit, unrounded,
            and, where the teacher's logits come whole, its logit of the target.
        factors: temperature, weights of TCKD and NCKD, caps.
        product: what logits_s are the product of; given, bfloat16 ones are unrounded at the target and the largest.
    """
    n, vocabulary = logits_s.shape
    if not n:
        return
    slices, block = (blocks(vocabulary)[name] for name in ("SLICES", "BLOCK"))
    parts = torch.empty(6, n, slices, dtype=torch.float32, device=logits_s.device)
    row_values = torch.empty(9, n, dtype=torch.float32, device=logits_s.device)
    mode, per_t, caps = (
        0 if teacher is None else 1,
        1.0 / factors.temperature,
        (factors.cap_s or 1.0, factors.cap_t or 1.0),
    )
    logits_t = read = teacher if isinstance(teacher, Tensor) else logits_s
    spans, sums_t = [(0, vocabulary)], (row_values[2], losses[4])
    if isinstance(teacher, TeacherSlices):
        mode, spans, sums_t = 2, teacher.spans, (teacher.logsumexp, teacher.target)
        logits_t = teacher.logits(*spans[0])  # first, so that all else is prepared while the device multiplies
    counts = [triton.cdiv(end - first, block) for first, end in spans]
    gaps = torch.empty(n, sum(counts), dtype=torch.float32, device=logits_s.device)
    hidden, head, bias = product or (logits_s, logits_s, None)
    unrounded = product is not None and logits_s.dtype == torch.bfloat16
    squares = mode > 0 and factors.temperature == 2.0
    row_s, row_t, row_l = logits_s.stride(0), read.stride(0), losses.stride(0)
    flags: dict[str, Any] = {
        "TEACHER": mode,
        "CAPPED_S": factors.cap_s is not None,
        "CAPPED_T": factors.cap_t is not None,
    }
    flags |= {"BLOCK": block, "num_warps": WARPS}
    sums: dict[str, Any] = {"WIDTH": hidden.shape[1] if unrounded else 0, "BIAS": bias is not None}
    sums |= {"V": vocabulary, "SLICES": slices, "PADDED": triton.next_power_of_2(slices), **flags}
    inputs = logits_s, read, targets, loss_weights if gate is None else gate, loss_weights
    operands = hidden, head, head if bias is None else bias
    weights = per_t, factors.alpha, factors.beta_dkd
    with torch.cuda.device_of(logits_s):  # Triton starts kernels on the current device
        swept = {"V": vocabulary, "SQUARES": squares, "SLICES": slices, **flags}
        _loss_parts[(n, slices)](*inputs[:3], parts, losses, n, row_l, row_s, row_t, per_t, *caps, **swept)
        strides = row_s, row_t, *hidden.stride(), *head.stride()
        row_sums[(n,)](
            *inputs, parts, losses, row_values, *sums_t, *operands, n, row_l, *strides, *weights, *caps, **sums
        )
        written, swept = (targets, losses[3], loss_weights, row_values, sums_t[0], gaps), {"SQUARES": squares, **flags}
        for number, ((first, end), count) in enumerate(zip(spans, counts, strict=True)):
            logits_t = teacher.logits(first, end) if number and isinstance(teacher, TeacherSlices) else logits_t
            places = n, first, sum(counts[:number]), gaps.shape[1], row_s, logits_t.stride(0)
            swept |= {"V": end - first, "UNROUNDED": unrounded}
            _gradient[(n, count)](logits_s, logits_t, *written, *places, per_t, *caps, **swept)
    if mode == 2:
        torch.sum(gaps, dim=1, out=losses[2])
