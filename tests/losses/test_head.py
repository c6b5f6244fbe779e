"""The chunked head: equal to the oracle and to plain autograd, for the loss and every gradient, however it is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from grace_plugin.losses import HeadOutput, confidence_gate, decoupled_kd, distillation_head, teacher_gates
from tests.reference import distill as oracle
from tests.reference.footprint import Footprint

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


def run(sides, targets, v=9, chunk=3, ce_scale=0.3, kd_scale=0.7, sharpness=1.0, **kwargs) -> HeadOutput:
    gate, _ = teacher_gates(
        sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=v, sharpness=sharpness, chunk=chunk
    )
    scales = {"ce_scale": ce_scale, "kd_scale": kd_scale}
    return distillation_head(
        *(sides[name] for name in NAMES), targets, gate, vocabulary=v, chunk=chunk, **scales, **kwargs
    )


def full(sides, targets, v=9, ce_scale=0.3, kd_scale=0.7, temperature=2.0, alpha=1.0, beta_dkd=4.0):
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
    return ce_scale * ce + kd_scale * (gate * (alpha * tckd + beta_dkd * nckd)).sum() * temperature**2


def grads(sides):
    return [sides[name].grad for name in NAMES[:3]]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_loss_and_every_part_equal_the_scalar_oracle(chunk):
    sides, targets = draw(seed=1)
    out = run(sides, targets, chunk=chunk, temperature=1.5, alpha=0.8, beta_dkd=3.0, sharpness=2.0)
    plain = [sides[name].tolist() for name in NAMES]
    want = oracle.head(*plain, targets.tolist(), 9, 0.3, 0.7, 1.5, 0.8, 3.0, 2.0)
    for name, value in want.items():
        assert getattr(out, name).item() == pytest.approx(value, rel=1e-10), name
    assert out.positions == 7


@pytest.mark.parametrize("chunk", [1, 2, 7, 1024])
def test_chunked_equals_full_for_the_loss_and_every_gradient(chunk):
    sides, targets = draw(seed=2)
    again, _ = draw(seed=2)
    out = run(sides, targets, chunk=chunk)
    want = full(again, targets)
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0)
    out.loss.backward()
    want.backward()
    for got, expected in zip(grads(sides), grads(again), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_the_defaults_are_the_method_s():
    sides, targets = draw(seed=2)
    default = run(sides, targets)
    named = run(sides, targets, temperature=2.0, alpha=1.0, beta_dkd=4.0)
    assert torch.equal(default.loss, named.loss)
    parts = 4.0 * (default.gated_tckd_sum + 4.0 * default.gated_nckd_sum)
    torch.testing.assert_close(default.gated_dkd_sum, parts, rtol=1e-13, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 11), st.integers(2, 12), st.integers(0, 10_000))
def test_no_chunk_size_changes_anything(n, chunk, v, seed):
    sides, targets = draw(n=n, v=v, seed=seed)
    again, _ = draw(n=n, v=v, seed=seed)
    out, whole = run(sides, targets, v=v, chunk=chunk), run(again, targets, v=v, chunk=n)
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-12, atol=1e-14)
    out.loss.backward()
    whole.loss.backward()
    for got, expected in zip(grads(sides), grads(again), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 10_000))
def test_cutting_the_window_into_micro_batches_changes_nothing(cut, seed):
    n = sum(cut)
    sides, targets = draw(n=n, seed=seed)
    again, _ = draw(n=n, seed=seed)
    run(again, targets).loss.backward()
    start = 0
    for size in cut:
        rows = slice(start, start + size)
        start += size
        part = {name: value[rows] if name.startswith("hidden") else value for name, value in sides.items()}
        run(part, targets[rows]).loss.backward()
    for got, expected in zip(grads(sides), grads(again), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("vocabulary", [9, 2])
def test_gradcheck_by_hidden_weight_and_bias(vocabulary):
    sides, targets = draw(n=4, d_s=3, v=vocabulary, seed=4)

    def loss(hidden, weight, bias):
        return run({**sides, "hidden_s": hidden, "weight_s": weight, "bias_s": bias}, targets, v=vocabulary).loss

    assert gradcheck(loss, tuple(sides[name] for name in NAMES[:3]))


def test_gradcheck_of_cross_entropy_alone():
    sides, targets = draw(n=4, d_s=3)

    def loss(hidden, weight, bias):
        return distillation_head(
            hidden, weight, bias, None, None, None, targets, None, vocabulary=9, ce_scale=0.5, chunk=3
        ).loss

    assert gradcheck(loss, tuple(sides[name] for name in NAMES[:3]))


def test_cross_entropy_alone_is_torch_s_over_the_common_vocabulary():
    sides, targets = draw()
    out = distillation_head(
        sides["hidden_s"], sides["weight_s"], None, None, None, None, targets, None, vocabulary=9, ce_scale=2.0, chunk=2
    )
    logits = (sides["hidden_s"] @ sides["weight_s"].T)[:, :9]
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(out.ce_sum, want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, 2 * want, rtol=1e-12, atol=0)
    rest = [out.gated_dkd_sum, out.gated_tckd_sum, out.gated_nckd_sum, out.gate_sum]
    assert [value.item() for value in rest] == [0, 0, 0, 0]


def test_a_gate_without_a_teacher_is_not_used():
    sides, targets = draw()
    gate = torch.full((7,), math.nan, dtype=torch.float64)
    out = distillation_head(
        sides["hidden_s"],
        sides["weight_s"],
        None,
        None,
        None,
        None,
        targets,
        gate,
        vocabulary=9,
        ce_scale=1.0,
        kd_scale=3.0,
    )
    torch.testing.assert_close(out.loss, out.ce_sum)
    assert out.gate_sum.item() == 0


def test_padded_rows_have_no_mass_and_no_gradient():
    sides, targets = draw(pad_s=2, pad_t=3)
    with torch.no_grad():
        sides["weight_s"][9:] = 1e3
        sides["weight_t"][9:] = 1e3
    tight = {k: v.detach()[:9].clone() if k[0] in "wb" else v.detach().clone() for k, v in sides.items()}
    out, want = run(sides, targets), run(tight, targets)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-14, atol=0)
    out.loss.backward()
    assert torch.equal(sides["weight_s"].grad[9:], torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(sides["bias_s"].grad[9:], torch.zeros(2, dtype=torch.float64))
    assert (sides["weight_s"].grad[:9].abs().sum(1) > 0).all()


def test_scales_may_be_numbers_or_tensors_and_are_constants():
    sides, targets = draw()
    number = run(sides, targets, ce_scale=0.25, kd_scale=0.5)
    ce_scale = torch.tensor(0.25, requires_grad=True)
    tensor = run(sides, targets, ce_scale=ce_scale, kd_scale=torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(number.loss, tensor.loss)
    assert tensor.loss.dtype == torch.float64
    tensor.loss.backward()
    assert ce_scale.grad is None
    single, y = draw(dtype=torch.float32)
    out = run(
        single, y, ce_scale=torch.tensor(0.25, dtype=torch.float64), kd_scale=torch.tensor(0.5, dtype=torch.float64)
    )
    assert out.loss.dtype == torch.float32


def test_a_scale_of_zero_switches_its_term_off():
    sides, targets = draw()
    out = run(sides, targets, ce_scale=0.0, kd_scale=1.0)
    torch.testing.assert_close(out.loss, out.gated_dkd_sum)
    out = run(sides, targets, ce_scale=1.0, kd_scale=0.0)
    torch.testing.assert_close(out.loss, out.ce_sum)
    out.loss.backward()
    again, _ = draw()
    torch.nn.functional.cross_entropy(
        (again["hidden_s"] @ again["weight_s"].T + again["bias_s"])[:, :9], targets, reduction="sum"
    ).backward()
    for got, want in zip(grads(sides), grads(again), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_a_frozen_head_gets_no_gradient_and_none_is_formed():
    sides, targets = draw()
    for name in ("weight_s", "bias_s"):
        sides[name].requires_grad_(False)
    again, _ = draw()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = run(sides, targets)
    out.loss.backward()
    run(again, targets).loss.backward()
    assert sides["weight_s"].grad is None
    assert sides["bias_s"].grad is None
    assert saved == [(7, 5)]
    torch.testing.assert_close(sides["hidden_s"].grad, again["hidden_s"].grad)


def test_a_frozen_trunk_still_trains_the_head():
    sides, targets = draw()
    sides["hidden_s"].requires_grad_(False)
    again, _ = draw()
    run(sides, targets).loss.backward()
    run(again, targets).loss.backward()
    assert sides["hidden_s"].grad is None
    torch.testing.assert_close(sides["weight_s"].grad, again["weight_s"].grad)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        run(sides, targets)
    assert saved == [(11, 5), (11,)]


def test_nothing_of_tokens_times_vocabulary_outlives_a_chunk():
    """Whatever is saved for backward has the size of the inputs, however many positions there are."""
    sides, targets = draw(n=60, v=40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = run(sides, targets, v=40, chunk=4)
    assert sorted(saved) == sorted(sides[name].numel() for name in NAMES[:3])
    assert max(saved) < 60 * 40
    assert out.loss.requires_grad


@pytest.mark.parametrize("chunk", [1, 8])
def test_no_more_than_a_chunk_of_logits_exists_at_one_time(chunk):
    """60 positions, 40 ids: the largest tensor of the whole pass is the chunk's logits, or an input."""
    sides, targets = draw(n=60, v=40)
    with Footprint() as gates:
        teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=40, chunk=chunk)
    assert gates.largest == max(chunk * 40, 40 * 6)
    with Footprint() as head:
        run(sides, targets, v=40, chunk=chunk).loss.backward()
    assert head.largest == max(chunk * 40, *(sides[name].numel() for name in NAMES))


def test_a_chunk_is_1024_positions_unless_asked_otherwise():
    hidden, weight = torch.randn(1100, 2), torch.randn(3, 2)
    targets = torch.zeros(1100, dtype=torch.int64)
    with Footprint() as gates:
        gate, _ = teacher_gates(hidden, weight, None, vocabulary=3)
    assert gates.largest == 1024 * 3
    with Footprint() as head:
        distillation_head(hidden, weight, None, hidden, weight, None, targets, gate, vocabulary=3, ce_scale=1.0)
    assert head.largest == 1024 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_matrix_product_runs_in_the_dtype_of_the_hidden_states(dtype):
    sides, targets = draw(dtype=dtype)
    with Footprint() as seen:
        run(sides, targets).loss.backward()
    assert seen.products == {dtype}


def test_distillation_is_off_until_it_is_given_a_weight():
    sides, targets = draw()
    gate = torch.ones(7, dtype=torch.float64)
    out = distillation_head(*(sides[name] for name in NAMES), targets, gate, vocabulary=9, ce_scale=2.0)
    torch.testing.assert_close(out.loss, 2.0 * out.ce_sum)
    assert out.gated_dkd_sum.item() > 0


@pytest.mark.parametrize("double", ["s", "t"])
def test_a_float64_side_decides_the_precision(double):
    sides, targets = draw(dtype=torch.float32)
    raised = {k: v.detach().double() if k.endswith(f"_{double}") else v.detach() for k, v in sides.items()}
    out = run(raised, targets, ce_scale=torch.tensor(0.3), kd_scale=0.7)
    parts = [out.loss, out.ce_sum, out.gated_dkd_sum, out.gated_tckd_sum, out.gated_nckd_sum, out.gate_sum]
    assert {part.dtype for part in parts} == {torch.float64}
    everything = {k: v.detach().double() for k, v in sides.items()}
    want = run(everything, targets, ce_scale=torch.tensor(0.3, dtype=torch.float32), kd_scale=0.7)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=0)


def test_a_bfloat16_teacher_has_float32_gates():
    sides, _ = draw(dtype=torch.bfloat16)
    gate, entropy = teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=9, chunk=2)
    logits = torch.nn.functional.linear(sides["hidden_t"], sides["weight_t"], sides["bias_t"])[:, :9]
    want, _ = confidence_gate(logits.float())
    assert (gate.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(gate, want, rtol=0, atol=5e-3)
    assert len(set(gate.tolist())) == 7
    assert not torch.equal(gate, gate.bfloat16().float())


def test_without_gradients_no_graph_is_built_and_the_value_is_the_same():
    sides, targets = draw()
    with torch.no_grad():
        out = run(sides, targets)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, run(sides, targets).loss.detach())


def test_the_parts_are_detached():
    sides, targets = draw()
    out = run(sides, targets)
    parts = [out.ce_sum, out.gated_dkd_sum, out.gated_tckd_sum, out.gated_nckd_sum, out.gate_sum]
    assert not any(part.requires_grad for part in parts)
    assert [part.ndim for part in parts] == [0] * 5


def test_the_incoming_gradient_multiplies_and_backward_can_run_twice():
    sides, targets = draw()
    again, _ = draw()
    run(again, targets).loss.backward()
    loss = run(sides, targets).loss * 3.0
    loss.backward(retain_graph=True)
    loss.backward()
    for got, want in zip(grads(sides), grads(again), strict=True):
        torch.testing.assert_close(got, 6 * want, rtol=1e-13, atol=1e-15)


def test_no_position_is_an_exact_zero_through_which_backward_runs():
    sides, targets = draw(n=0)
    out = run(sides, targets)
    assert out.loss.item() == 0
    assert out.positions == 0
    out.loss.backward()
    assert sides["hidden_s"].grad.shape == (0, 5)
    for name in ("weight_s", "bias_s"):
        assert torch.equal(sides[name].grad, torch.zeros_like(sides[name]))


def test_the_teacher_gets_no_gradient():
    sides, targets = draw()
    for name in NAMES[3:]:
        sides[name].requires_grad_()
    run(sides, targets).loss.backward()
    assert [sides[name].grad for name in NAMES[3:]] == [None] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_exact_as_torch_s_own_products(dtype):
    """The error of each gradient against float64 stays within twice that of unchunked torch in the same dtype."""
    sides, targets = draw(n=64, d_s=32, d_t=48, v=50, dtype=dtype, seed=6)
    torch_own, _ = draw(n=64, d_s=32, d_t=48, v=50, dtype=dtype, seed=6)
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in sides.items()}
    scales = {"ce_scale": 1 / 64, "kd_scale": 0.5 / 64}
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


def test_float16_gradients_of_a_long_window_do_not_underflow():
    """1 / (tokens of the window) times a probability is below float16's smallest number; the sum is not."""
    sides, targets = draw(n=32, dtype=torch.float16)
    exact, _ = draw(n=32, dtype=torch.float16)
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in exact.items()}
    run(sides, targets, ce_scale=2e-6, kd_scale=0.0).loss.backward()
    run(exact, targets, ce_scale=2e-6, kd_scale=0.0).loss.backward()
    error = (sides["weight_s"].grad.double() - exact["weight_s"].grad).abs().max()
    assert exact["weight_s"].grad.abs().max() > 5e-6
    assert error < 1e-7
    sides["hidden_s"].grad = exact["hidden_s"].grad = None
    (4096 * run(sides, targets, ce_scale=2e-6, kd_scale=0.0).loss).backward()
    (4096 * run(exact, targets, ce_scale=2e-6, kd_scale=0.0).loss).backward()
    error = (sides["hidden_s"].grad.double() - exact["hidden_s"].grad).norm()
    assert error < 2e-3 * exact["hidden_s"].grad.norm()


def test_a_weight_of_another_dtype_is_multiplied_in_the_dtype_of_the_hidden_state():
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


def test_weight_gradients_of_many_chunks_are_added_in_float32():
    """256 chunks whose single contributions vanish against a bfloat16 sum."""
    n = 256
    hidden = torch.ones(n, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64)
    out = distillation_head(hidden, weight, bias, None, None, None, targets, None, vocabulary=8, ce_scale=1.0, chunk=1)
    out.loss.backward()
    assert (weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert bias.grad.tolist() == pytest.approx([-n * 7 / 8, *[n / 8] * 7], rel=4e-3)
    assert weight.grad[0, 0].item() == pytest.approx(-n * 7 / 8, rel=4e-3)
    assert weight.grad[1, 0].item() == pytest.approx(n / 8, rel=4e-3)


def test_a_surrounding_autocast_changes_nothing():
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


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_teacher_gates_equal_the_gates_of_the_whole(chunk):
    sides, _ = draw()
    gate, entropy = teacher_gates(
        sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=9, sharpness=1.5, chunk=chunk
    )
    logits = (sides["hidden_t"] @ sides["weight_t"].T + sides["bias_t"])[:, :9]
    want_gate, want_entropy = confidence_gate(logits, 1.5)
    torch.testing.assert_close(gate, want_gate, rtol=1e-13, atol=0)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=0)


def test_teacher_gates_default_to_the_published_gate_without_gradient_or_autocast():
    sides, _ = draw(dtype=torch.float32)
    sides["hidden_t"].requires_grad_()
    arguments = sides["hidden_t"], sides["weight_t"], None
    gate, _ = teacher_gates(*arguments, vocabulary=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = teacher_gates(*arguments, vocabulary=9, sharpness=1.0)
    assert torch.equal(gate, inside)
    assert gate.dtype == torch.float32
    assert not gate.requires_grad


def head_of(sides, **changed):
    given = {**sides, **changed}
    arguments = {
        "vocabulary": 9,
        "ce_scale": 1.0,
        "kd_scale": 1.0,
        **{k: v for k, v in changed.items() if k == "vocabulary"},
    }
    arguments["chunk"] = changed.get("chunk", 3)
    targets = given.get("targets", torch.zeros(7, dtype=torch.int64))
    return distillation_head(*(given[name] for name in NAMES), targets, given.get("gate", torch.ones(7)), **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_s": torch.zeros(7, 4)}, r"student: hidden states \(7, 4\) do not fit a head of \(11, 5\)"),
        ({"hidden_s": torch.zeros(5)}, "student: hidden states"),
        ({"weight_s": torch.zeros(5)}, "student: hidden states"),
        ({"hidden_t": torch.zeros(7, 4)}, r"teacher: hidden states \(7, 4\) do not fit a head of \(12, 6\)"),
        ({"vocabulary": 12}, "student: a head of 11 rows does not hold a common vocabulary of 12 ids"),
        ({"vocabulary": 0}, "does not hold a common vocabulary of 0 ids"),
        ({"weight_t": torch.zeros(8, 6)}, "teacher: a head of 8 rows does not hold a common vocabulary of 9 ids"),
        ({"bias_s": torch.zeros(8)}, "student: a head of 11 rows does not hold"),
        ({"bias_t": torch.zeros(8)}, "teacher: a head of 12 rows does not hold"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, "6 targets for 7 student positions"),
        ({"hidden_t": torch.zeros(6, 6)}, "6 teacher hidden states for 7 student positions"),
        ({"gate": torch.ones(8)}, "8 gates for 7 student positions"),
        ({"gate": None}, "without weight_t or gate"),
        ({"weight_t": None}, "without weight_t or gate"),
        ({"chunk": 0}, "chunk must be at least 1 position, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, message):
    sides, _ = draw(grad=False)
    with pytest.raises(ValueError, match=message):
        head_of(sides, **changed)


def test_the_largest_vocabulary_and_the_smallest_chunk_are_accepted():
    sides, _ = draw(grad=False)
    assert head_of(sides, vocabulary=11, chunk=1).loss.item() > 0
    assert head_of(sides, vocabulary=1).loss.item() == 0


def test_impossible_settings_are_refused():
    sides, targets = draw()
    with pytest.raises(ValueError, match="temperature must be a positive"):
        run(sides, targets, temperature=0.0)
    with pytest.raises(ValueError, match="teacher: a head of 12 rows"):
        teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=13)
    with pytest.raises(ValueError, match="teacher: a head of 12 rows"):
        teacher_gates(sides["hidden_t"], sides["weight_t"], torch.zeros(8), vocabulary=9)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=9, chunk=0)
