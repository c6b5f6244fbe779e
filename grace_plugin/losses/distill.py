"""Gated decoupled knowledge distillation from logits (arXiv 2601.22709, section on GDKD).

At a supervised position with correct token y, the Kullback-Leibler divergence from teacher to student splits into two
questions: *is it y?* (TCKD, a divergence between two Bernoulli distributions) and *if it is not y, what else?* (NCKD, a
divergence between the two distributions over the other tokens). Plain distillation weighs the second one by ``1 - P_T(y)``, so
where the teacher is sure its knowledge of the alternatives is lost. Decoupling gives both a weight of their own, and a gate
reduces positions at which the teacher is not sure.

    KL(P_T || P_S) = TCKD + (1 - P_T(y)) * NCKD                     (equal temperatures)
    DKD            = (alpha * TCKD + beta * NCKD) * T^2
    gate           = exp(-k * H(P_T at T = 1) / log V)

Ids a vocabulary lacks are either cut from both sides or set to ``-inf`` on both sides: the results are the same. A student
``-inf`` where the teacher has mass is an infinite divergence, and is returned as such. The gradient is written by hand and
needs one [N, V] matrix.

Legend: N supervised positions, V common vocabulary. All values are in nats, float32 (float64 for float64 inputs).
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid


def loss_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype a loss is computed in: float64 when any given tensor is float64, else float32.

    bfloat16 has 8 significant bits, too few for a logarithm of probabilities or a difference of two of them.
    """
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context that switches autocast off on the device of ``tensor``, which must not change a loss."""
    device = tensor.device.type
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )


class Directions(NamedTuple):
    """What the gradient is made of.

    With u the student's logit at temperature T (``logit / T``), ``d tckd / d u = pull * (onehot(y) - others_s)`` and
    ``d nckd / d u = others_s - others_t``.
    """

    pull: Tensor  # [N], P_S(y) - P_T(y)
    others_s: Tensor  # [N, V], student renormalised over the tokens that are not y; 0 at y
    others_t: Tensor  # [N, V], the same of the teacher


def decoupled_terms(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Directions]:
    """Return TCKD [N], NCKD [N] and the parts of their gradients, without an autograd graph.

    Args:
        student_logits: [N, V], any floating type.
        teacher_logits: [N, V], any floating type; its own device and type may differ in precision, not in shape.
        targets: [N] int64, the correct token of each position, inside [0, V).
        temperature: T > 0, the same on both sides.
    """
    dtype = loss_dtype(student_logits, teacher_logits)
    with torch.no_grad():
        # log(1 - p) comes from the log-odds of y against the others: 1 - exp(log p) is 0 for a confident teacher
        odds_s, log_others_s = _split(student_logits.to(dtype), targets, temperature)
        odds_t, log_others_t = _split(teacher_logits.to(dtype), targets, temperature)
        # logsigmoid of the log-odds is exact at both ends, where log of a probability near 1 is 0
        tckd = _weighted_gap(logsigmoid(odds_t), logsigmoid(odds_s))
        tckd = tckd + _weighted_gap(logsigmoid(-odds_t), logsigmoid(-odds_s))
        nckd = _weighted_gap(log_others_t, log_others_s).sum(dim=1)
        # The difference of two probabilities near 1 is the difference of their complements, which does not cancel.
        from_above = torch.sigmoid(-odds_t) - torch.sigmoid(-odds_s)
        from_below = torch.sigmoid(odds_s) - torch.sigmoid(odds_t)
        pull = torch.where(odds_t > 0, from_above, from_below)
        return tckd, nckd, Directions(pull, log_others_s.exp_(), log_others_t.exp_())


def _split(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-odds of the target against all others [N], and log-probabilities of the others among themselves [N, V]."""
    column = targets.unsqueeze(1)
    scaled = logits / temperature
    target = scaled.gather(1, column)
    # removed by -inf, not subtracted from the sum: what remains may be smaller than its rounding
    others = scaled.scatter_(1, column, -math.inf)
    mass = torch.logsumexp(others, dim=1, keepdim=True)
    # Without a single other token the mass is -inf, and -inf - (-inf) would be NaN: such a row has no others at all.
    others = others.sub_(torch.where(mass == -math.inf, 0.0, mass))
    return (target - mass).squeeze(1), others


def _weighted_gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p * (log p - log q), and 0 where p is 0, whatever q is."""
    p = log_p.exp()
    # 0 * (-inf) is NaN, where the limit is 0: ids that a vocabulary lacks
    return torch.where(p > 0, p * (log_p - log_q), 0.0)


def add_decoupled_gradient(
    grad_logits: Tensor, directions: Directions, targets: Tensor, weights: tuple[Tensor, Tensor], temperature: float
) -> Tensor:
    """Add ``sum_i weights[0][i] * TCKD_i + weights[1][i] * NCKD_i`` differentiated by the student's logits, in place.

    Args:
        grad_logits: [N, V], changed and returned.
        directions: of the same N positions.
        targets: [N] int64.
        weights: two [N] tensors, the weight of each position's TCKD and of its NCKD.
        temperature: as given to :func:`decoupled_terms`.
    """
    # 1 / T is the inner derivative of logit / T
    weight_tckd, weight_nckd = (weight.unsqueeze(1) / temperature for weight in weights)
    toward_target = weight_tckd * directions.pull.unsqueeze(1)
    # in place: the gradient is as large as a chunk's logits
    grad_logits.addcmul_(directions.others_s, weight_nckd - toward_target)
    grad_logits.addcmul_(directions.others_t, -weight_nckd)
    return grad_logits.scatter_add_(1, targets.unsqueeze(1), toward_target)


class _DecoupledKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor,
        temperature: float,
        alpha: float,
        beta: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tckd, nckd, directions = decoupled_terms(student_logits, teacher_logits, targets, temperature)
        ctx.settings = (temperature, alpha, beta)
        ctx.save_for_backward(targets, *directions)
        return tckd, nckd, _combine(tckd, nckd, temperature, alpha, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tckd: Tensor, grad_nckd: Tensor, grad_dkd: Tensor) -> tuple[Tensor | None, ...]:
        targets, *saved = ctx.saved_tensors
        directions = Directions(*saved)
        temperature, alpha, beta = ctx.settings
        scale = temperature * temperature
        weights = (grad_tckd + alpha * scale * grad_dkd, grad_nckd + beta * scale * grad_dkd)
        grad = torch.zeros_like(directions.others_s)
        return add_decoupled_gradient(grad, directions, targets, weights, temperature), None, None, None, None, None


def _combine(tckd: Tensor, nckd: Tensor, temperature: float, alpha: float, beta: float) -> Tensor:
    return (alpha * tckd + beta * nckd) * (temperature * temperature)


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature that is not positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive finite number, got {temperature}; the default is 2.0")


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decoupled distillation of every position: ``(TCKD [N], NCKD [N], DKD [N])`` in nats, not gated, not reduced.

    Differentiable (once) by ``student_logits`` only; the teacher is a constant.

    Args:
        student_logits: [N, V], any floating type.
        teacher_logits: [N, V].
        targets: [N] int64 inside [0, V): supervised positions only, no ignore index.
        temperature: T > 0; the divergences are taken at T, DKD carries the factor T^2.
        alpha: weight of TCKD in DKD.
        beta: weight of NCKD in DKD.

    Raises:
        ValueError: a temperature that is not positive, or shapes that do not agree.
    """
    check_temperature(temperature)
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must be "
            "two [positions, vocabulary] matrices of one shape; cut both to the common vocabulary first"
        )
    if targets.shape != student_logits.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} targets for {student_logits.shape[0]} positions; give one per row")
    outputs: tuple[Tensor, Tensor, Tensor] = _DecoupledKD.apply(
        student_logits, teacher_logits.detach(), targets, temperature, alpha, beta
    )
    return outputs


@torch.no_grad()
def confidence_gate(teacher_logits: Tensor, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return how much each position counts: ``(gate [N] in [exp(-k), 1], entropy [N] in nats)``, without gradient.

    ``gate = exp(-k * H / log V)`` with H the entropy of the teacher's distribution at temperature 1 and V the number
    of ids that are not cut (``-inf``) in that row; with k = 1 this is the published gate, about 0.92 at 1 nat.

    Args:
        teacher_logits: [N, V], any floating type.
        sharpness: k >= 0; with 0 every gate is 1.
    """
    logits = teacher_logits.to(loss_dtype(teacher_logits))
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    # 0 * (-inf) again, of ids that are cut
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(dim=1)
    return gate_of_entropy(entropy, (logits > -math.inf).sum(dim=1).to(logits.dtype), sharpness)


def gate_of_entropy(entropy: Tensor, ids: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Return ``(exp(-k * H / log V), H)`` of entropies H [n] in nats over V = ids [n] tokens; the gate is 1 where V is 1."""
    log_ids = ids.log()
    # log 1 is 0: a teacher with a single id is certain
    share = torch.where(log_ids > 0, entropy / log_ids, 0.0)
    return torch.exp(-sharpness * share), entropy
