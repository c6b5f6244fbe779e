"""The chunked head: equal to the oracle and to plain autograd, for the loss and every gradient, however it is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from grace_plugin.losses import distillation_head, teacher_gates
from grace_plugin.losses.fused_head_chunks import positions_per_chunk
from tests.losses.sides import NAMES, draw, full, grads, run
from tests.reference import distill as oracle
from tests.reference.footprint import Footprint


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_head__loss_and_parts__equal_scalar_oracle(chunk):
    sides, targets = draw(seed=1)
    out = run(sides, targets, chunk=chunk, temperature=1.5, alpha=0.8, beta_dkd=3.0, sharpness=2.0)
    plain = [sides[name].tolist() for name in NAMES]
    want = oracle.head(*plain, targets.tolist(), 9, 0.3, 0.7, 1.5, 0.8, 3.0, 2.0)
    for name, value in want.items():
        assert getattr(out, name).item() == pytest.approx(value, rel=1e-10), name
    assert out.positions == 7


@pytest.mark.parametrize("chunk", [1, 2, 7, 1024])
def test_head__chunked__equals_full_loss_and_gradients(chunk):
    sides, targets = draw(seed=2)
    again, _ = draw(seed=2)
    out = run(sides, targets, chunk=chunk)
    want = full(again, targets)
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0)
    out.loss.backward()
    want.backward()
    for got, expected in zip(grads(sides), grads(again), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_head__defaults__are_the_papers():
    sides, targets = draw(seed=2)
    default = run(sides, targets)
    named = run(sides, targets, temperature=2.0, alpha=1.0, beta_dkd=4.0)
    assert torch.equal(default.loss, named.loss)
    parts = 4.0 * (default.gated_tckd_sum + 4.0 * default.gated_nckd_sum)
    torch.testing.assert_close(default.gated_dkd_sum, parts, rtol=1e-13, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 11), st.integers(2, 12), st.integers(0, 10_000))
def test_head__chunk_sizes__same_result(n, chunk, v, seed):
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
def test_head__window_in_micro_batches__same_result(cut, seed):
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
def test_head__hidden_weight_and_bias__pass_gradcheck(vocabulary):
    sides, targets = draw(n=4, d_s=3, v=vocabulary, seed=4)

    def loss(hidden, weight, bias):
        return run({**sides, "hidden_s": hidden, "weight_s": weight, "bias_s": bias}, targets, v=vocabulary).loss

    assert gradcheck(loss, tuple(sides[name] for name in NAMES[:3]))


def test_head__cross_entropy_alone__passes_gradcheck():
    sides, targets = draw(n=4, d_s=3)

    def loss(hidden, weight, bias):
        return distillation_head(
            hidden, weight, bias, None, None, None, targets, None, vocabulary=9, ce_weight=0.5, chunk=3
        ).loss

    assert gradcheck(loss, tuple(sides[name] for name in NAMES[:3]))


def test_head__cross_entropy_alone__equals_torch():
    sides, targets = draw()
    out = distillation_head(
        sides["hidden_s"],
        sides["weight_s"],
        None,
        None,
        None,
        None,
        targets,
        None,
        vocabulary=9,
        ce_weight=2.0,
        chunk=2,
    )
    logits = (sides["hidden_s"] @ sides["weight_s"].T)[:, :9]
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(out.ce_sum, want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, 2 * want, rtol=1e-12, atol=0)
    rest = [out.gated_dkd_sum, out.gated_tckd_sum, out.gated_nckd_sum, out.gate_sum]
    assert [value.item() for value in rest] == [0, 0, 0, 0]


def test_head__gate_without_teacher__not_used():
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
        ce_weight=1.0,
        kd_weight=3.0,
    )
    torch.testing.assert_close(out.loss, out.ce_sum)
    assert out.gate_sum.item() == 0


def test_head__padded_rows__no_mass_and_no_gradient():
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


def test_head__loss_weights__numbers_or_tensors_without_gradient():
    sides, targets = draw()
    number = run(sides, targets, ce_weight=0.25, kd_weight=0.5)
    ce_weight = torch.tensor(0.25, requires_grad=True)
    tensor = run(sides, targets, ce_weight=ce_weight, kd_weight=torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(number.loss, tensor.loss)
    assert tensor.loss.dtype == torch.float64
    tensor.loss.backward()
    assert ce_weight.grad is None
    single, y = draw(dtype=torch.float32)
    out = run(
        single, y, ce_weight=torch.tensor(0.25, dtype=torch.float64), kd_weight=torch.tensor(0.5, dtype=torch.float64)
    )
    assert out.loss.dtype == torch.float32


def test_head__loss_weight_of_zero__term_is_off():
    sides, targets = draw()
    out = run(sides, targets, ce_weight=0.0, kd_weight=1.0)
    torch.testing.assert_close(out.loss, out.gated_dkd_sum)
    out = run(sides, targets, ce_weight=1.0, kd_weight=0.0)
    torch.testing.assert_close(out.loss, out.ce_sum)
    out.loss.backward()
    again, _ = draw()
    torch.nn.functional.cross_entropy(
        (again["hidden_s"] @ again["weight_s"].T + again["bias_s"])[:, :9], targets, reduction="sum"
    ).backward()
    for got, want in zip(grads(sides), grads(again), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_head__frozen_head__no_gradient_formed():
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


def test_head__frozen_hidden_states__head_trains():
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


def test_head__after_a_chunk__no_logits_are_kept():
    """Whatever is saved for backward has the size of the inputs, however many positions there are."""
    sides, targets = draw(n=60, v=40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = run(sides, targets, v=40, chunk=4)
    assert sorted(saved) == sorted(sides[name].numel() for name in NAMES[:3])
    assert max(saved) < 60 * 40
    assert out.loss.requires_grad


@pytest.mark.parametrize("chunk", [1, 8])
def test_head__logits__at_most_a_chunk_at_one_time(chunk):
    """60 positions, 40 ids: the largest tensor of the whole pass is the chunk's logits, or an input."""
    sides, targets = draw(n=60, v=40)
    with Footprint() as gates:
        teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=40, chunk=chunk)
    assert gates.largest == max(chunk * 40, 40 * 6)
    assert gates.calls == -(-60 // chunk)
    with Footprint() as head:
        run(sides, targets, v=40, chunk=chunk).loss.backward()
    assert head.largest == max(chunk * 40, *(sides[name].numel() for name in NAMES))


def test_positions_per_chunk__default__209_mib_of_both_sides():
    assert positions_per_chunk(151_936, 2) == 480
    assert {type(positions_per_chunk(vocabulary, 2)) for vocabulary in (32, 32_000, 151_936)} == {int}
    assert positions_per_chunk(32_000, 2) == 2272  # 209 MiB hold 2,282 rows, 210 MiB would hold 2,293
    assert positions_per_chunk(45_659, 2) == 1584 < (210 << 20) // (3 * 45_659)  # 209 MiB hold 1,599 rows
    assert positions_per_chunk(151_936, 4) == 240
    assert positions_per_chunk(3, 4) == 4096
    assert positions_per_chunk(151_936, 2, positions=4096) == 512  # 209 MiB hold 613 rows, four tiles and a half
    assert (
        positions_per_chunk(151_936, 2, positions=4000) == 512 and positions_per_chunk(151_936, 2, positions=600) == 304
    )
    assert (
        positions_per_chunk(800_000, 2, positions=4096) == 128 and positions_per_chunk(10**6, 2, positions=4096) == 96
    )
    assert positions_per_chunk(151_936, 2, positions=5) == 16
    assert type(positions_per_chunk(151_936, 2, positions=4096)) is int
    assert positions_per_chunk(10**8, 2) == 16
    assert positions_per_chunk(17_835, 2) == 4096  # 26,752 columns of 2 bytes: 209 MiB to the byte
    hidden, weight = torch.randn(4200, 2), torch.randn(3, 2)
    targets = torch.zeros(4200, dtype=torch.int64)
    with Footprint() as gates:
        gate, _, _ = teacher_gates(hidden, weight, None, vocabulary=3)
    assert gates.largest == 4096 * 3
    with Footprint() as head:
        distillation_head(hidden, weight, None, hidden, weight, None, targets, gate, vocabulary=3, ce_weight=1.0)
    assert head.largest == 4096 * 3


def test_head__no_kd_weight__distillation_is_off():
    sides, targets = draw()
    gate = torch.ones(7, dtype=torch.float64)
    out = distillation_head(*(sides[name] for name in NAMES), targets, gate, vocabulary=9, ce_weight=2.0)
    torch.testing.assert_close(out.loss, 2.0 * out.ce_sum)
    assert out.gated_dkd_sum.item() > 0


def test_head__no_grad__same_value_without_graph():
    sides, targets = draw()
    with torch.no_grad():
        out = run(sides, targets)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, run(sides, targets).loss.detach())


def test_head__parts__detached():
    sides, targets = draw()
    out = run(sides, targets)
    parts = [out.ce_sum, out.gated_dkd_sum, out.gated_tckd_sum, out.gated_nckd_sum, out.gate_sum]
    assert not any(part.requires_grad for part in parts)
    assert [part.ndim for part in parts] == [0] * 5


def test_head__backward_twice__multiplied_by_incoming_gradient():
    sides, targets = draw()
    again, _ = draw()
    run(again, targets).loss.backward()
    loss = run(sides, targets).loss * 3.0
    loss.backward(retain_graph=True)
    loss.backward()
    for got, want in zip(grads(sides), grads(again), strict=True):
        torch.testing.assert_close(got, 6 * want, rtol=1e-13, atol=1e-15)


def test_head__no_positions__exact_zero_with_gradient():
    sides, targets = draw(n=0)
    out = run(sides, targets)
    assert out.loss.item() == 0
    assert out.positions == 0
    out.loss.backward()
    assert sides["hidden_s"].grad.shape == (0, 5)
    for name in ("weight_s", "bias_s"):
        assert torch.equal(sides[name].grad, torch.zeros_like(sides[name]))


def test_head__teacher__no_gradient():
    sides, targets = draw()
    for name in NAMES[3:]:
        sides[name].requires_grad_()
    run(sides, targets).loss.backward()
    assert [sides[name].grad for name in NAMES[3:]] == [None] * 3
