"""What `losses.head` does with one chunk of logits after the other: in torch, or in place with Triton.

What it does. Both ways form the logits of a chunk of positions, its losses, and the gradient with respect to the logits,
multiply that back onto hidden state and weight, and drop it. ``fused`` keeps one buffer of logits for the student, which
becomes the gradient, and one of half the rows for the teacher; ``eager`` is the same arithmetic in torch, for any device and
dtype.

Legend: n positions of a chunk, N of all, V common vocabulary, d hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grace_plugin.losses import head_triton
from grace_plugin.losses.distill import add_decoupled_gradient, decoupled_terms
from grace_plugin.losses.projection import Gradients, Head, capped
from grace_plugin.losses.rows_triton import Product

__all__ = ["Settings", "Teacher", "eager", "fused", "positions_per_chunk"]


class Settings(NamedTuple):
    """How the losses are taken, in what pieces, and in what types: theirs, and that of the head's gradient as it is summed."""

    temperature: float
    alpha: float
    beta_dkd: float
    chunk: int
    form_gradients: bool
    dtype: torch.dtype
    weight_grad_dtype: torch.dtype | None
    slice: int | None = None  # ids of a teacher's slice, None for `SLICE`


class Teacher(NamedTuple):
    """The teacher's side of all positions."""

    hidden: Tensor  # [N, d_t]
    head: Head
    gate: Tensor  # [N]
    known: Tensor | None = None  # [2, N], of `Entropies`: the mass of v != y at the temperature, and the logit of y


SLICE, TILE = 50688, 128
"""Ids whose logits of the teacher exist at one time where its sums are known; rows that a product works on together.

Tiles of 128 x 256 of 512 rows by so many ids fill 132 multiprocessors six times, with none left over for a seventh round."""


def positions_per_chunk(vocabulary: int, element_size: int, known_of: int = 0) -> int:
    """Positions, 16 to 4,096, whose logits and the teacher's take 209 MiB: 480 for 151,936 ids of 2 bytes.

    known_of: how many positions there are, where the teacher's sums are known: its logits then take `SLICE` columns, not half
    the student's, and the positions are cut evenly, into whole tiles at most. 4,096 of them come in 8 chunks of 512.
    """
    columns = vocabulary + (min(SLICE, vocabulary) if known_of else vocabulary // 2)
    rows = min(max((209 << 20) // max(columns * element_size, 1) // 16 * 16, 16), 4096)
    if not known_of:
        return rows
    rows = rows // TILE * TILE or rows
    even = -(-known_of // -(-known_of // rows))
    return -(-even // 16) * 16


def eager(
    hidden_s: Tensor,
    student: Head,
    teacher: Teacher | None,
    targets: Tensor,
    scales: Tensor,
    settings: Settings,
    gradients: Gradients | None,
) -> Tensor:
    """Sums [CE, gated DKD, gated TCKD, gated NCKD] over all positions in torch; fills ``gradients``."""
    sums = torch.zeros(4, dtype=settings.dtype, device=hidden_s.device)
    for start in range(0, hidden_s.shape[0], settings.chunk):
        rows = slice(start, start + settings.chunk)
        logits_s, known = student.logits(hidden_s[rows]).to(settings.dtype), None
        if hidden_s.dtype.itemsize < 4:  # the target's and the largest, as in `rows_triton`
            ids = torch.stack([targets[rows], logits_s.argmax(dim=1)], dim=1)
            logits_s.scatter_(1, ids, student.unrounded(hidden_s[rows], ids).to(settings.dtype))
        logits_s = capped(logits_s, student.cap)
        if teacher is not None:
            logits_t = teacher.head.logits(teacher.hidden[rows]).to(logits_s.device, settings.dtype)
            known = (capped(logits_t, teacher.head.cap), teacher.gate[rows])
        slope = None if student.cap is None else 1 - (logits_s / student.cap).square_()
        parts, grad = _chunk(logits_s, known, targets[rows], scales, settings)
        if slope is not None:
            grad *= slope
        sums += parts
        if gradients is not None:
            gradients.add(rows, grad, hidden_s[rows], student)
    return sums


def fused(
    hidden_s: Tensor,
    student: Head,
    teacher: Teacher | None,
    targets: Tensor,
    scales: Tensor,
    settings: Settings,
    gradients: Gradients | None,
) -> Tensor:
    """`eager` in place, over one buffer of logits for the student and one of half the rows for the teacher."""
    positions = hidden_s.shape[0]
    chunk = min(settings.chunk, max(positions, 1))
    known = teacher is not None and teacher.known is not None
    half = chunk if known else (chunk + 1) // 2
    space_s, space_t = hidden_s.new_empty(chunk, student.weight.shape[0]), None
    width = SLICE if settings.slice is None else settings.slice
    if teacher is not None:
        columns = teacher.head.weight.shape[0]
        space_t = teacher.hidden.new_empty(half * (min(width, columns) if known else columns))
    losses = torch.zeros(5, positions, dtype=torch.float32, device=hidden_s.device)
    caps = student.cap, None if teacher is None else teacher.head.cap
    how = head_triton.Factors(settings.temperature, settings.alpha, settings.beta_dkd, *caps)
    for start in range(0, positions, chunk):
        rows = slice(start, start + chunk)
        logits_s = student.logits(hidden_s[rows], space_s)
        for first in range(0, logits_s.shape[0], half):
            part = slice(start + first, min(start + first + half, start + chunk, positions))
            gate, logits_t = None, None
            if teacher is not None:
                assert space_t is not None
                gate, logits_t = teacher.gate[part], _of_teacher(teacher, part, space_t, logits_s.device, width)
            head_triton.losses_in_place(
                logits_s[first : first + half], logits_t, targets[part], gate, scales, losses[:, part], how,
                Product(hidden_s[part], student.weight, student.bias),
            )  # fmt: skip
        if gradients is not None:
            gradients.add(rows, logits_s, hidden_s[rows], student, losses[3, rows])
    ce_sum, gated = losses[0].sum(), losses[1:3]
    tckd_sum, nckd_sum = (gated if teacher is None else gated * teacher.gate).sum(dim=1).unbind()
    square = settings.temperature * settings.temperature
    dkd_sum = square * (settings.alpha * tckd_sum + settings.beta_dkd * nckd_sum)
    return torch.stack([ce_sum, dkd_sum, tckd_sum, nckd_sum])


def _of_teacher(
    teacher: Teacher, part: slice, space: Tensor, device: torch.device, width: int
) -> Tensor | head_triton.TeacherSlices:
    """The teacher's logits of some positions, whole or by slices of ``width`` ids, written into ``space``."""
    head, hidden = teacher.head, teacher.hidden[part]
    positions, columns = hidden.shape[0], head.weight.shape[0]

    def into(first: int, end: int) -> Tensor:
        out = space[: positions * (end - first)].view(positions, end - first)
        return head.part(first, end).logits(hidden, out).to(device)

    if teacher.known is None:
        return into(0, columns)
    spans = [(first, min(first + width, columns)) for first in range(0, columns, width)]
    mass, target = teacher.known[:, part].to(device).unbind()
    return head_triton.TeacherSlices(mass, target, spans, into)


def _chunk(
    logits_s: Tensor,
    known: tuple[Tensor, Tensor] | None,
    targets: Tensor,
    scales: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Sums [CE, gated DKD, gated TCKD, gated NCKD] of one chunk, and the loss differentiated by its logits [n, V].

    ``known`` is the teacher's logits [n, V] and gate [n].
    """
    column = targets.unsqueeze(1)
    log_p = torch.log_softmax(logits_s, dim=1)
    ce_sum = -log_p.gather(1, column).sum()
    grad = log_p.exp_()
    grad.scatter_add_(1, column, torch.full_like(column, -1, dtype=grad.dtype))
    grad *= scales[0]
    zero = torch.zeros_like(ce_sum)
    if known is None:
        return torch.stack([ce_sum, zero, zero, zero]), grad
    logits_t, gate = known
    tckd, nckd, directions = decoupled_terms(logits_s, logits_t, targets, settings.temperature)
    square = settings.temperature * settings.temperature
    tckd_sum = (gate * tckd).sum()
    nckd_sum = (gate * nckd).sum()
    dkd_sum = square * (settings.alpha * tckd_sum + settings.beta_dkd * nckd_sum)
    weight = scales[1] * square * gate
    weights = (settings.alpha * weight, settings.beta_dkd * weight)
    add_decoupled_gradient(grad, directions, targets, weights, settings.temperature)
    return torch.stack([ce_sum, dkd_sum, tckd_sum, nckd_sum]), grad
