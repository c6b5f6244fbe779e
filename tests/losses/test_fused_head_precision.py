"""Dtypes of the chunked head: products in the hidden states' dtype, everything else exact in float32 or float64."""

import warnings

import pytest
import torch

from grace_plugin.losses import confidence_gate, decoupled_kd, distillation_head, teacher_gates
from grace_plugin.losses.fused_head_chunks import Gradients, Head, _add_product, add_target_rows, defers_target_rows
from tests.losses.sides import NAMES, draw, grads, run, two_unrounded
from tests.reference.footprint import Footprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products__any_head__in_dtype_of_hidden_states(dtype):
    sides, targets = draw(dtype=dtype)
    with Footprint() as seen:
        run(sides, targets).loss.backward()
    assert seen.products == {dtype}


@pytest.mark.parametrize("double", ["s", "t"])
def test_head__one_float64_side__computed_in_float64(double):
    sides, targets = draw(dtype=torch.float32)
    raised = {k: v.detach().double() if k.endswith(f"_{double}") else v.detach() for k, v in sides.items()}
    out = run(raised, targets, ce_weight=torch.tensor(0.3), kd_weight=0.7)
    parts = [out.loss, out.ce_sum, out.gated_dkd_sum, out.gated_tckd_sum, out.gated_nckd_sum, out.gate_sum]
    assert {part.dtype for part in parts} == {torch.float64}
    everything = {k: v.detach().double() for k, v in sides.items()}
    want = run(everything, targets, ce_weight=torch.tensor(0.3, dtype=torch.float32), kd_weight=0.7)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=0)


def test_head__bfloat16_student_and_float64_teacher__float64_losses():
    sides, targets = draw(dtype=torch.bfloat16, grad=False)
    out = run({k: v.double() if k.endswith("_t") else v for k, v in sides.items()}, targets)
    z_s = two_unrounded(*(sides[name][:9] if name[0] != "h" else sides[name] for name in NAMES[:3]), targets)
    z_t = torch.nn.functional.linear(*(sides[name].double() for name in NAMES[3:]))[:, :9]
    gate, _ = confidence_gate(z_t)
    ce = torch.nn.functional.cross_entropy(z_s, targets, reduction="sum")
    kd = (gate * decoupled_kd(z_s, z_t, targets)[2]).sum()
    assert out.loss.dtype == torch.float64
    assert out.loss.item() == pytest.approx((0.3 * ce + 0.7 * kd).item(), rel=1e-6)


def test_teacher_gates__bfloat16_teacher__float32_gates():
    sides, _ = draw(dtype=torch.bfloat16)
    gate, entropy, _ = teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=9, chunk=2)
    logits = torch.nn.functional.linear(sides["hidden_t"], sides["weight_t"], sides["bias_t"])[:, :9]
    want, _ = confidence_gate(logits.float())
    assert (gate.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(gate, want, rtol=0, atol=1e-3)
    assert len(set(gate.tolist())) == 7
    assert not torch.equal(gate, gate.bfloat16().float())


def test_head__bfloat16_logits__read_in_float32():
    """The products round to bfloat16, but for the student's target and its largest; from there on nothing does."""
    sides, targets = draw(dtype=torch.bfloat16, grad=False)
    out = run(sides, targets)
    z_s = two_unrounded(*(sides[name][:9] if name[0] != "h" else sides[name] for name in NAMES[:3]), targets)
    z_t = torch.nn.functional.linear(sides["hidden_t"], sides["weight_t"], sides["bias_t"])[:, :9].double()
    gate, _ = confidence_gate(z_t)
    tckd, nckd, dkd = decoupled_kd(z_s, z_t, targets)
    for found, each in ((out.gated_tckd_sum, tckd), (out.gated_nckd_sum, nckd), (out.gated_dkd_sum, dkd)):
        assert found.item() == pytest.approx((gate * each).sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head__low_precision__as_exact_as_torch(dtype):
    """The error of each gradient against float64 stays within twice that of unchunked torch in the same dtype."""
    sides, targets = draw(n=64, d_s=32, d_t=48, v=50, dtype=dtype, seed=6)
    torch_own, _ = draw(n=64, d_s=32, d_t=48, v=50, dtype=dtype, seed=6)
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in sides.items()}
    scales = {"ce_weight": 1 / 64, "kd_weight": 0.5 / 64}
    out = run(sides, targets, v=50, chunk=16, **scales)
    want = run(exact, targets, v=50, chunk=64, **scales)
    z_s = torch.nn.functional.linear(torch_own["hidden_s"], torch_own["weight_s"], torch_own["bias_s"])[:, :50].float()
    z_t = torch.nn.functional.linear(torch_own["hidden_t"], torch_own["weight_t"], torch_own["bias_t"])[:, :50].float()
    gate, _ = confidence_gate(z_t)
    plain = torch.nn.functional.cross_entropy(z_s, targets, reduction="sum") / 64
    plain = plain + 0.5 / 64 * (gate * decoupled_kd(z_s, z_t, targets)[2]).sum()
    out.loss.backward()
    want.loss.backward()
    plain.backward()
    assert out.loss.dtype == torch.float32
    assert abs(out.loss.item() - want.loss.item()) <= 2 * abs(plain.item() - want.loss.item()) + 1e-6 * want.loss.item()
    for got, torch_grad, expected in zip(grads(sides), grads(torch_own), grads(exact), strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected).norm()
        assert error <= 2 * (torch_grad.double() - expected).norm() + 1e-6 * expected.norm()


def test_head__float16_and_long_window__no_underflow():
    """1 / (tokens of the window) times a probability is below float16's smallest number; the sum is not."""
    sides, targets = draw(n=32, dtype=torch.float16)
    exact, _ = draw(n=32, dtype=torch.float16)
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in exact.items()}
    run(sides, targets, ce_weight=2e-6, kd_weight=0.0).loss.backward()
    run(exact, targets, ce_weight=2e-6, kd_weight=0.0).loss.backward()
    error = (sides["weight_s"].grad.double() - exact["weight_s"].grad).abs().max()
    assert exact["weight_s"].grad.abs().max() > 5e-6
    assert error < 1e-7
    sides["hidden_s"].grad = exact["hidden_s"].grad = None
    (4096 * run(sides, targets, ce_weight=2e-6, kd_weight=0.0).loss).backward()
    (4096 * run(exact, targets, ce_weight=2e-6, kd_weight=0.0).loss).backward()
    error = (sides["hidden_s"].grad.double() - exact["hidden_s"].grad).norm()
    assert error < 2e-3 * exact["hidden_s"].grad.norm()


def test_head__weight_of_other_dtype__multiplied_in_hidden_dtype():
    sides, targets = draw(dtype=torch.float32, seed=8)
    mixed = {k: v.detach().bfloat16() if k.startswith("hidden") else v.detach().clone() for k, v in sides.items()}
    mixed["weight_s"].requires_grad_()
    lowered = {k: v.detach().bfloat16() for k, v in sides.items()}
    lowered["weight_s"].requires_grad_()
    out, want = run(mixed, targets), run(lowered, targets)
    assert torch.equal(out.loss, want.loss)
    out.loss.backward()
    want.loss.backward()
    assert mixed["weight_s"].grad.dtype == torch.float32
    assert torch.equal(mixed["weight_s"].grad.bfloat16(), lowered["weight_s"].grad)


def test_weight_gradient__many_chunks__summed_in_float32():
    """256 chunks whose single contributions vanish against a bfloat16 sum."""
    n = 256
    hidden = torch.ones(n, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64)
    out = distillation_head(hidden, weight, bias, None, None, None, targets, None, vocabulary=8, ce_weight=1.0, chunk=1)
    out.loss.backward()
    assert (weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert bias.grad.tolist() == pytest.approx([-n * 7 / 8, *[n / 8] * 7], rel=4e-3)
    assert weight.grad[0, 0].item() == pytest.approx(-n * 7 / 8, rel=4e-3)
    assert weight.grad[1, 0].item() == pytest.approx(n / 8, rel=4e-3)


def test_weight_gradient__asked_dtype__summed_in_it():
    """1,024 contributions of 1/8 in bfloat16 stop at 32, whose neighbour is 32.25."""
    n = 1024
    hidden = torch.ones(n, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64)
    options = {"vocabulary": 8, "ce_weight": 1.0, "chunk": 1, "weight_grad_dtype": torch.bfloat16}
    distillation_head(hidden, weight, None, None, None, None, targets, None, **options).loss.backward()
    assert weight.grad[1, 0].item() == 32.0


def test_target_rows__few_targets__rounded_once():
    """Chunks summed in bfloat16: the largest numbers come last, so the whole is about as near as one rounding leaves it."""
    sides, targets = draw(n=32, d_s=16, v=300, pad_s=2, dtype=torch.float32, seed=3)
    targets[20:] = targets[:12]  # in more than one chunk
    hit = torch.zeros(302, dtype=torch.bool).index_fill_(0, targets, True)
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in sides.items()}

    def errors(rows, chunk):
        """Relative errors of the rows of targets and of the others, and of one rounding, all positions repeated."""
        grads = []
        for given, options in ((exact, {"chunk": 96}), (sides, {"chunk": chunk, "weight_grad_dtype": torch.bfloat16})):
            given["weight_s"].grad = None
            many = {k: v.detach().repeat(rows, 1) if k.startswith("hidden") else v for k, v in given.items()}
            run(many, targets.repeat(rows), v=300, kd_weight=0.0, **options).loss.backward()
            grads.append(given["weight_s"].grad.double())
        want, found = grads
        assert not found[300:].any()
        off, least = found - want, want.bfloat16().double() - want
        return [float(part[mask].norm() / want[mask].norm()) for part in (off, least) for mask in (hit, ~hit)]

    hits, others, least, _ = errors(1, 4)
    assert hits < 1.2 * least and others > 1.3 * least
    assert errors(3, 4)[0] > 1.7 * least  # 75 positions are the most whose targets come last


def test_add_target_rows__bfloat16_weight__summed_in_float32():
    """1,024 times 1/8 is 128 where each is a target's own; a sum in bfloat16 stops at 32."""
    hidden, weight = torch.ones(1024, 4, dtype=torch.bfloat16), torch.zeros(8, 4, dtype=torch.bfloat16)
    head, targets = Head(weight, None), torch.full((1024,), 5)
    targets[3], targets[1000] = 1, 1
    grad = torch.full((1024, 8), 0.125, dtype=torch.bfloat16)
    sums = Gradients(hidden, weight, None, [False, True, False], torch.float32, torch.bfloat16, targets)
    for row in range(1024):
        sums.add(slice(row, row + 1), grad[row : row + 1].clone(), hidden[row : row + 1], head)
    assert sums.all()[1][:, 0].tolist() == [32, 32.25, 32, 32, 32, 128, 32, 32]
    none = Gradients(
        hidden[:1], weight, torch.zeros(8), [True, False, True], torch.float32, torch.bfloat16, targets[:1]
    )
    none.add(slice(0, 1), torch.ones(1, 8, dtype=torch.bfloat16), hidden[:1], head)
    assert none.all()[1] is None and none.all()[2].tolist() == [1.0] * 8


def test_target_rows__float16_states__kept_in_float32():
    """A gradient divided by a window's tokens is below float16's smallest number."""
    hidden, weight = torch.ones(1, 4, dtype=torch.float16), torch.zeros(8, 4, dtype=torch.float16)
    sums = Gradients(hidden, weight, None, [False, True, False], torch.float32, torch.bfloat16, torch.tensor([5]))
    sums.add(slice(0, 1), torch.full((1, 8), 2.0**-30), hidden, Head(weight, None))
    assert sums.all()[1].eq(2.0**-30).all()


def test_target_rows__hidden_and_bias_gradients__not_changed():
    sides, targets = draw(n=32, d_s=16, v=300, pad_s=2, dtype=torch.float32, seed=3)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        hidden, bias = sides["hidden_s"].detach().requires_grad_(), torch.zeros(302, requires_grad=True)
        run(
            {**sides, "hidden_s": hidden, "bias_s": bias}, targets, v=300, chunk=5, weight_grad_dtype=dtype
        ).loss.backward()
        found.append((hidden.grad, bias.grad))
    for low, high in zip(*found, strict=True):
        assert torch.equal(low, high) and high.any()


@pytest.mark.parametrize("numbers", [1, 2 * 12, 3 * 12 + 11, 1 << 23])
@pytest.mark.parametrize("deterministic", [False, True])
def test_add_target_rows__products_at_one_time__same_result(numbers, deterministic):
    made = torch.Generator().manual_seed(0)
    targets = torch.tensor([3, 1, 3, 0, 7, 7, 3, 2, 9, 1, 3, 5])
    states, own = torch.randn(12, 4, generator=made).bfloat16(), torch.randn(12, generator=made)
    weight = torch.randn(10, 4, generator=made).bfloat16()
    want = weight.double().index_add(0, targets, own.double()[:, None] * states.double())
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.device("meta"):  # nothing is made on a default device
            add_target_rows(weight, states, targets, own, numbers)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(weight, want.bfloat16())


@pytest.mark.parametrize("given", [False, True])
def test_target_rows__given_gradient__not_rounded(given):
    """1 + 2^-9 and -1 of the same target leave 2^-9; the first is 1 in bfloat16."""
    hidden, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(8, 4, dtype=torch.bfloat16)
    own, targets = torch.tensor([1 + 2.0**-9, -1.0]), torch.tensor([5, 5])
    grad = torch.zeros(2, 8).index_fill_(1, targets[:1], 1.0) * own[:, None]
    sums = Gradients(hidden, weight, None, [True, True, False], torch.float32, torch.bfloat16, targets)
    sums.add(slice(0, 2), grad.bfloat16() if given else grad, hidden, Head(weight, None), own if given else None)
    assert sums.all()[1][5].tolist() == [2.0**-9] * 4


def test_add_target_rows__no_positions__nothing_added():
    weight, none = torch.ones(3, 2), torch.zeros(0)
    add_target_rows(weight, torch.zeros(0, 2), none.long(), none)
    assert torch.equal(weight, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("positions", "dtype", "trains", "apart"),
    [(32, torch.bfloat16, True, True), (75, torch.float16, True, True), (76, torch.bfloat16, True, False),
     (32, torch.float32, True, False), (32, None, True, False), (32, torch.bfloat16, False, False)],
)  # fmt: skip
def test_defers_target_rows__low_sum_of_few_targets__true(positions, dtype, trains, apart):
    hidden, weight = torch.zeros(positions, 16, dtype=torch.bfloat16), torch.zeros(302, 16, requires_grad=trains)
    assert defers_target_rows(hidden, weight, 300, dtype) is apart


def test_weight_gradient__low_sum_in_default_chunks__equals_one_chunk():
    sides, targets = draw(n=32, d_s=16, v=300, dtype=torch.float32, seed=3)
    grads_of = []
    for chunk in (32, None):
        sides["weight_s"].grad = None
        run(sides, targets, v=300, chunk=chunk, weight_grad_dtype=torch.bfloat16).loss.backward()
        grads_of.append(sides["weight_s"].grad.clone())
    assert torch.equal(*grads_of) and grads_of[0].abs().max() > 0


def test_bias_gradient__bfloat16_logits__summed_in_float32():
    """2,048 ones and a half of one: bfloat16 would leave the half out."""
    hidden, weight, bias = torch.zeros(2049, 2).bfloat16(), torch.zeros(3, 2).bfloat16(), torch.zeros(3).bfloat16()
    gradients = Gradients(hidden, weight, bias, [False, False, True], torch.float32)
    gradients.add(
        slice(None), torch.cat([torch.ones(2048, 3), torch.full((1, 3), 0.5)]).bfloat16(), hidden, Head(weight, bias)
    )
    assert gradients.bias.tolist() == [2048.5] * 3


@pytest.mark.parametrize("bias", [None, torch.arange(3.0)])
def test_head_logits__out__written_there(bias):
    hidden, head = torch.randn(4, 5), Head(torch.randn(3, 5), bias)
    space = torch.full((6, 3), 7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it has to change the size of what it writes into
        found = head.logits(hidden, space)
    assert found.data_ptr() == space.data_ptr()
    torch.testing.assert_close(found, head.logits(hidden), rtol=1e-6, atol=1e-6)
    assert torch.equal(space[4:], torch.full((2, 3), 7.0))


def test_head_part__rows_bias_and_cap__taken():
    head = Head(torch.randn(5, 2), torch.arange(5.0), 1.5)
    part = head.part(1, 3)
    assert torch.equal(part.weight, head.weight[1:3]) and part.bias.tolist() == [1.0, 2.0] and part.cap == 1.5
    assert Head(head.weight, None).part(0, 2)[1:] == (None, None)


def test_add_product__one_dtype__in_place():
    left, right, total = torch.randn(4, 3), torch.randn(3, 5), torch.empty(4, 5)
    with Footprint() as seen:
        _add_product(total, left, right, True)
        _add_product(total, left, right, False)
    torch.testing.assert_close(total, 2 * left @ right, rtol=1e-6, atol=1e-6)
    assert seen.made == 2 * total.numel()  # the two results, and no product in addition


def test_gradients__no_positions_and_frozen_head__zero():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(8, 4)
    targets = torch.zeros(0, dtype=torch.int64)
    distillation_head(
        hidden, weight, None, None, None, None, targets, None, vocabulary=8, ce_weight=1.0
    ).loss.backward()
    assert hidden.grad.shape == (0, 4)


def test_head__surrounding_autocast__same_result():
    sides, targets = draw(dtype=torch.float32)
    again, _ = draw(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(sides, targets)
        inside.loss.backward()
    outside = run(again, targets)
    outside.loss.backward()
    assert torch.equal(inside.loss, outside.loss)
    for got, want in zip(grads(sides), grads(again), strict=True):
        assert torch.equal(got, want)


def test_cross_entropy__bfloat16__target_logit_not_rounded():
    """Plain torch reads them rounded, which makes nearly all of its error; and so do we where the type has room for it."""
    apart = {"ours": 0.0, "plain": 0.0}
    for seed in range(8):
        sides, targets = draw(n=64, d_s=48, v=400, dtype=torch.bfloat16, grad=False, seed=seed)
        parts = sides["hidden_s"] / 4, sides["weight_s"][:400], sides["bias_s"][:400]
        exact = torch.nn.functional.linear(*(part.double() for part in parts))
        want = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
        plain = torch.nn.functional.linear(*parts).double()
        ours = distillation_head(*parts, None, None, None, targets, None, vocabulary=400, ce_weight=1.0)
        apart["ours"] += (ours.ce_sum.double() - want).square().item()
        apart["plain"] += (torch.nn.functional.cross_entropy(plain, targets, reduction="sum") - want).square().item()
    assert apart["ours"] < 0.1 * apart["plain"]
