"""Chunks in place against torch in float64, in Triton's interpreter or on CUDA; run with TRITON_INTERPRET=1.

Small on purpose: the mutation run tries every changed operator of `fused_chunks` against this file. In addition to
values it checks what is allocated, how often, and where: a buffer twice too large computes the same.
"""

import pytest
import torch

from grace_plugin.losses import decoupled_kd, distillation_head, fused_head_triton, teacher_gates
from grace_plugin.losses import fused_head_chunks as chunks
from grace_plugin.losses.fused_head_chunks import Gradients, Head
from tests.losses.sides import two_unrounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS, TEMPERATURE, ALPHA, BETA = 25, 3.0, 0.7, 2.5
LONG = chunks.SLICE + 40  # ids: two slices


class Seen(Head):
    """A head that notes what it is asked for: ids, rows, the buffer and how much of it there is."""

    log: list

    def part(self, first, end):
        self.log.append((first, end))
        part = Seen(*super().part(first, end))
        part.log = self.log
        return part

    def logits(self, hidden, out=None):
        space = None if out is None else (out.data_ptr(), out.untyped_storage().nbytes() // out.element_size())
        self.log.append((tuple(hidden.shape), None if out is None else tuple(out.shape), space))
        return super().logits(hidden, out)


def seen(made):
    noting = Seen(*made)
    noting.log = []
    return noting


def draw(n, ids=IDS, caps=(None, None)):
    """Student's hidden states and head, teacher's, gates and targets."""
    made = torch.Generator().manual_seed(n + ids)

    def normal(*shape):
        return torch.randn(*shape, generator=made).to(DEVICE)

    student = normal(n, 6), Head(normal(ids, 6), normal(ids), caps[0])
    teacher = normal(n, 5), Head(normal(ids, 5), normal(ids), caps[1]), torch.rand(n, generator=made).to(DEVICE)
    return student, teacher, torch.randint(ids, (n,), generator=made).to(DEVICE)


def double(made):
    return type(made)(*(v.double() if isinstance(v, torch.Tensor) else v for v in made))


def settings(chunk, dtype=torch.float32, columns=None):
    return chunks.HeadSettings(TEMPERATURE, ALPHA, BETA, chunk, True, dtype, None, columns)


def gradients(hidden, student, dtype=torch.float32):
    return Gradients(hidden, student.weight, student.bias, [True, True, True], dtype)


def logsumexp_of(hidden_t, head_t, targets):
    """The teacher's sums, taken in float64."""
    logits = chunks.capped(double(head_t).logits(hidden_t.double()), head_t.cap)
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return torch.stack([(others / TEMPERATURE).logsumexp(1), logits.gather(1, targets[:, None])[:, 0]]).float()


def both(n, chunk, sliced, caps=(None, None), with_teacher=True, ids=IDS, columns=None):
    """Sums and gradients in place, and of torch in float64."""
    (hidden_s, head_s), (hidden_t, head_t, gate), targets = draw(n, ids, caps)
    scales = torch.tensor([0.3, 0.8], device=DEVICE)
    sums_t = logsumexp_of(hidden_t, head_t, targets) if sliced else None
    teacher = chunks.TeacherSide(hidden_t, head_t, gate, sums_t) if with_teacher else None
    got = gradients(hidden_s, head_s)
    found = chunks.fused_chunks(hidden_s, head_s, teacher, targets, scales, settings(chunk, columns=columns), got)
    exact = chunks.TeacherSide(hidden_t.double(), double(head_t), gate.double()) if with_teacher else None
    hidden_s, head_s = hidden_s.double(), double(head_s)
    grads = gradients(hidden_s, head_s, torch.float64)
    want = chunks.eager_chunks(
        hidden_s, head_s, exact, targets, scales.double(), settings(n or 1, torch.float64), grads
    )
    return found, got, want, grads


@pytest.mark.parametrize(
    ("n", "chunk", "caps", "sliced", "ids", "columns"),
    [
        (4, 3, (1.5, 0.7), False, IDS, None), (4, 3, (1.5, 0.7), True, IDS, None),
        (2, 8, (None, None), False, IDS, None), (2, 8, (None, None), True, IDS, None),
        (4, 8, (None, None), True, IDS, 7),  # slices shorter than a block
        (8, 8, (1.5, 0.7), True, 5000, 2100), (8, 8, (None, None), True, 5000, 2100),  # and of a block and a bit
        (2, 8, (None, None), False, 5000, 2100),  # teacher's logits whole: a buffer of more than one slice
    ],
)  # fmt: skip
def test_fused_chunks__sums_and_gradients__equal_torch(n, chunk, caps, sliced, ids, columns):
    found, got, want, grads = both(n, chunk, sliced, caps, ids=ids, columns=columns)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=6e-6, atol=2e-6)
    for one, other in zip(got.all(), grads.all(), strict=True):
        assert (one.double() - other).norm() < 4e-6 * other.norm()


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("n", [0, 2])
def test_fused_chunks__no_positions_or_teacher__zero(n, with_teacher):
    found, got, want, grads = both(n, 1, False, with_teacher=with_teacher)
    assert found.shape == (4,)
    torch.testing.assert_close(found.double(), want, rtol=6e-6, atol=2e-6)
    for one, other in zip(got.all(), grads.all(), strict=True):
        assert (one.double() - other).norm() <= 4e-6 * other.norm()


def test_fused_chunks__other_default_device_and_dtype__same_result():
    (hidden_s, head_s), (hidden_t, head_t, gate), targets = draw(1)
    scales = torch.tensor([0.3, 0.8], device=DEVICE)
    teacher = chunks.TeacherSide(hidden_t, head_t, gate)
    want = chunks.fused_chunks(hidden_s, head_s, teacher, targets, scales, settings(2), None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = chunks.fused_chunks(hidden_s, head_s, teacher, targets, scales, settings(2), None)
            gates = teacher_gates(hidden_t, head_t.weight, head_t.bias, targets, vocabulary=IDS)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, want)
    assert [part.device.type for part in gates] == [DEVICE] * 3
    assert [part.dtype for part in gates[:2]] == [torch.float32] * 2


@pytest.mark.parametrize(("sliced", "rows_t", "space"), [(False, [2, 1, 2], 2 * IDS), (True, [3, 2], 3 * IDS)])
def test_fused_chunks__buffers__one_for_each_side(sliced, rows_t, space):
    (hidden_s, head_s), (hidden_t, head_t, gate), targets = draw(5)
    head_s, head_t = seen(head_s), seen(head_t)
    sums = logsumexp_of(hidden_t, Head(*head_t), targets) if sliced else None
    teacher = chunks.TeacherSide(hidden_t, head_t, gate, sums)
    scales = torch.tensor([0.3, 0.8], device=DEVICE)
    chunks.fused_chunks(hidden_s, head_s, teacher, targets, scales, settings(3), None)
    assert [call[:2] for call in head_s.log] == [((rows, 6), (3, IDS)) for rows in (3, 2)]
    assert {call[2] for call in head_s.log} == {(head_s.log[0][2][0], 3 * IDS)}
    ends = [(0, IDS)]
    assert [call for call in head_t.log if len(call) == 2] == ends * len(rows_t)
    written = [call for call in head_t.log if len(call) == 3]
    assert [call[:2] for call in written] == [
        ((rows, 5), (rows, end - first)) for rows in rows_t for first, end in ends
    ]
    assert {call[2] for call in written} == {(written[0][2][0], space)}


@pytest.mark.parametrize(("n", "chunk", "rows_t", "buffers"), [(3, 2, [1, 1, 1], (2, 1)), (1, 2, [1], (1, 1))])
def test_fused_chunks__buffers__a_chunk_and_half_a_chunk(n, chunk, rows_t, buffers):
    (hidden_s, head_s), (hidden_t, head_t, gate), targets = draw(n)
    head_s, head_t = seen(head_s), seen(head_t)
    scales = torch.tensor([0.3, 0.8], device=DEVICE)
    chunks.fused_chunks(
        hidden_s, head_s, chunks.TeacherSide(hidden_t, head_t, gate), targets, scales, settings(chunk), None
    )
    written = [call for call in head_t.log if len(call) == 3]
    assert [call[0][0] for call in written] == rows_t
    assert (head_s.log[0][2][1], written[0][2][1]) == (buffers[0] * IDS, buffers[1] * IDS)


@pytest.mark.parametrize(
    ("ids", "columns", "ends"),
    [(9, None, [(0, 9)]), (chunks.SLICE, None, [(0, 50688)]), (LONG, None, [(0, 50688), (50688, LONG)]),
     (9, 9, [(0, 9)]), (9, 4, [(0, 4), (4, 8), (8, 9)])],
)  # fmt: skip
def test_fused_chunks__vocabulary_of_one_slice__not_divided(ids, columns, ends):
    assert chunks.SLICE == 50688
    (hidden_s, head_s), (hidden_t, head_t, gate), targets = draw(1, ids)
    head_t = seen(head_t)
    teacher = chunks.TeacherSide(hidden_t, head_t, gate, logsumexp_of(hidden_t, Head(*head_t), targets))
    scales = torch.tensor([0.3, 0.8], device=DEVICE)
    chunks.fused_chunks(hidden_s, head_s, teacher, targets, scales, settings(2, columns=columns), None)
    assert [call for call in head_t.log if len(call) == 2] == ends
    space = {call[2][1] for call in head_t.log if len(call) == 3}
    assert space == {min(ids, chunks.SLICE if columns is None else columns)}


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_gates__logsumexp__equals_float64(dtype, cap):
    _, (hidden_t, head_t, _), targets = draw(3, caps=(None, cap))
    hidden_t, head_t = hidden_t.to(dtype), Head(head_t.weight.to(dtype), None, cap)
    how = {"vocabulary": IDS, "softcap": cap, "sharpness": 1.5, "chunk": 2}
    gate, entropy, sliced = teacher_gates(hidden_t, head_t.weight, None, targets, temperature=TEMPERATURE, **how)
    exact = head_t.logits(hidden_t).double()
    exact = exact if cap is None else cap * torch.tanh(exact / cap)
    log_p = exact.log_softmax(1)
    nats = -(log_p.exp() * log_p).sum(1)
    others = exact.scatter(1, targets[:, None], -torch.inf)
    want = torch.stack([(others / TEMPERATURE).logsumexp(1), exact.gather(1, targets[:, None])[:, 0]])
    assert {part.dtype for part in (gate, entropy, sliced)} == {torch.float32}
    torch.testing.assert_close(entropy.double(), nats, rtol=0, atol=3e-6)
    normalised = 1.5 * nats / torch.tensor(float(IDS), dtype=torch.float64).log()
    torch.testing.assert_close(gate.double(), (-normalised).exp(), rtol=0, atol=3e-6)
    torch.testing.assert_close(sliced.double(), want, rtol=2e-6, atol=2e-6)
    usual = teacher_gates(hidden_t, head_t.weight, None, targets, **how)[2]
    at_two = teacher_gates(hidden_t, head_t.weight, None, targets, temperature=2.0, **how)[2]
    assert torch.equal(usual, at_two) and not torch.equal(usual, sliced)
    plain = teacher_gates(hidden_t, head_t.weight, None, None, **how)
    assert plain[2] is None and torch.equal(plain[0], gate)
    assert torch.equal(teacher_gates(hidden_t, head_t.weight, None, **how)[0], gate)
    raised = teacher_gates(hidden_t.double(), head_t.weight, None, targets, **how)
    assert raised[2] is None and raised[0].dtype == torch.float64


def test_teacher_logsumexp__given__is_what_is_read():
    (hidden_s, head_s), (hidden_t, head_t, gate), targets = draw(2)
    student, teacher = (hidden_s, head_s.weight, head_s.bias), (hidden_t, head_t.weight, head_t.bias)
    sliced = logsumexp_of(hidden_t, head_t, targets)
    how = {"vocabulary": IDS, "ce_weight": 0.3, "kd_weight": 0.8, "temperature": TEMPERATURE}
    without = distillation_head(*student, *teacher, targets, gate, **how)
    with_sums = distillation_head(*student, *teacher, targets, gate, teacher_logsumexp=sliced, **how)
    torch.testing.assert_close(with_sums.loss, without.loss, rtol=6e-6, atol=0)
    others = distillation_head(*student, *teacher, targets, gate, teacher_logsumexp=sliced + 0.5, **how)
    assert others.loss.item() != pytest.approx(without.loss.item(), rel=1e-3)


def test_backward__in_place__multiplied_and_used_once():
    (hidden_s, head_s), _, targets = draw(2)
    hidden, bias = hidden_s.requires_grad_(), head_s.bias.requires_grad_()
    how = {"vocabulary": IDS, "ce_weight": 0.3, "chunk": 2}
    none = (None, None, None)
    out = distillation_head(hidden, head_s.weight, bias, *none, targets, None, **how)
    (out.loss * 2.5).backward(retain_graph=True)
    logits = torch.nn.functional.linear(hidden.detach().double(), head_s.weight.double(), bias.detach().double())
    logits.requires_grad_()
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    want = 2.5 * 0.3 * logits.grad
    torch.testing.assert_close(bias.grad.double(), want.sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), want @ head_s.weight.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        out.loss.backward()
    single = distillation_head(hidden, head_s.weight[:1], None, *none, targets * 0, None, **{**how, "vocabulary": 1})
    assert single.loss.item() == 0  # one id is not for the kernels
    single.loss.backward(retain_graph=True)
    single.loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_losses_in_place__targets_gradient__unrounded(dtype, cap, with_teacher):
    """In addition to the one among the logits, in their dtype."""
    (hidden_s, head_s), (hidden_t, head_t, gate), targets = draw(3, caps=(cap, None))
    logits_s, logits_t = head_s.logits(hidden_s).to(dtype), head_t.logits(hidden_t).to(dtype)
    exact = logits_s.double().requires_grad_()
    capped = exact if cap is None else cap * torch.tanh(exact / cap)
    loss = 0.3 * torch.nn.functional.cross_entropy(capped, targets, reduction="sum")
    if with_teacher:
        tckd, nckd, _ = decoupled_kd(capped, logits_t.double(), targets, temperature=TEMPERATURE)
        loss += 0.8 * TEMPERATURE**2 * (gate.double() * (ALPHA * tckd + BETA * nckd)).sum()
    want = torch.autograd.grad(loss, exact)[0].gather(1, targets[:, None])[:, 0]
    losses, scales = torch.zeros(5, 3, device=DEVICE), torch.tensor([0.3, 0.8], device=DEVICE)
    how = fused_head_triton.Factors(TEMPERATURE, ALPHA, BETA, cap, None)
    teacher = logits_t if with_teacher else None
    fused_head_triton.losses_in_place(logits_s, teacher, targets, gate if with_teacher else None, scales, losses, how)
    torch.testing.assert_close(losses[3].double(), want, rtol=4e-6, atol=1e-6)
    rounded = logits_s.gather(1, targets[:, None])[:, 0].float()
    cut_off = 2**-7 if dtype == torch.bfloat16 else 0  # the interpreter does not round
    torch.testing.assert_close(rounded, losses[3], rtol=cut_off, atol=0)


@pytest.mark.parametrize("temperature", [2.0, TEMPERATURE])
@pytest.mark.parametrize(
    ("ids", "columns", "caps"), [(IDS, None, (None, None)), (5000, 2100, (None, None)), (5000, 2100, (20.0, 1.0))]
)
@pytest.mark.parametrize(("sliced", "with_teacher"), [(True, True), (False, True), (False, False)])
def test_fused_chunks__target_and_largest_logit__unrounded(ids, columns, caps, sliced, with_teacher, temperature):
    (hidden_s, head_s), (hidden_t, head_t, gate), targets = draw(6, ids, caps)
    hidden_s, head_s = hidden_s.bfloat16(), Head(head_s.weight.bfloat16(), head_s.bias.bfloat16(), head_s.cap)
    targets[0] = head_s.logits(hidden_s)[0].argmax()
    exact = chunks.capped(two_unrounded(hidden_s, *head_s[:2], targets), head_s.cap).requires_grad_()
    logits_t = chunks.capped(double(head_t).logits(hidden_t.double()), head_t.cap)
    tckd, nckd, _ = decoupled_kd(exact, logits_t, targets, temperature=temperature)
    ce = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    kd = temperature**2 * (ALPHA * tckd + BETA * nckd) * gate.double()
    loss = 0.3 * ce.sum() + (0.8 * kd.sum() if with_teacher else 0.0)
    (want,) = torch.autograd.grad(loss, exact)
    if head_s.cap is not None:
        want = want * (1 - (exact.detach() / head_s.cap) ** 2)
    others = logits_t.scatter(1, targets[:, None], -torch.inf)
    sums = torch.stack([(others / temperature).logsumexp(1), logits_t.gather(1, targets[:, None])[:, 0]]).float()
    teacher = chunks.TeacherSide(hidden_t, head_t, gate, sums if sliced else None) if with_teacher else None
    how = settings(8, columns=columns)._replace(temperature=temperature)
    scales = torch.tensor([0.3, 0.8], device=DEVICE)
    for run in (chunks.fused_chunks, chunks.eager_chunks):
        got = Gradients(hidden_s, head_s.weight, None, [True, True, False], torch.float32, torch.bfloat16, targets)
        found = run(hidden_s, head_s, teacher, targets, scales, how, got)
        torch.testing.assert_close(found[0].double(), ce.sum(), rtol=4e-6, atol=1e-6)
        if with_teacher:
            torch.testing.assert_close(found[1].double(), kd.sum(), rtol=2e-5, atol=1e-6)
        target_grads = want.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(got._target_rows[1].double(), target_grads, rtol=1e-5, atol=1e-6)
        grad_h = want @ head_s.weight.double()
        assert (got.hidden.double() - grad_h).norm() < 2**-7 * grad_h.norm()
