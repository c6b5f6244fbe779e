"""Decoupled distillation against a scalar oracle, its gradient, its identity, and inputs chosen to hurt."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from grace_plugin.losses import confidence_gate, decoupled_kd
from grace_plugin.losses.distill import loss_dtype
from tests.reference import distill as oracle

INF = math.inf


def draw(n, v, seed=0, spread=2.0, dtype=torch.float64):
    """Student logits, teacher logits, targets."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, v, generator=g, dtype=torch.float64) * spread
    teacher = torch.randn(n, v, generator=g, dtype=torch.float64) * spread
    return student.to(dtype), teacher.to(dtype), torch.randint(0, v, (n,), generator=g)


@pytest.mark.parametrize("v", [2, 3, 17])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_decoupled_kd__random_logits__equal_scalar_oracle(v, temperature):
    student, teacher, targets = draw(6, v, seed=v)
    tckd, nckd, dkd = decoupled_kd(student, teacher, targets, temperature=temperature, alpha=0.7, beta=3.0)
    for i in range(6):
        want_t, want_n = oracle.decoupled(student[i].tolist(), teacher[i].tolist(), int(targets[i]), temperature)
        assert tckd[i].item() == pytest.approx(want_t, rel=1e-11, abs=1e-15)
        assert nckd[i].item() == pytest.approx(want_n, rel=1e-11, abs=1e-15)
        assert dkd[i].item() == pytest.approx((0.7 * want_t + 3.0 * want_n) * temperature**2, rel=1e-11, abs=1e-14)


def test_decoupled_kd__defaults__are_the_papers():
    student, teacher, targets = draw(4, 9)
    tckd, nckd, dkd = decoupled_kd(student, teacher, targets)
    torch.testing.assert_close(dkd, (tckd + 4.0 * nckd) * 4.0, rtol=1e-13, atol=0)
    at_two, _, _ = decoupled_kd(student, teacher, targets, temperature=2.0)
    assert torch.equal(tckd, at_two)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=2, max_size=12),
    st.integers(0, 1000), st.floats(0.3, 8.0),
)  # fmt: skip
def test_decoupled_kd__equal_temperatures__sum_to_plain_divergence(pairs, pick, temperature):
    student = torch.tensor([[a for a, _ in pairs]], dtype=torch.float64)
    teacher = torch.tensor([[b for _, b in pairs]], dtype=torch.float64)
    target = pick % len(pairs)
    tckd, nckd, _ = decoupled_kd(student, teacher, torch.tensor([target]), temperature=temperature)
    p_t = oracle.probabilities(teacher[0].tolist(), temperature)
    p_s = oracle.probabilities(student[0].tolist(), temperature)
    rest = math.fsum(p for i, p in enumerate(p_t) if i != target)
    whole = oracle.divergence(p_t, p_s)
    assert (tckd + rest * nckd).item() == pytest.approx(whole, rel=1e-9, abs=1e-12)
    assert tckd.item() >= -1e-12
    assert nckd.item() >= -1e-12


def test_decoupled_kd__equal_logits__zero_value_and_gradient():
    student, _, targets = draw(5, 8)
    student.requires_grad_()
    tckd, nckd, dkd = decoupled_kd(student, student.detach().clone(), targets)
    assert torch.equal(torch.stack([tckd, nckd, dkd]), torch.zeros(3, 5, dtype=torch.float64))
    dkd.sum().backward()
    assert student.grad.abs().max() < 1e-15


@pytest.mark.parametrize("v", [2, 5])
def test_decoupled_kd__three_outputs__pass_gradcheck(v):
    student, teacher, targets = draw(4, v, seed=3)
    student.requires_grad_()

    def run(z):
        return decoupled_kd(z, teacher, targets, temperature=1.7, alpha=0.6, beta=2.5)

    assert gradcheck(run, (student,))


def test_decoupled_kd__teacher_logits__no_gradient():
    student, teacher, targets = draw(4, 5)
    student.requires_grad_()
    teacher.requires_grad_()
    decoupled_kd(student, teacher, targets)[2].sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("margin", [10.0, 40.0, 120.0])
def test_decoupled_kd__confident_teacher__gradient_of_alternatives_remains(margin):
    """p_T(y) = 1 - 1e-12 and beyond: 1 - exp(log p) would be 0 in float32, and the gradient with it."""
    g = torch.Generator().manual_seed(1)
    teacher = torch.randn(3, 11, generator=g)
    student = torch.randn(3, 11, generator=g)
    targets = torch.tensor([0, 5, 10])
    teacher[torch.arange(3), targets] += margin
    student[torch.arange(3), targets] += margin
    student.requires_grad_()
    _, nckd, dkd = decoupled_kd(student, teacher, targets, temperature=1.0)
    dkd.sum().backward()
    for i in range(3):
        want = oracle.decoupled(student[i].tolist(), teacher[i].tolist(), int(targets[i]), 1.0)[1]
        assert nckd[i].item() == pytest.approx(want, rel=1e-5)
    others = student.grad.clone()
    others[torch.arange(3), targets] = 0
    assert (others.abs().sum(dim=1) > 0.1).all()
    double = student.detach().double().requires_grad_()
    decoupled_kd(double, teacher.double(), targets, temperature=1.0)[2].sum().backward()
    torch.testing.assert_close(student.grad.double(), double.grad, rtol=2e-5, atol=2e-7)


def test_target_gradient__two_confident_sides__does_not_cancel():
    """Both sure at the 1e-12 level: d TCKD / d logit is a difference of complements, not of ones."""
    teacher = torch.tensor([[28.0, 0.0, 0.0]])
    student = torch.tensor([[27.0, 0.0, 0.0]], requires_grad=True)
    tckd, _, _ = decoupled_kd(student, teacher, torch.tensor([0]), temperature=1.0)
    tckd.sum().backward()
    want = 1 / (1 + math.exp(28.0) / 2) - 1 / (1 + math.exp(27.0) / 2)
    assert student.grad[0, 0].item() == pytest.approx(want, rel=1e-5, abs=0)
    assert student.grad[0, 1].item() == pytest.approx(-want / 2, rel=1e-5, abs=0)


def test_target_gradient__teacher_with_even_odds__equals_oracle():
    """Even odds: both ways of writing the difference meet here."""
    teacher = torch.tensor([[0.0, 0.0]])
    student = torch.tensor([[1.0, 0.0]], requires_grad=True)
    decoupled_kd(student, teacher, torch.tensor([0]), temperature=1.0)[0].sum().backward()
    want = 1 / (1 + math.exp(-1.0)) - 0.5
    assert student.grad[0].tolist() == pytest.approx([want, -want], rel=1e-6)


def test_target_gradient__unlikely_target__does_not_cancel():
    teacher = torch.tensor([[-28.0, 0.0, 0.0]])
    student = torch.tensor([[-27.0, 0.0, 0.0]], requires_grad=True)
    tckd, _, _ = decoupled_kd(student, teacher, torch.tensor([0]), temperature=1.0)
    tckd.sum().backward()
    want = 1 / (1 + 2 * math.exp(27.0)) - 1 / (1 + 2 * math.exp(28.0))
    assert student.grad[0, 0].item() == pytest.approx(want, rel=1e-5, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoupled_kd__ids_of_minus_infinity__equal_cut_vocabulary(dtype):
    student, teacher, _ = draw(5, 12, dtype=dtype)
    targets = torch.tensor([0, 3, 8, 2, 1])
    cut_s = student[:, :9].clone().requires_grad_()
    padded_s = student.clone()
    padded_s[:, 9:] = -INF
    padded_s.requires_grad_()
    padded_t = teacher.clone()
    padded_t[:, 9:] = -INF
    cut = decoupled_kd(cut_s, teacher[:, :9], targets)
    padded = decoupled_kd(padded_s, padded_t, targets)
    for a, b in zip(cut, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    cut[2].sum().backward()
    padded[2].sum().backward()
    torch.testing.assert_close(padded_s.grad[:, :9], cut_s.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(padded_s.grad[:, 9:], torch.zeros(5, 3, dtype=dtype))
    gates = zip(confidence_gate(teacher[:, :9]), confidence_gate(padded_t), strict=True)
    for a, b in gates:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_decoupled_kd__target_alone_in_vocabulary__zero_and_finite():
    student = torch.tensor([[1.0, -INF, -INF], [1.0, 2.0, -INF]], requires_grad=True)
    teacher = torch.tensor([[3.0, -INF, -INF], [1.0, -2.0, -INF]])
    tckd, nckd, dkd = decoupled_kd(student, teacher, torch.tensor([0, 1]))
    dkd.sum().backward()
    assert tckd[0].item() == 0
    assert nckd.tolist() == [0, 0]
    assert tckd[1].item() == pytest.approx(oracle.decoupled([1.0, 2.0], [1.0, -2.0], 1, 2.0)[0], rel=1e-5)
    assert torch.isfinite(student.grad).all()
    assert torch.equal(student.grad[0], torch.zeros(3))


def test_decoupled_kd__target_of_minus_infinity__divergence_of_others():
    student = torch.tensor([[-INF, 1.0, 2.0, -1.0]], dtype=torch.float64)
    teacher = torch.tensor([[-INF, 0.5, -2.0, 1.0]], dtype=torch.float64)
    tckd, nckd, _ = decoupled_kd(student, teacher, torch.tensor([0]), temperature=1.0)
    want = oracle.divergence(oracle.probabilities(teacher[0].tolist()), oracle.probabilities(student[0].tolist()))
    assert tckd.item() == 0
    assert nckd.item() == pytest.approx(want, rel=1e-12)


def test_decoupled_kd__student_excludes_teachers_ids__infinite():
    student = torch.tensor([[1.0, 0.0, -INF]])
    teacher = torch.tensor([[1.0, 0.0, 0.5]])
    _, nckd, _ = decoupled_kd(student, teacher, torch.tensor([0]))
    assert nckd.item() == INF


def test_decoupled_kd__teacher_excludes_an_id__finite():
    student = torch.tensor([[1.0, 0.0, 0.3]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0, -INF]], dtype=torch.float64)
    tckd, nckd, _ = decoupled_kd(student, teacher, torch.tensor([0]), temperature=1.0)
    want = oracle.decoupled(student[0].tolist(), teacher[0].tolist(), 0, 1.0)
    assert [tckd.item(), nckd.item()] == pytest.approx(want, rel=1e-12)


def test_decoupled_kd__bfloat16_inputs__computed_in_float32():
    student, teacher, targets = draw(16, 64, spread=6.0, dtype=torch.bfloat16)
    leaf = student.clone().requires_grad_()
    got = decoupled_kd(leaf, teacher, targets)
    want = decoupled_kd(student.double(), teacher.double(), targets)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=1e-7)
    got[2].sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    gate, entropy = confidence_gate(teacher)
    want_gate, want_entropy = confidence_gate(teacher.double())
    assert (gate.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(gate.double(), want_gate, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_loss_dtype__any_float64__float64(dtypes):
    student, teacher, targets = draw(3, 6, dtype=torch.float32)
    want = decoupled_kd(student.double(), teacher.double(), targets)
    got = decoupled_kd(student.to(dtypes[0]), teacher.to(dtypes[1]), targets)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b)


def test_decoupled_kd__one_float64_side__computed_in_float64():
    assert loss_dtype(torch.zeros(1), None, torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert loss_dtype(torch.zeros(1, dtype=torch.bfloat16), None) == torch.float32
    assert loss_dtype() == torch.float32


def test_decoupled_kd__inputs__not_changed():
    student, teacher, targets = draw(4, 6, dtype=torch.float32)
    before = student.clone(), teacher.clone()
    decoupled_kd(student, teacher, targets, temperature=1.0)
    confidence_gate(teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("v", [2, 7, 50])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 2.5])
def test_confidence_gate__random_logits__equal_oracle(v, sharpness):
    _, teacher, _ = draw(5, v, seed=v)
    gate, entropy = confidence_gate(teacher, sharpness)
    for i in range(5):
        assert entropy[i].item() == pytest.approx(oracle.entropy(teacher[i].tolist()), rel=1e-12)
        assert gate[i].item() == pytest.approx(oracle.gate(teacher[i].tolist(), sharpness), rel=1e-12)


def test_confidence_gate__uniform_and_certain__from_1_over_e_to_1():
    logits = torch.tensor([[0.0] * 8, [500.0] + [0.0] * 7])
    gate, entropy = confidence_gate(logits)
    assert gate.tolist() == pytest.approx([math.exp(-1), 1.0])
    assert entropy.tolist() == pytest.approx([math.log(8), 0.0])
    assert confidence_gate(logits, 2.0)[0].tolist() == pytest.approx([math.exp(-2), 1.0])


def test_confidence_gate__one_nat_of_large_vocabulary__published_value():
    """About 0.92 at H = 1 nat for 151,936 ids."""
    logits = torch.full((1, 151_936), -60.0)
    logits[0, :3] = torch.tensor([0.0, 0.0, -1.13])
    gate, entropy = confidence_gate(logits)
    assert entropy.item() == pytest.approx(1.0, abs=1e-4)
    assert gate.item() == pytest.approx(0.92, abs=5e-4)


def test_confidence_gate__single_id__one_without_gradient():
    logits = torch.tensor([[2.0, -INF, -INF]], requires_grad=True)
    gate, entropy = confidence_gate(logits)
    assert gate.item() == 1
    assert entropy.item() == 0
    assert not gate.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, INF])
def test_decoupled_kd__bad_temperature__refused(temperature):
    student, teacher, targets = draw(2, 3)
    with pytest.raises(ValueError, match="temperature must be a positive finite number"):
        decoupled_kd(student, teacher, targets, temperature=temperature)


def test_decoupled_kd__shapes_that_differ__refused():
    student, teacher, targets = draw(2, 3)
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 2\).*common vocabulary"):
        decoupled_kd(student, teacher[:, :2], targets)
    with pytest.raises(ValueError, match=r"\[positions, vocabulary\]"):
        decoupled_kd(student[0], teacher[0], targets)
    with pytest.raises(ValueError, match=r"\(1,\) targets for 2 positions"):
        decoupled_kd(student, teacher, targets[:1])
