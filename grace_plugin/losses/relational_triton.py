"""Relational loss of bfloat16 states in Triton: two Gram matrices in, the loss and the matrix of its gradient out.

Products of bfloat16 numbers are exact in float32, so kernels are taken from the states as they are (tensor cores) and
everything after them is float32 on n x n. With r_i = 1 / |x_i|, K_ij = r_i r_j G_ij and A, B the centred kernels of teacher
and student, c = <A, B> / (|A| |B|), the loss 1 - c has d(1 - c)/dB = (c B / |B| - A / |A|) / |B| =: D, which is centred as
A and B are. Through the unit rows this is M x with the symmetric M_ij = 2 r_i r_j D_ij, less 2 r_i^2 (D K)_ii on the
diagonal: one matrix product, taken with M split into two bfloat16 matrices (16 of float32's 24 bits). Memory is two float32
and two bfloat16 matrices [b, n, n].

Legend: b images of n tokens each; widths d_s, d_t.
"""

# mypy: allow-untyped-defs

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["KERNEL_DEGENERATE", "countable", "relation", "usable"]

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:  # torch for CPUs comes without it
    triton = None

KERNEL_DEGENERATE = 1e-6
"""|K~| / n at which float32 rounding of kernels centred after their product is as large as what is measured. Rows of bfloat16
that differ at all differ by more."""


def usable(*features: Tensor) -> bool:
    """Return whether features [b, n, d] are bfloat16 on CUDA (or interpreted) and n x n is no larger than n x d."""
    placed = all(part.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" for part in features)
    fits = all(part.dtype == torch.bfloat16 and part.shape[1] <= part.shape[2] for part in features)
    return triton is not None and placed and fits


if triton is not None:

    @triton.jit
    def _lengths(gram, inverse, means, n: tl.constexpr, BLOCK: tl.constexpr):
        """1 / |x_i| and the mean of row i of K."""
        image, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
        gram += image * n * n
        square = tl.load(gram + row * n + row)
        # a row of zeros stays a row of zeros
        mine = tl.rsqrt(tl.where(square > 0.0, square, 1.0))
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < n
            other = tl.load(gram + column * n + column, mask=inside, other=1.0)
            length = tl.rsqrt(tl.where(other > 0.0, other, 1.0))
            total += tl.load(gram + row * n + column, mask=inside, other=0.0) * length
        tl.store(inverse + image * n + row, mine)
        tl.store(means + image * n + row, tl.sum(total, 0) * mine / n)

    @triton.jit
    def _centred(gram, inverse, means, mine, mean, middle, row, column, inside, n: tl.constexpr):
        """Entries of K and of K~ in one row."""
        kernel = tl.load(gram + row * n + column, mask=inside, other=0.0)
        kernel *= mine * tl.load(inverse + column, mask=inside, other=0.0)
        centred = kernel - mean - tl.load(means + column, mask=inside, other=0.0) + middle
        return kernel, tl.where(inside, centred, 0.0)

    @triton.jit
    def _total(numbers, n: tl.constexpr, BLOCK: tl.constexpr):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            place = start + tl.arange(0, BLOCK)
            total += tl.load(numbers + place, mask=place < n, other=0.0)
        return tl.sum(total, 0)

    @triton.jit
    def _products(gram, inverse, means, sums, images, offset, n: tl.constexpr, BLOCK: tl.constexpr):
        """Of row i: <A, A>, <B, B> and <A, B>; the student's numbers lie `offset` images after the teacher's."""
        image, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
        gram_t, inverse_t, means_t = gram + image * n * n, inverse + image * n, means + image * n
        gram_s, inverse_s, means_s = gram_t + offset * n * n, inverse_t + offset * n, means_t + offset * n
        mine_t, mine_s = tl.load(inverse_t + row), tl.load(inverse_s + row)
        mean_t, mean_s = tl.load(means_t + row), tl.load(means_s + row)
        middle_t, middle_s = _total(means_t, n, BLOCK) / n, _total(means_s, n, BLOCK) / n
        aa = tl.zeros([BLOCK], tl.float32)
        bb = tl.zeros([BLOCK], tl.float32)
        ab = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < n
            _, a = _centred(gram_t, inverse_t, means_t, mine_t, mean_t, middle_t, row, column, inside, n)
            _, b = _centred(gram_s, inverse_s, means_s, mine_s, mean_s, middle_s, row, column, inside, n)
            aa += a * a
            bb += b * b
            ab += a * b
        place = sums + image * n + row
        tl.store(place, tl.sum(aa, 0))
        tl.store(place + images * n, tl.sum(bb, 0))
        tl.store(place + 2 * images * n, tl.sum(ab, 0))

    @triton.jit
    def _direction(
        gram,
        inverse,
        means,
        sums,
        high,
        low,
        losses,
        counts,
        images,
        offset,
        least,
        n: tl.constexpr,
        GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Row i of M as two bfloat16 parts; the first row also writes the image's loss, 0 where it does not count."""
        image, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
        sums += image * n
        square_t, square_s = _total(sums, n, BLOCK), _total(sums + images * n, n, BLOCK)
        inner = _total(sums + 2 * images * n, n, BLOCK)
        # NaN is not less than anything: a non-finite state is counted and reaches the loss
        skip = (square_t <= least) | (square_s <= least)
        norm_t, norm_s = tl.sqrt(tl.where(skip, 1.0, square_t)), tl.sqrt(tl.where(skip, 1.0, square_s))
        cka = tl.where(skip, 0.0, inner) / (norm_t * norm_s)
        if row == 0:
            tl.store(losses + image, tl.where(skip, 0.0, 1.0 - cka))
            tl.store(counts + image, tl.where(skip, 0, 1))
        if GRADIENT:
            by_t = tl.where(skip, 0.0, 1.0 / (norm_t * norm_s))
            by_s = tl.where(skip, 0.0, cka / (norm_s * norm_s))
            gram_t, inverse_t, means_t = gram + image * n * n, inverse + image * n, means + image * n
            gram_s, inverse_s, means_s = gram_t + offset * n * n, inverse_t + offset * n, means_t + offset * n
            high, low = high + image * n * n + row * n, low + image * n * n + row * n
            mine_t, mine_s = tl.load(inverse_t + row), tl.load(inverse_s + row)
            mean_t, mean_s = tl.load(means_t + row), tl.load(means_s + row)
            middle_t, middle_s = _total(means_t, n, BLOCK) / n, _total(means_s, n, BLOCK) / n
            along = tl.zeros([BLOCK], tl.float32)
            for start in range(0, n, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < n
                _, a = _centred(gram_t, inverse_t, means_t, mine_t, mean_t, middle_t, row, column, inside, n)
                kernel, b = _centred(gram_s, inverse_s, means_s, mine_s, mean_s, middle_s, row, column, inside, n)
                along += (by_s * b - by_t * a) * kernel
            diagonal = 2.0 * tl.sum(along, 0) * mine_s * mine_s
            for start in range(0, n, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < n
                _, a = _centred(gram_t, inverse_t, means_t, mine_t, mean_t, middle_t, row, column, inside, n)
                _, b = _centred(gram_s, inverse_s, means_s, mine_s, mean_s, middle_s, row, column, inside, n)
                length = tl.load(inverse_s + column, mask=inside, other=0.0)
                entry = 2.0 * mine_s * length * (by_s * b - by_t * a) - tl.where(column == row, diagonal, 0.0)
                # two bfloat16 parts: tensor cores multiply bfloat16, and one part would lose 16 of 24 bits
                rounded = entry.to(tl.bfloat16)
                tl.store(high + column, rounded, mask=inside)
                tl.store(low + column, (entry - rounded.to(tl.float32)).to(tl.bfloat16), mask=inside)


def _block(tokens: int) -> int:
    return int(min(max(triton.next_power_of_2(tokens), 16), 1024))


def _bmm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """bfloat16 [b, i, k] times [b, k, j] in float32, into ``out``."""
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32, out=out)
    return torch.bmm(left.float(), right.float(), out=out)


def _aligned(features_t: Tensor, features_s: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 - CKA [b] float32, whether each image counts [b] bool, M as two bfloat16 parts [b, n, n] (empty without gradient)."""
    images, tokens, _ = features_s.shape
    sides = [features_t] if features_s is features_t else [features_t, features_s]
    offset, device = images * (len(sides) - 1), features_s.device
    gram = torch.empty(len(sides) * images, tokens, tokens, dtype=torch.float32, device=device)
    for features, part in zip(sides, gram.split(images), strict=True):
        _bmm(features, features.mT, part)
    inverse, means = torch.empty(2, *gram.shape[:2], dtype=torch.float32, device=device)
    sums = torch.empty(3, images, tokens, dtype=torch.float32, device=device)
    shape: dict[str, Any] = {"n": tokens, "BLOCK": _block(tokens), "num_warps": 4}
    _lengths[(tokens, len(gram))](gram, inverse, means, **shape)
    _products[(tokens, images)](gram, inverse, means, sums, images, offset, **shape)
    losses = torch.empty(images, dtype=torch.float32, device=device)
    counts = torch.empty(images, dtype=torch.bool, device=device)
    high, low = features_s.new_empty(2, images, tokens, tokens if gradient else 0)
    least = (KERNEL_DEGENERATE * tokens) ** 2
    rows = tokens if gradient else 1
    _direction[(rows, images)](
        gram, inverse, means, sums, high, low, losses, counts, images, offset, least, GRADIENT=gradient, **shape
    )
    return losses, counts, high, low


class _Relation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_t: Tensor, features_s: Tensor) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(features_s):  # Triton starts kernels on the current device
            losses, counts, high, low = _aligned(features_t, features_s, ctx.needs_input_grad[1])
        ctx.save_for_backward(features_s, high, low)
        counted = counts.sum()
        ctx.mark_non_differentiable(counted)
        return losses.sum(), counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor]:
        features, high, low = ctx.saved_tensors
        out = _bmm(high, features, torch.empty(features.shape, dtype=torch.float32, device=features.device))
        if out.is_cuda:
            torch.baddbmm(out, low, features, out_dtype=torch.float32, out=out)
        else:
            out += torch.bmm(low.float(), features.float())
        return None, torch.mul(out, grad, out=torch.empty_like(features))


def relation(features_t: Tensor, features_s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of 1 - CKA over the images that count (float32) and their number (int64).

    Differentiable by ``features_s``.

    Args:
        features_t: [b, n, d_t] bfloat16.
        features_s: [b, n, d_s] bfloat16.
    """
    found: tuple[Tensor, Tensor] = _Relation.apply(features_t, features_s)
    return found


@torch.no_grad()
def countable(features: Tensor) -> Tensor:
    """Return which images' centred kernels can be measured [b] bool, by the rule of :func:`relation`."""
    with torch.cuda.device_of(features):
        return _aligned(features, features, False)[1]
