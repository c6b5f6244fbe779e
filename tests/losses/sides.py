"""A student and a teacher at the head, and the loss over them: shared by the head's tests."""

import math

import torch

from grace_plugin.losses import HeadOutput, distillation_head, teacher_gates

NAMES = ["hidden_s", "weight_s", "bias_s", "hidden_t", "weight_t", "bias_t"]


def draw(n=7, d_s=5, d_t=6, v=9, pad_s=2, pad_t=3, seed=0, dtype=torch.float64, grad=True):
    """Both sides with padded vocabularies of different size, and targets."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, d_s), (v + pad_s, d_s), (v + pad_s,), (n, d_t), (v + pad_t, d_t), (v + pad_t,)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    if grad:
        for tensor in tensors[:3]:
            tensor.requires_grad_()
    return dict(zip(NAMES, tensors, strict=True)), torch.randint(0, v, (n,), generator=g)


def run(sides, targets, v=9, chunk=3, ce_weight=0.3, kd_weight=0.7, sharpness=1.0, **kwargs) -> HeadOutput:
    gate, _, _ = teacher_gates(
        sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=v, sharpness=sharpness, chunk=chunk
    )
    scales = {"ce_weight": ce_weight, "kd_weight": kd_weight}
    return distillation_head(
        *(sides[name] for name in NAMES), targets, gate, vocabulary=v, chunk=chunk, **scales, **kwargs
    )


def full(sides, targets, v=9, ce_weight=0.3, kd_weight=0.7, temperature=2.0, alpha=1.0, beta_dkd=4.0):
    """The same loss with ordinary tensors and torch's own autograd."""
    z_s = (sides["hidden_s"] @ sides["weight_s"].T + sides["bias_s"])[:, :v]
    z_t = (sides["hidden_t"] @ sides["weight_t"].T + sides["bias_t"])[:, :v]
    p_t = torch.softmax(z_t / temperature, -1)
    log_s, log_t = torch.log_softmax(z_s / temperature, -1), torch.log_softmax(z_t / temperature, -1)
    hot = torch.nn.functional.one_hot(targets, v).bool()
    y_s, y_t = log_s[hot], log_t[hot]
    rest_s, rest_t = torch.log1p(-y_s.exp()), torch.log1p(-y_t.exp())
    tckd = y_t.exp() * (y_t - y_s) + (1 - y_t.exp()) * (rest_t - rest_s)
    whole = (p_t * (log_t - log_s)).sum(-1)
    nckd = (whole - tckd) / (1 - y_t.exp())
    p = torch.softmax(z_t, -1)
    gate = torch.exp((p * p.log()).sum(-1) / math.log(v))
    ce = torch.nn.functional.cross_entropy(z_s, targets, reduction="sum")
    return ce_weight * ce + kd_weight * (gate * (alpha * tckd + beta_dkd * nckd)).sum() * temperature**2


def grads(sides):
    return [sides[name].grad for name in NAMES[:3]]


def two_unrounded(hidden, weight, bias, targets):
    """Logits in float64 of a product as its type rounds it, but exact for each row's target and its largest."""
    rounded = torch.nn.functional.linear(hidden, weight, bias).double()
    exact = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    ids = torch.stack([targets, rounded.argmax(1)], 1)
    assert not torch.equal(rounded.gather(1, ids), exact.gather(1, ids))
    return rounded.scatter(1, ids, exact.gather(1, ids))
