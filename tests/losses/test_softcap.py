"""Heads whose logits are capped, c * tanh(logits / c): value against plain floats, gradients by gradcheck."""

import pytest
import torch

from grace_plugin.losses import confidence_gate, decoupled_kd, distillation_head, teacher_gates
from tests.losses.sides import NAMES, draw, two_unrounded
from tests.reference import distill as oracle

CAPS = [(1.5, 0.8), (2.0, None), (None, 0.5)]


def loss(sides, targets, caps, **options):
    teacher = [sides[name] for name in NAMES[3:]]
    gate, _, _ = teacher_gates(*teacher, vocabulary=9, softcap=caps[1])
    return distillation_head(
        *(sides[name] for name in NAMES), targets, gate, vocabulary=9, ce_weight=0.3, kd_weight=0.7, chunk=3,
        softcaps=caps, **options,
    )  # fmt: skip


@pytest.mark.parametrize("caps", CAPS)
def test_softcap__value_and_parts__equal_plain_floats(caps):
    sides, targets = draw()
    found = loss(sides, targets, caps)
    lists = {name: side.detach().tolist() for name, side in sides.items()}
    want = oracle.head(*(lists[name] for name in NAMES), targets.tolist(), 9, 0.3, 0.7, 2.0, 1.0, 4.0, 1.0, caps=caps)
    for name, value in want.items():
        assert getattr(found, name).item() == pytest.approx(value, rel=1e-12), name
    assert found.loss.item() != pytest.approx(loss(sides, targets, (None, None)).loss.item(), rel=1e-3)


@pytest.mark.parametrize("caps", CAPS)
def test_softcap__gradients__equal_autograd(caps):
    sides, targets = draw(n=4)

    def value(*student):
        return loss(dict(zip(NAMES, [*student, *(sides[n] for n in NAMES[3:])], strict=True)), targets, caps).loss

    assert torch.autograd.gradcheck(value, [sides[name] for name in NAMES[:3]])


def test_softcap__bfloat16_logits__capped_in_float32():
    """The products round to bfloat16, but for the student's target and its largest; from there on nothing does."""
    sides, targets = draw(dtype=torch.bfloat16, grad=False)
    out = loss(sides, targets, (1.5, 0.8))
    z_s = two_unrounded(sides["hidden_s"], sides["weight_s"][:9], sides["bias_s"][:9], targets)
    z_t = torch.nn.functional.linear(*(sides[name] for name in NAMES[3:]))[:, :9].double()
    z_s, z_t = (cap * torch.tanh(z / cap) for cap, z in ((1.5, z_s), (0.8, z_t)))
    gate, _ = confidence_gate(z_t)
    found, _, _ = teacher_gates(*(sides[name] for name in NAMES[3:]), vocabulary=9, softcap=0.8)
    torch.testing.assert_close(found.double(), gate, rtol=0, atol=1e-6)
    tckd, nckd, dkd = decoupled_kd(z_s, z_t, targets)
    for part, each in ((out.gated_tckd_sum, tckd), (out.gated_nckd_sum, nckd), (out.gated_dkd_sum, dkd)):
        assert part.item() == pytest.approx((gate * each).sum().item(), rel=1e-5)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf")])
def test_softcap__bad_caps__refused(cap):
    sides, targets = draw()
    with pytest.raises(ValueError, match=r"student: logits are capped at a positive finite number"):
        loss(sides, targets, (cap, None))
    with pytest.raises(ValueError, match=r"teacher: logits are capped at a positive finite number"):
        teacher_gates(*(sides[name] for name in NAMES[3:]), vocabulary=9, softcap=cap)
    head = sides["hidden_s"], sides["weight_s"], None, *(sides[name] for name in NAMES[3:])
    with pytest.raises(ValueError, match=r"teacher: logits are capped"):
        distillation_head(*head, targets, torch.ones(7), vocabulary=9, ce_weight=1.0, softcaps=(None, cap))


def test_teacher_gates__in_torch__published_gate_without_logsumexp():
    sides, targets = draw(grad=False)
    teacher = [sides[name] for name in NAMES[3:]]
    gate, entropy, sliced = teacher_gates(*teacher, targets, vocabulary=9)
    want = teacher_gates(*teacher, targets, vocabulary=9, sharpness=1.0, chunk=2)
    torch.testing.assert_close(gate, want[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, want[1], rtol=1e-12, atol=0)
    assert sliced is None and want[2] is None
