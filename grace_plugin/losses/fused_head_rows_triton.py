"""The sums of a row of logits from its blocks, with two of its logits unrounded: the target's and the largest.

From the sums of `fused_head_triton` over blocks come a row's losses, the gradient of its target, and the numbers that its
other gradients are made of. bfloat16 keeps 8 bits: a logit between 16 and 32 is off by up to 1/16. Cross-entropy reads the
target's as it is, and the largest holds most of what a confident row gives its gradient, so both are multiplied once more,
in float32, for the price of a block of the row and two rows of the head read again for each position. The other logits, and
all of the teacher's, are taken as they were written.

Legend: n positions of a chunk, N of all, V vocabulary, d hidden width, y the target of a position.
"""

# mypy: allow-untyped-defs

from typing import NamedTuple

from torch import Tensor

from grace_plugin.losses.math_triton import triton

__all__ = ["Product"]


class Product(NamedTuple):
    """What logits [n, V] are the product of."""

    hidden: Tensor  # [n, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]


if triton is not None:
    import triton.language as tl

    from grace_plugin.losses.math_triton import capped, coin_gap, weighted

    @triton.jit
    def _largest(logits, block, V: tl.constexpr, BLOCK: tl.constexpr):
        """Id of the largest logit of a block of a row; the first of several."""
        column = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        return block * BLOCK + tl.argmax(z, 0)

    @triton.jit
    def _unrounded(
        hidden,
        head,
        bias,
        id,
        step_h,
        stride_w,
        step_w,
        cap,
        WIDTH: tl.constexpr,
        BIAS: tl.constexpr,
        CAPPED: tl.constexpr,
        BLOCK: tl.constexpr = 512,
    ):
        """A row of hidden states times a row of the head, in float32."""
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            part = start + tl.arange(0, BLOCK)
            h = tl.load(hidden + part * step_h, mask=part < WIDTH, other=0.0).to(tl.float32)
            w = tl.load(head + part * step_w + id.to(tl.int64) * stride_w, mask=part < WIDTH, other=0.0)
            total += h * w.to(tl.float32)
        z = tl.sum(total, 0)
        if BIAS:
            z += tl.load(bias + id).to(tl.float32)
        return capped(z, cap, CAPPED)

    @triton.jit
    def _both(
        logits,
        hidden,
        head,
        bias,
        block,
        y,
        step_h,
        stride_w,
        step_w,
        cap,
        V: tl.constexpr,
        WIDTH: tl.constexpr,
        BIAS: tl.constexpr,
        CAPPED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Unrounded logits of id y and of the largest of a block, and that one's id."""
        best = _largest(logits, block, V, BLOCK)
        z_y = _unrounded(hidden, head, bias, y, step_h, stride_w, step_w, cap, WIDTH, BIAS, CAPPED)
        z_best = _unrounded(hidden, head, bias, best, step_h, stride_w, step_w, cap, WIDTH, BIAS, CAPPED)
        return z_y, z_best, best

    @triton.jit
    def _of_teacher(logits, place, size, valid, best, lift, per_t, cap, WIDTH: tl.constexpr, CAPPED: tl.constexpr):
        """The teacher's largest logit, and relative to it the sums over v != y of exp(t / T) and exp(t / T) (t - z)."""
        tops = tl.load(place + 3 * size, mask=valid, other=float("-inf"))
        top = tl.max(tops, 0)
        rest = tl.sum(weighted(place + 4 * size, valid, tops - top, per_t), 0)
        gap = tl.sum(weighted(place + 5 * size, valid, tops - top, per_t), 0)
        if WIDTH > 0:
            t = capped(tl.load(logits + best).to(tl.float32), cap, CAPPED)
            gap -= tl.exp((t - top) * per_t) * lift
        return top, rest, gap

    @triton.jit
    def _tckd(odds_t, odds_s):
        """TCKD of two log-odds of the target, and its derivative by the student's."""
        side = tl.where(odds_t > 0.0, -1.0, 1.0)  # of p and 1 - p the smaller ones: their difference does not cancel
        pull = side * (tl.sigmoid(side * odds_s) - tl.sigmoid(side * odds_t))
        return coin_gap(odds_t, odds_s) + coin_gap(-odds_t, -odds_s), pull

    @triton.jit
    def row_sums(
        student, teacher, targets, gates, loss_weights, parts, losses, row_values, masses_t, at_y_t, hidden, head, bias, n, N,
        stride_s, stride_t, stride_h, step_h, stride_w, step_w, per_t, alpha, beta_dkd, cap_s, cap_t, V: tl.constexpr,
        TEACHER: tl.constexpr, CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
        PADDED: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr,
    ):  # fmt: skip
        """Adds the blocks of a row up: its losses, dL/dlogit of its target, and the numbers its gradient is made of. Where the
        hidden states have a WIDTH, its largest logit and its target's are multiplied again."""
        row = tl.program_id(0).to(tl.int64)
        slot, size = tl.arange(0, PADDED), n * SLICES
        place, valid = parts + row * SLICES + slot, slot < SLICES
        z_y = tl.load(losses + 3 * N + row)
        tops = tl.load(place, mask=valid, other=float("-inf"))
        # streaming log-sum-exp: sums of blocks are made relative to the largest logit of the row
        top = tl.max(tops, 0)
        total, best, lift = tl.sum(tl.load(place + size, mask=valid, other=0.0) * tl.exp(tops - top), 0), 0, 0.0
        if WIDTH > 0:
            y, as_written = tl.load(targets + row), z_y
            z_y, z_best, best = _both(
                student + row * stride_s, hidden + row * stride_h, head, bias, tl.argmax(tops, 0), y, step_h, stride_w,
                step_w, cap_s, V, WIDTH, BIAS, CAPPED_S, BLOCK
            )  # fmt: skip
            lift = tl.where(best == y, 0.0, z_best - top)  # of what is not the target
            # the two logits were summed as they were written; the difference to the unrounded ones is added
            total += (tl.exp(z_y - top) - tl.exp(as_written - top)) + (tl.exp(lift) - 1.0)
            tl.store(row_values + 6 * n + row, z_best)
            # an id in float32 is exact below 2^24, more than any vocabulary
            tl.store(row_values + 7 * n + row, best.to(tl.float32))
            tl.store(row_values + 8 * n + row, lift)
        normaliser = top + tl.log(total)
        tl.store(losses + row, normaliser - z_y)
        tl.store(row_values + row, normaliser)
        target_grad = tl.load(loss_weights) * (tl.exp(z_y - normaliser) - 1.0)
        if TEACHER > 0:
            rest_s = tl.sum(weighted(place + 2 * size, valid, tops - top, per_t), 0)
            rest_s += (tl.exp(lift * per_t) - 1.0) if WIDTH > 0 else 0.0
            mass_s = top * per_t + tl.log(rest_s)
            if TEACHER == 1:
                at_t = teacher + row * stride_t
                top_t, rest_t, gap = _of_teacher(at_t, place, size, valid, best, lift, per_t, cap_t, WIDTH, CAPPED_T)
                mass_t = top_t * per_t + tl.log(rest_t)
                tl.store(masses_t + row, mass_t)
                # not mass_s - mass_t, which cancels where both are large and alike
                shift = (top - top_t) * per_t + tl.log(rest_s / rest_t)
                tl.store(losses + 2 * N + row, gap / rest_t * per_t + shift)
            else:
                mass_t = tl.load(masses_t + row)
            tckd, pull = _tckd(tl.load(at_y_t + row) * per_t - mass_t, z_y * per_t - mass_s)
            tl.store(losses + N + row, tckd)
            weight = (
                tl.load(loss_weights + 1) * tl.load(gates + row) / per_t
            )  # T^2 of the loss times 1/T of the derivative
            target_grad += alpha * weight * pull
            tl.store(row_values + n + row, mass_s)
            tl.store(row_values + 3 * n + row, (beta_dkd - alpha * pull) * weight)
            tl.store(row_values + 4 * n + row, beta_dkd * weight)
            tl.store(row_values + 5 * n + row, tl.exp(2.0 * mass_s - normaliser))
        tl.store(losses + 3 * N + row, target_grad * (1.0 - (z_y / cap_s) * (z_y / cap_s)) if CAPPED_S else target_grad)
