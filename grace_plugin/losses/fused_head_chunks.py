"""What the fused head does with one chunk of logits after the other: in torch, or in place with Triton.

Both ways form the logits of a chunk of positions, its losses, and the gradient by the logits, multiply that back onto
hidden states and weight, and drop it. ``fused_chunks`` keeps one buffer of logits for the student, which becomes the
gradient, and one of half the rows for the teacher; ``eager_chunks`` is the same arithmetic in torch, for any device and
dtype.

Legend: n positions of a chunk, N of all, V common vocabulary, d hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grace_plugin.losses import fused_head_triton
from grace_plugin.losses.distill import add_decoupled_gradient, decoupled_terms
from grace_plugin.losses.fused_head_rows_triton import Product


class Head(NamedTuple):
    """A head cut to the common vocabulary, in the type its hidden states are multiplied in."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    cap: float | None = None  # logits are cap * tanh(logits / cap); whoever reads them caps them, in float32

    def part(self, first: int, end: int) -> Head:
        """Return the head of the ids from ``first`` to before ``end``."""
        return Head(self.weight[first:end], None if self.bias is None else self.bias[first:end], self.cap)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return uncapped logits [n, V] of [n, d] in its dtype, written into the first n rows of ``out`` when it is given."""
        if out is None:
            return torch.nn.functional.linear(hidden, self.weight, self.bias)
        out = out[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)

    def unrounded(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return uncapped logits [n, k] of the ids [n, k] of each position [n, d], multiplied in float32."""
        logits = (hidden.float().unsqueeze(1) * self.weight[ids].float()).sum(dim=2)
        return logits if self.bias is None else logits + self.bias[ids].float()


def cut(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: int, cap: float | None = None) -> Head:
    """Return the first ``vocabulary`` rows of a head [rows, d], in the dtype of ``hidden``, without a gradient."""
    bias = None if bias is None else bias[:vocabulary].detach().to(hidden.dtype)
    return Head(weight[:vocabulary].detach().to(hidden.dtype), bias, cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(logits / cap) as a new tensor, or the logits themselves without a cap."""
    return logits if cap is None else (logits / cap).tanh_().mul_(cap)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool = False) -> None:
    """total = left @ right the first time and total += left @ right afterwards, in the precision of ``total``."""
    if total.dtype != left.dtype and not total.is_cuda:  # torch's CPU products round to their inputs' type
        product = left @ right
        total.copy_(product) if first else total.add_(product)
        return
    # on CUDA products of bfloat16 are summed in float32 and can be written in it, without a float32 copy of the factors
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right)
    elif first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def defers_target_rows(hidden: Tensor, weight: Tensor, vocabulary: int, dtype: torch.dtype | None) -> bool:
    """Return whether what targets add to their own rows of the head's gradient is added after all chunks.

    It holds nearly all of the gradient's norm. Added last, it does not make the sum of all else round coarsely, which matters
    where ``dtype`` is bfloat16 and targets are few.
    """
    # a quarter of the vocabulary: with more targets than that most rows are somebody's target anyway
    few = dtype is not None and dtype.itemsize < 4 and 4 * hidden.shape[0] <= vocabulary
    return few and weight.requires_grad


def add_target_rows(
    weight: Tensor, states: Tensor, targets: Tensor, target_grads: Tensor, numbers: int = 1 << 23
) -> None:
    """Add to weight[y] the sum of target_grads * states over positions with target y, summed exactly and rounded once.

    Args:
        weight: [V, d], changed.
        states: [N, d].
        targets: [N].
        target_grads: dL/dlogit of each position's target [N]; sums are taken in its dtype.
        numbers: how many of the [N, d] products exist at one time.
    """
    count, width = states.shape
    if not count:
        return
    numbered = torch.arange(count, device=targets.device)
    # the first position that has each target: positions of one target are summed in that one's row
    first = numbered.new_full(weight.shape[:1], count).scatter_reduce_(0, targets, numbered, "amin")[targets]
    for start in range(0, width, max(numbers // count, 1)):
        columns = slice(start, start + max(numbers // count, 1))
        rows = weight[:, columns].index_select(0, targets).to(target_grads.dtype)
        parts = target_grads.unsqueeze(1) * states[:, columns]
        # both add in the order of the positions, so that a run can be repeated; on CUDA index_add_ would not
        rows.index_put_((first,), parts, accumulate=True) if rows.is_cuda else rows.index_add_(0, first, parts)
        # a target that repeats is written more than once, always with its first position's row
        weight[:, columns].index_copy_(0, targets, rows.index_select(0, first).to(weight.dtype))


class Gradients:
    """Gradients of the student's side, filled chunk by chunk; a part that is not needed is never allocated.

    Args:
        hidden: [N, d].
        weight: the head [rows, d].
        bias: [rows] or None.
        needs: which of the three are needed.
        dtype: of the sums over chunks of bias and, unless ``weight_dtype`` says another, weight.
        weight_dtype: of the weight's sum.
        targets: [N]; given, what each adds to its own row of the weight is left out of the sums and added last, in ``dtype``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: list[bool],
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None,
        targets: Tensor | None = None,
    ) -> None:
        # float16 cannot hold a gradient already divided by the window's tokens; bfloat16 and float32 can.
        self.product_dtype = dtype if hidden.dtype == torch.float16 else hidden.dtype
        self.hidden = torch.empty_like(hidden, dtype=self.product_dtype) if needs[0] else None
        self.weight = torch.empty_like(weight, dtype=weight_dtype or dtype) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None
        self._first, self._states = True, hidden.detach()
        self._target_rows: tuple[Tensor, Tensor] | None = None  # targets, and dL/dlogit of each
        if needs[1] and targets is not None:
            self._target_rows = (targets, hidden.new_empty(len(hidden), dtype=dtype))
        if self.weight is not None and not hidden.shape[0]:
            self.weight.zero_()

    def add(
        self, rows: slice, grad_logits: Tensor, hidden: Tensor, head: Head, target_grads: Tensor | None = None
    ) -> None:
        """Add a chunk: ``grad_logits`` [n, V] of ``hidden`` [n, d]; the former may be written to.

        ``target_grads`` [n] is dL/dlogit of the targets where it is known better than ``grad_logits`` holds it.
        """
        vocabulary = grad_logits.shape[1]
        grad = grad_logits.to(self.product_dtype)
        if self.hidden is not None:
            torch.mm(grad, head.weight.to(self.product_dtype), out=self.hidden[rows])
        if self.bias is not None:
            self.bias[:vocabulary] += grad_logits.sum(dim=0, dtype=self.bias.dtype)
        if self.weight is not None:
            # padded rows of the head are not part of the products; empty_like left anything there
            if self._first:
                self.weight[vocabulary:].zero_()
            if self._target_rows is not None:
                targets, kept = self._target_rows
                column = targets[rows].unsqueeze(1)
                kept[rows] = grad_logits.gather(1, column).squeeze(1) if target_grads is None else target_grads
                # left out of the product, because it is added last
                grad.scatter_(1, column, 0.0)
            _add_product(self.weight[:vocabulary], grad.T, hidden.to(self.product_dtype), self._first)
        self._first = False

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return those of hidden states, weight and bias; None for one that is not needed."""
        if self.weight is not None and self._target_rows is not None:
            add_target_rows(self.weight, self._states, *self._target_rows)
        return self.hidden, self.weight, self.bias


class HeadSettings(NamedTuple):
    """How the losses are taken, in what pieces, and in which dtypes."""

    temperature: float
    alpha: float
    beta_dkd: float
    chunk: int  # positions
    form_gradients: bool
    dtype: torch.dtype  # of the losses
    weight_grad_dtype: torch.dtype | None  # of the sum over chunks of the head's gradient
    slice: int | None = None  # ids of a teacher's slice, None for `SLICE`


class TeacherSide(NamedTuple):
    """The teacher's side of all positions."""

    hidden: Tensor  # [N, d_t]
    head: Head
    gate: Tensor  # [N]
    logsumexp: Tensor | None = None  # [2, N], of `StreamingEntropy`: over v != y at the temperature, and the logit of y


SLICE, TILE = 50688, 128
"""Ids whose logits of the teacher exist at one time where its log-sum-exp is given; rows that a product works on together.

Tiles of 128 x 256 of 512 rows by so many ids fill 132 multiprocessors six times, with none left over for a seventh round."""


def positions_per_chunk(vocabulary: int, element_size: int, positions: int = 0) -> int:
    """Return the number of positions, 16 to 4,096, whose logits of both sides take 209 MiB.

    480 for 151,936 ids of 2 bytes.

    Args:
        vocabulary: V.
        element_size: bytes of a logit.
        positions: N where the teacher's log-sum-exp is given, else 0. The teacher's logits then take `SLICE` columns instead of
            half the student's, and positions are divided evenly, into whole tiles at most: 4,096 come in 8 chunks of 512.
    """
    columns = vocabulary + (min(SLICE, vocabulary) if positions else vocabulary // 2)
    # `python -m benchmarks.speed --parts chunks` compares sizes: small chunks do not fill the device
    rows = min(max((209 << 20) // max(columns * element_size, 1) // 16 * 16, 16), 4096)
    if not positions:
        return rows
    # a product works on tiles of 128 rows: a started tile costs as much as a full one
    rows = rows // TILE * TILE or rows
    even = -(-positions // -(-positions // rows))
    return -(-even // 16) * 16


def eager_chunks(
    hidden_s: Tensor,
    student: Head,
    teacher: TeacherSide | None,
    targets: Tensor,
    loss_weights: Tensor,
    settings: HeadSettings,
    gradients: Gradients | None,
) -> Tensor:
    """Return the sums [CE, gated DKD, gated TCKD, gated NCKD] over all positions; fills ``gradients``."""
    sums = torch.zeros(4, dtype=settings.dtype, device=hidden_s.device)
    for start in range(0, hidden_s.shape[0], settings.chunk):
        rows = slice(start, start + settings.chunk)
        logits_s, pair_t = student.logits(hidden_s[rows]).to(settings.dtype), None
        if hidden_s.dtype.itemsize < 4:  # the target's and the largest, as in `fused_head_rows_triton`
            ids = torch.stack([targets[rows], logits_s.argmax(dim=1)], dim=1)
            logits_s.scatter_(1, ids, student.unrounded(hidden_s[rows], ids).to(settings.dtype))
        logits_s = capped(logits_s, student.cap)
        if teacher is not None:
            logits_t = teacher.head.logits(teacher.hidden[rows]).to(logits_s.device, settings.dtype)
            pair_t = (capped(logits_t, teacher.head.cap), teacher.gate[rows])
        # d tanh: the cap is applied before the losses, so its derivative comes last
        slope = None if student.cap is None else 1 - (logits_s / student.cap).square_()
        parts, grad = _chunk(logits_s, pair_t, targets[rows], loss_weights, settings)
        if slope is not None:
            grad *= slope
        sums += parts
        if gradients is not None:
            gradients.add(rows, grad, hidden_s[rows], student)
    return sums


def fused_chunks(
    hidden_s: Tensor,
    student: Head,
    teacher: TeacherSide | None,
    targets: Tensor,
    loss_weights: Tensor,
    settings: HeadSettings,
    gradients: Gradients | None,
) -> Tensor:
    """Do the same as `eager_chunks` in place, over one buffer of logits for each side."""
    positions = hidden_s.shape[0]
    chunk = min(settings.chunk, max(positions, 1))
    sliced = teacher is not None and teacher.logsumexp is not None
    # whole logits of the teacher for half of the positions at a time, or slices of them for all
    half = chunk if sliced else (chunk + 1) // 2
    space_s, space_t = hidden_s.new_empty(chunk, student.weight.shape[0]), None
    width = SLICE if settings.slice is None else settings.slice
    if teacher is not None:
        columns = teacher.head.weight.shape[0]
        space_t = teacher.hidden.new_empty(half * (min(width, columns) if sliced else columns))
    losses = torch.zeros(5, positions, dtype=torch.float32, device=hidden_s.device)
    caps = student.cap, None if teacher is None else teacher.head.cap
    factors = fused_head_triton.Factors(settings.temperature, settings.alpha, settings.beta_dkd, *caps)
    for start in range(0, positions, chunk):
        rows = slice(start, start + chunk)
        # into the same memory for every chunk: the allocator would keep several such blocks
        logits_s = student.logits(hidden_s[rows], space_s)
        for first in range(0, logits_s.shape[0], half):
            part = slice(start + first, min(start + first + half, start + chunk, positions))
            gate, logits_t = None, None
            if teacher is not None:
                assert space_t is not None
                gate, logits_t = teacher.gate[part], _teacher_logits(teacher, part, space_t, logits_s.device, width)
            product, logits = Product(hidden_s[part], student.weight, student.bias), logits_s[first : first + half]
            fused_head_triton.losses_in_place(
                logits, logits_t, targets[part], gate, loss_weights, losses[:, part], factors, product
            )
        if gradients is not None:
            gradients.add(rows, logits_s, hidden_s[rows], student, losses[3, rows])
    ce_sum, gated = losses[0].sum(), losses[1:3]
    # gated here, on the sums of positions; the kernels have the gate in the gradient already
    tckd_sum, nckd_sum = (gated if teacher is None else gated * teacher.gate).sum(dim=1).unbind()
    square = settings.temperature * settings.temperature
    dkd_sum = square * (settings.alpha * tckd_sum + settings.beta_dkd * nckd_sum)
    return torch.stack([ce_sum, dkd_sum, tckd_sum, nckd_sum])


def _teacher_logits(
    teacher: TeacherSide, part: slice, space: Tensor, device: torch.device, width: int
) -> Tensor | fused_head_triton.TeacherSlices:
    """The teacher's logits of some positions, whole or by slices of ``width`` ids, written into ``space``."""
    head, hidden = teacher.head, teacher.hidden[part]
    positions, columns = hidden.shape[0], head.weight.shape[0]

    def into(first: int, end: int) -> Tensor:
        out = space[: positions * (end - first)].view(positions, end - first)
        return head.part(first, end).logits(hidden, out).to(device)

    if teacher.logsumexp is None:
        return into(0, columns)
    spans = [(first, min(first + width, columns)) for first in range(0, columns, width)]
    logsumexp, target = teacher.logsumexp[:, part].to(device).unbind()
    return fused_head_triton.TeacherSlices(logsumexp, target, spans, into)


def _chunk(
    logits_s: Tensor,
    pair_t: tuple[Tensor, Tensor] | None,
    targets: Tensor,
    loss_weights: Tensor,
    settings: HeadSettings,
) -> tuple[Tensor, Tensor]:
    """Sums [CE, gated DKD, gated TCKD, gated NCKD] of one chunk, and the loss differentiated by its logits [n, V].

    ``pair_t`` holds the teacher's logits [n, V] and gate [n].
    """
    column = targets.unsqueeze(1)
    log_p = torch.log_softmax(logits_s, dim=1)
    ce_sum = -log_p.gather(1, column).sum()
    grad = log_p.exp_()
    grad.scatter_add_(1, column, torch.full_like(column, -1, dtype=grad.dtype))
    grad *= loss_weights[0]
    zero = torch.zeros_like(ce_sum)
    if pair_t is None:
        return torch.stack([ce_sum, zero, zero, zero]), grad
    logits_t, gate = pair_t
    tckd, nckd, directions = decoupled_terms(logits_s, logits_t, targets, settings.temperature)
    square = settings.temperature * settings.temperature
    tckd_sum, nckd_sum = (gate * tckd).sum(), (gate * nckd).sum()
    dkd_sum = square * (settings.alpha * tckd_sum + settings.beta_dkd * nckd_sum)
    weight = loss_weights[1] * square * gate
    weights = (settings.alpha * weight, settings.beta_dkd * weight)
    add_decoupled_gradient(grad, directions, targets, weights, settings.temperature)
    return torch.stack([ce_sum, dkd_sum, tckd_sum, nckd_sum]), grad
