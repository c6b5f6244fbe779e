"""Relational alignment of visual tokens by centred kernel alignment (arXiv 2601.22709, section on RCKA).

The tokens of one image resemble each other in some way: which patches look alike. Student and teacher have different widths, so
their states cannot be compared, but their *similarities between tokens* can. With l2-normalised rows, K = V V^T and K~ = H K H
(H = I - 11^T / n takes the mean token out),

    CKA = <K~_T, K~_S> / (|K~_T| |K~_S|),        loss of an image = 1 - CKA   in [0, 1].

An image with fewer than 4 visual tokens, or whose centred norm is degenerate (all tokens alike) on either side, is skipped and
counted; a non-finite hidden state is *not* skipped: it makes the loss NaN, which the training loop sees.

Images of one size are one batch of matrix products, with autocast off. bfloat16 states on CUDA are multiplied as they are
(`losses.relational_triton`) where the n x n form is the cheaper one. Elsewhere rows are normalised and centred in float32,
and the n x n form or the d x d form |V_T~^T V_S~|^2, which is the same number, is taken, whichever needs fewer operations.

Legend: M visual tokens of I images one after the other, n tokens of one image, b images of one size, d_s, d_t widths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grace_plugin.losses import relational_triton
from grace_plugin.losses.distill import full_precision, loss_dtype

MIN_TOKENS = 4
"""Images with fewer visual tokens are skipped: the centred kernel of 3 tokens has 2 degrees of freedom."""

DEGENERATE = 1e-9
"""|K~| / n at which rounding of unit rows to float32 is as large as what is measured."""


class RelationalOutput(NamedTuple):
    """Sum over the counted images, how many they are, and how many were left out."""

    loss_sum: Tensor  # 0-dimensional, differentiable by hidden_s
    images: Tensor  # 0-dimensional int64
    skipped: Tensor  # 0-dimensional int64


def _unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1 [..., n, d]; a row of zeros stays zero and its gradient finite."""
    # where, not clamp: the gradient through the root of 0 is infinite, and 0 * inf is NaN
    square = features.square().sum(dim=-1, keepdim=True)
    return features * torch.where(square > 0, square, 1.0).rsqrt()


def _unit_scale(features: Tensor) -> Tensor:
    """One factor for all rows [n, d], so that a row is of length 1 in the root mean square."""
    square = features.square().sum(dim=1).mean()
    return features * torch.where(square > 0, square, 1.0).rsqrt()


def _centred(features: Tensor) -> Tensor:
    return features - features.mean(dim=-2, keepdim=True)


def _square_norm(centred: Tensor) -> Tensor:
    """|K~|_F^2 of centred features [b, n, d] -> [b], by the smaller of the two products."""
    tokens, width = centred.shape[-2:]
    # the two products have the same norm; the smaller one costs less
    kernel = centred @ centred.mT if tokens <= width else centred.mT @ centred
    return kernel.square().sum(dim=(-2, -1))


def _inner(centred_t: Tensor, centred_s: Tensor) -> Tensor:
    """<K~_T, K~_S> of two centred batches [b, n, d_t], [b, n, d_s] -> [b]."""
    tokens, width_t = centred_t.shape[-2:]
    width_s = centred_s.shape[-1]
    # operations of two n x n kernels against those of one d x d product
    if tokens * (width_t + width_s) <= width_t * width_s:
        return ((centred_t @ centred_t.mT) * (centred_s @ centred_s.mT)).sum(dim=(-2, -1))
    return (centred_t.mT @ centred_s).square().sum(dim=(-2, -1))


def _degenerate(square_norm: Tensor, tokens: int) -> Tensor:
    """True where |K~| / n is not measurable; False for NaN, which has to be seen."""
    # a comparison with NaN is False, so a NaN is counted and reaches the loss
    return square_norm <= (DEGENERATE * tokens) ** 2


def _alignment(centred_t: Tensor, centred_s: Tensor) -> tuple[Tensor, Tensor]:
    """CKA [b] (0 where skipped) and whether each image counts [b]; safe forward and backward."""
    tokens = centred_t.shape[-2]
    square_t, square_s = _square_norm(centred_t), _square_norm(centred_s)
    skip = _degenerate(square_t, tokens) | _degenerate(square_s, tokens)
    # a masked 1 in the root: the gradient of sqrt(0) would be infinite also where the value is not used
    norms = torch.where(skip, 1.0, square_t).sqrt() * torch.where(skip, 1.0, square_s).sqrt()
    return torch.where(skip, 0.0, _inner(centred_t, centred_s)) / norms, ~skip


def linear_cka(features_t: Tensor, features_s: Tensor) -> Tensor:
    """Return the linear centred kernel alignment of two views of the same n items, in [0, 1]; 0 when one of them is degenerate.

    Rows are taken as they are (not normalised). Differentiable by both.

    Args:
        features_t: [n, d_t].
        features_s: [n, d_s]; the widths may differ.

    Raises:
        ValueError: not two matrices with the same number of rows.
    """
    if features_t.ndim != 2 or features_s.ndim != 2 or features_t.shape[0] != features_s.shape[0]:
        raise ValueError(
            "linear_cka needs two matrices with the same rows, got "
            f"{tuple(features_t.shape)} and {tuple(features_s.shape)}"
        )
    dtype = loss_dtype(features_t, features_s)
    with full_precision(features_s):
        centred_t = _centred(_unit_scale(features_t.to(dtype)))
        centred_s = _centred(_unit_scale(features_s.to(dtype)))
        return _alignment(centred_t[None], centred_s[None])[0][0]


def _check_sizes(hidden: Tensor, sizes: Sequence[int]) -> None:
    if hidden.ndim != 2 or sum(sizes) != hidden.shape[0] or any(size < 0 for size in sizes):
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} do not split into images of {list(sizes)} visual tokens; "
            "the sizes must add up to the rows"
        )


def _by_size(sizes: Sequence[int]) -> dict[int, list[int]]:
    """Size -> numbers of the images that have it; images under MIN_TOKENS are left out."""
    groups: dict[int, list[int]] = {}
    for image, size in enumerate(sizes):
        if size >= MIN_TOKENS:
            groups.setdefault(size, []).append(image)
    return groups


def _batch(hidden: Tensor, sizes: Sequence[int], members: list[int]) -> Tensor:
    """Rows of the members, images of one size, as [b, n, d]; a view when they are all there is."""
    if len(members) == len(sizes):
        return hidden.unflatten(0, (len(sizes), -1))
    parts = hidden.split(list(sizes))
    return torch.stack([parts[image] for image in members])


@torch.no_grad()
def countable_images(hidden_t: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return which images can count [I] bool, from the teacher's side and the sizes alone, before the student has run.

    Their number over the whole window (all micro-batches and ranks) is the divisor of the relational loss.

    Args:
        hidden_t: [M, d_t], rows of all images one after the other.
        sizes: visual tokens of each image.

    Raises:
        ValueError: the sizes do not add up to M.
    """
    _check_sizes(hidden_t, sizes)
    too_small = torch.zeros((), dtype=torch.bool, device=hidden_t.device)
    counted = [too_small for _ in sizes]
    with full_precision(hidden_t):
        for size, images in _by_size(sizes).items():
            batch = _batch(hidden_t, sizes, images)
            if relational_triton.usable(batch):
                fine = relational_triton.countable(batch)
            else:
                fine = ~_degenerate(_square_norm(_centred(_unit_rows(batch.to(loss_dtype(hidden_t))))), size)
            for image, counts in zip(images, fine.unbind()):
                counted[image] = counts
    return torch.stack(counted) if counted else too_small.new_zeros(0)


def relational_loss(hidden_s: Tensor, hidden_t: Tensor, sizes: Sequence[int]) -> RelationalOutput:
    """Return the sum over images of 1 - CKA between the sides' visual tokens, with the number of images it was taken over.

    Args:
        hidden_s: [M, d_s], the student's penultimate-layer states at the visual tokens, image by image.
        hidden_t: [M, d_t], the teacher's; a constant.
        sizes: visual tokens of each image, host integers that add up to M. Empty (M == 0) gives an exact zero that
            stays differentiable.

    Raises:
        ValueError: the rows of the sides differ or the sizes do not add up to M.
    """
    _check_sizes(hidden_s, sizes)
    _check_sizes(hidden_t, sizes)
    dtype = loss_dtype(hidden_s, hidden_t)
    losses, counted = [], []
    with full_precision(hidden_s):
        # one batch for each size: a loop over images would start their kernels one by one
        for members in _by_size(sizes).values():
            batch_s, batch_t = _batch(hidden_s, sizes, members), _batch(hidden_t.detach(), sizes, members)
            if relational_triton.usable(batch_s, batch_t):
                loss, count = relational_triton.relation(batch_t, batch_s)
            else:
                centred_t, centred_s = _centred(_unit_rows(batch_t.to(dtype))), _centred(_unit_rows(batch_s.to(dtype)))
                cka, counts = _alignment(centred_t, centred_s)
                loss, count = torch.where(counts, 1.0 - cka, 0.0).sum(), counts.sum()
            losses.append(loss)
            counted.append(count)
        if not losses:
            none = torch.zeros((), dtype=torch.int64, device=hidden_s.device)
            return RelationalOutput(hidden_s[:0].sum(dtype=dtype), none, none + len(sizes))
    loss_sum, images = sum(losses[1:], losses[0]), sum(counted[1:], counted[0])
    return RelationalOutput(loss_sum, images, len(sizes) - images)
