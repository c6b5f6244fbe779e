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
from grace_plugin.losses.projection import Gradients, Head

__all__ = ["Settings", "Teacher", "eager", "fused", "positions_per_chunk"]


class Settings(NamedTuple):
    """How the losses are taken, and in what types: of the losses, and of the head's gradient while it is summed."""

    temperature: float
    alpha: float
    beta_dkd: float
    chunk: int
    form_gradients: bool
    dtype: torch.dtype
    weight_grad_dtype: torch.dtype | None


class Teacher(NamedTuple):
    """The teacher's side of all positions."""

    hidden: Tensor  # [N, d_t]
    head: Head
    gate: Tensor  # [N]


def positions_per_chunk(vocabulary: int, element_size: int) -> int:
    """Positions, 16 to 4,096, whose logits and half as many of the teacher's take 209 MiB: 480 for 151,936 ids of 2 bytes."""
    rows = (209 << 20) // max(3 * vocabulary * element_size // 2, 1)
    return min(max(rows // 16 * 16, 16), 4096)


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
        if teacher is not None:
            logits_t = teacher.head.logits(teacher.hidden[rows]).to(logits_s.device, settings.dtype)
            known = (logits_t, teacher.gate[rows])
        parts, grad = _chunk(logits_s, known, targets[rows], scales, settings)
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
    half = (chunk + 1) // 2
    space_s = hidden_s.new_empty(chunk, student.weight.shape[0])
    space_t = None if teacher is None else teacher.hidden.new_empty(half, teacher.head.weight.shape[0])
    losses = torch.zeros(5, positions, dtype=torch.float32, device=hidden_s.device)
    for start in range(0, positions, chunk):
        rows = slice(start, start + chunk)
        logits_s = student.logits(hidden_s[rows], space_s)
        for first in range(0, logits_s.shape[0], half):
            part = slice(start + first, min(start + first + half, start + chunk))
            gate, logits_t = None, None
            if teacher is not None:
                gate = teacher.gate[part]
                logits_t = teacher.head.logits(teacher.hidden[part], space_t).to(logits_s.device)
            head_triton.losses_in_place(
                logits_s[first : first + half], logits_t, targets[part], gate, scales, losses[:, part],
                settings.temperature, settings.alpha, settings.beta_dkd,
            )  # fmt: skip
        if gradients is not None:
            gradients.add(rows, logits_s, hidden_s[rows], student)
    ce_sum, gated = losses[0].sum(), losses[1:3]
    tckd_sum, nckd_sum = (gated if teacher is None else gated * teacher.gate).sum(dim=1).unbind()
    square = settings.temperature * settings.temperature
    dkd_sum = square * (settings.alpha * tckd_sum + settings.beta_dkd * nckd_sum)
    return torch.stack([ce_sum, dkd_sum, tckd_sum, nckd_sum])


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
