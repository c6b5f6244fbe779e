"""Gated decoupled distillation position by position in plain Python floats: no tensors, no logsumexp, no log-odds.

Probabilities are formed one by one from exponentials of differences to the largest live logit and added with
``math.fsum``; nothing is vectorised and no complement is taken as 1 - p.
"""

import math


def probabilities(logits, temperature=1.0):
    """Softmax of one row at a temperature; a logit of -inf has probability 0."""
    top = max(logits)
    weights = [math.exp((logit - top) / temperature) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def divergence(p, q):
    """KL(p || q) of two lists of probabilities, in nats."""
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def decoupled(student, teacher, target, temperature):
    """(TCKD, NCKD) of one position."""
    p_s, p_t = probabilities(student, temperature), probabilities(teacher, temperature)
    rest_s = [p for i, p in enumerate(p_s) if i != target]
    rest_t = [p for i, p in enumerate(p_t) if i != target]
    other_s, other_t = math.fsum(rest_s), math.fsum(rest_t)
    tckd = divergence([p_t[target], other_t], [p_s[target], other_s])
    if other_t == 0:
        return tckd, 0.0
    return tckd, divergence([p / other_t for p in rest_t], [p / other_s for p in rest_s])


def entropy(logits):
    """Entropy of one row at temperature 1, in nats."""
    return -math.fsum(p * math.log(p) for p in probabilities(logits) if p > 0)


def gate(logits, sharpness=1.0):
    """exp(-k H / log V) with V the ids that are not cut."""
    live = sum(logit > -math.inf for logit in logits)
    return math.exp(-sharpness * entropy(logits) / math.log(live)) if live > 1 else 1.0


def cross_entropy(logits, target):
    """-log p(target) of one row."""
    return -math.log(probabilities(logits)[target])


def head(
    hidden_s,
    weight_s,
    bias_s,
    hidden_t,
    weight_t,
    bias_t,
    targets,
    vocabulary,
    ce_weight,
    kd_weight,
    temperature,
    alpha,
    beta,
    sharpness,
    caps=(None, None),
):
    """The whole loss of ``distillation_head`` with gates of ``teacher_gates``, and its parts, from nested lists."""

    def logits(hidden, weight, bias, cap):
        found = [
            math.fsum(h * w for h, w in zip(hidden, row, strict=True)) + (bias[i] if bias else 0.0)
            for i, row in enumerate(weight[:vocabulary])
        ]
        return found if cap is None else [cap * math.tanh(logit / cap) for logit in found]

    ce = dkd = tckd_sum = nckd_sum = gates = 0.0
    for h_s, h_t, y in zip(hidden_s, hidden_t, targets, strict=True):
        z_s, z_t = logits(h_s, weight_s, bias_s, caps[0]), logits(h_t, weight_t, bias_t, caps[1])
        tckd, nckd = decoupled(z_s, z_t, y, temperature)
        g = gate(z_t, sharpness)
        ce += cross_entropy(z_s, y)
        gates += g
        tckd_sum += g * tckd
        nckd_sum += g * nckd
        dkd += g * (alpha * tckd + beta * nckd) * temperature**2
    return {
        "loss": ce_weight * ce + kd_weight * dkd, "ce_sum": ce, "gated_dkd_sum": dkd, "gated_tckd_sum": tckd_sum,
        "gated_nckd_sum": nckd_sum, "gate_sum": gates,
    }  # fmt: skip
