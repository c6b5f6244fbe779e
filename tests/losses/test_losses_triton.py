"""The kernels of the losses against float64, in Triton's interpreter or on CUDA; run by `make unit` with TRITON_INTERPRET=1."""

import pytest
import torch

from grace_plugin.losses import (
    confidence_gate,
    countable_images,
    distillation_head,
    fused_head_triton,
    relational_loss,
    relational_triton,
    teacher_gates,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH_S, WIDTH_T = 24, 40


def draw(n, vocabulary, scale=1.0, seed=0, dtype=torch.float32, bias=False):
    """Hidden states, heads of different padding, biases and targets, one of them each side's likeliest."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=made)

    sides = {
        "hidden_s": normal(n, WIDTH_S), "weight_s": normal(vocabulary + 3, WIDTH_S) * scale / WIDTH_S**0.5,
        "bias_s": normal(vocabulary + 3) if bias else None,
        "hidden_t": normal(n, WIDTH_T), "weight_t": normal(vocabulary + 1, WIDTH_T) * scale / WIDTH_T**0.5,
        "bias_t": normal(vocabulary + 1) if bias else None,
    }  # fmt: skip
    targets = torch.randint(vocabulary, (n,), generator=made)
    targets[0] = (sides["hidden_t"][0] @ sides["weight_t"][:vocabulary].T).argmax()
    return {k: v if v is None else v.to(DEVICE, dtype) for k, v in sides.items()}, targets.to(DEVICE)


def losses(sides, targets, gate, vocabulary, **options):
    """The head's output and the gradients of the student's side."""
    sides = {k: v if v is None else v.detach().clone() for k, v in sides.items()}
    wanted = [name for name in ("hidden_s", "weight_s", "bias_s") if sides[name] is not None]
    for name in wanted:
        sides[name].requires_grad_()
    out = distillation_head(**sides, targets=targets, gate=gate, vocabulary=vocabulary, **options)
    out.loss.backward()
    return out, {name: sides[name].grad for name in wanted}


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("vocabulary", "temperature", "scale"),
    [(37, 2.0, 1.0), (2049, 2.0, 8.0), (5000, 3.0, 1.0), (9000, 2.0, 1.0), (2, 0.5, 1.0)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_kernels__head_and_gates__equal_float64(vocabulary, temperature, scale, bias):
    sides, targets = draw(7, vocabulary, scale, bias=bias)
    assert fused_head_triton.usable(sides["hidden_s"].new_empty(0, vocabulary))
    gate, entropy, _ = teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=vocabulary)
    exact = {k: v if v is None else v.double() for k, v in sides.items()}
    logits_t = torch.nn.functional.linear(exact["hidden_t"], exact["weight_t"], exact["bias_t"])[:, :vocabulary]
    gate64, entropy64 = confidence_gate(logits_t)
    assert (entropy - entropy64).abs().max() < 3e-6
    assert (gate - gate64).abs().max() < 3e-6
    options = {"ce_weight": 0.3, "kd_weight": torch.tensor(0.7, device=DEVICE), "temperature": temperature}
    found, grads = losses(sides, targets, gate, vocabulary, chunk=4, **options)
    want, grads64 = losses(exact, targets, gate64, vocabulary, **options)
    for part in ("loss", "ce_sum", "gated_dkd_sum", "gated_tckd_sum", "gated_nckd_sum", "gate_sum"):
        torch.testing.assert_close(
            getattr(found, part).double(), getattr(want, part), rtol=4e-6, atol=4e-6
        )  # sums of 7 positions in nats
    for name, grad in grads.items():
        assert relative(grad, grads64[name]) < 4e-6, name
        assert not grad[vocabulary:].any() or name == "hidden_s"


@pytest.mark.parametrize("caps", [(None, None), (1.5, 0.7), (2.0, None), (None, 3.0)])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(("vocabulary", "temperature"), [(37, 2.0), (5000, 3.0)])
def test_kernels__capped_logits_and_logsumexp__equal_float64(vocabulary, temperature, sliced, caps):
    sides, targets = draw(3, vocabulary, 4.0)
    teacher = [sides[f"{name}_t"] for name in ("hidden", "weight", "bias")]
    how = {"vocabulary": vocabulary, "temperature": temperature, "softcap": caps[1]}
    gate, _, sums = teacher_gates(*teacher, targets, **how)
    exact = {k: v if v is None else v.double() for k, v in sides.items()}
    gate64, _, none = teacher_gates(*(v if v is None else v.double() for v in teacher), targets, **how)
    assert none is None
    assert (gate - gate64).abs().max() < 3e-6
    options = {"ce_weight": 0.3, "kd_weight": 0.7, "temperature": temperature, "softcaps": caps, "chunk": 2}
    found, grads = losses(sides, targets, gate, vocabulary, teacher_logsumexp=sums if sliced else None, **options)
    want, grads64 = losses(exact, targets, gate64, vocabulary, **options)
    for part in ("loss", "ce_sum", "gated_dkd_sum", "gated_tckd_sum", "gated_nckd_sum"):
        torch.testing.assert_close(  # the teacher's mass is rounded once more: 4.4e-6
            getattr(found, part).double(), getattr(want, part), rtol=6e-6 if sliced else 4e-6, atol=4e-6
        )
    for name, grad in grads.items():
        assert relative(grad, grads64[name]) < 4e-6, name


def test_kernels__cross_entropy_alone__equals_float64():
    sides, targets = draw(5, 300)
    alone = sides | {"hidden_t": None, "weight_t": None, "bias_t": None}
    found, grads = losses(alone, targets, None, 300, ce_weight=0.2, chunk=2)
    exact = {k: v if v is None else v.double() for k, v in alone.items()}
    want, grads64 = losses(exact, targets, None, 300, ce_weight=0.2)
    assert found.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    assert relative(grads["hidden_s"], grads64["hidden_s"]) < 1e-6
    assert relative(grads["weight_s"], grads64["weight_s"]) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kernels__non_finite_logits__seen_in_the_loss(bad):
    sides, targets = draw(4, 50)
    sides["hidden_s"][2, 3] = bad
    gate, _, _ = teacher_gates(sides["hidden_t"], sides["weight_t"], None, vocabulary=50)
    found, _ = losses(sides, targets, gate, 50, ce_weight=1.0, kd_weight=1.0)
    assert not found.loss.isfinite()


def test_streaming_entropy__logits_of_minus_infinity__no_mass():
    logits = torch.randn(3, 5000, device=DEVICE)
    logits[:, 17:4200] = -torch.inf
    _, entropy = confidence_gate(logits.double())
    from grace_plugin.losses.entropy_triton import StreamingEntropy

    rows = StreamingEntropy(3, 5000, logits.device)
    rows.update(logits, 0)
    found, ids, _ = rows.finalize()
    assert (found - entropy).abs().max() < 2e-6
    assert ids.tolist() == [5000 - 4183] * 3


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_kernels__incoming_gradient__multiplied(factor):
    sides, targets = draw(5, 64)
    gate, _, _ = teacher_gates(sides["hidden_t"], sides["weight_t"], None, vocabulary=64)

    def grad(by):
        hidden = sides["hidden_s"].clone().requires_grad_()
        given = sides | {"hidden_s": hidden}
        (
            distillation_head(**given, targets=targets, gate=gate, vocabulary=64, ce_weight=1.0, kd_weight=1.0).loss
            * by
        ).backward()
        return hidden.grad

    assert torch.equal(grad(factor), grad(1.0) * factor)


def test_kernels__second_backward__refused():
    sides, targets = draw(5, 64)
    hidden = sides["hidden_s"].clone().requires_grad_()
    alone = {"weight_s": sides["weight_s"], "bias_s": None, "hidden_t": None, "weight_t": None, "bias_t": None}
    out = distillation_head(hidden_s=hidden, **alone, targets=targets, gate=None, vocabulary=64, ce_weight=1.0)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        out.loss.backward()


def test_kernels__sum_in_heads_dtype__rounded_once_per_chunk():
    sides, targets = draw(64, 100, dtype=torch.bfloat16)
    gate, _, _ = teacher_gates(sides["hidden_t"], sides["weight_t"], None, vocabulary=100)
    exact = {k: v if v is None else v.double() for k, v in sides.items()}
    options = {"ce_weight": 1.0, "kd_weight": 1.0, "chunk": 8}
    _, grads64 = losses(exact, targets, gate.double(), 100, **options)
    _, low = losses(sides, targets, gate, 100, weight_grad_dtype=torch.bfloat16, **options)
    assert low["weight_s"].dtype == torch.bfloat16
    assert relative(low["weight_s"], grads64["weight_s"]) < 0.007  # 0.0046; one rounding alone is 0.0017


@pytest.mark.parametrize(("tokens", "width_s", "width_t"), [(36, 64, 48), (20, 24, 40), (17, 64, 64), (4, 8, 8)])
def test_relation__degenerate_images__left_out_others_equal_float64(tokens, width_s, width_t):
    made = torch.Generator().manual_seed(tokens)
    states = torch.randn(4, tokens, width_s, generator=made) + 2 * torch.randn(4, 1, width_s, generator=made)
    states[2] = states[2, :1]  # all tokens alike
    states[3, 1] = 0.0
    hidden_s = states.bfloat16().flatten(0, 1).to(DEVICE).requires_grad_()
    hidden_t = torch.randn(4 * tokens, width_t, generator=made).bfloat16().to(DEVICE)
    sizes = [tokens] * 4
    assert relational_triton.usable(hidden_s.unflatten(0, (4, -1)), hidden_t.unflatten(0, (4, -1)))
    found = relational_loss(hidden_s, hidden_t, sizes)
    (grad,) = torch.autograd.grad(found.loss_sum * 0.5, hidden_s)
    exact = hidden_s.detach().double().requires_grad_()
    want = relational_loss(exact, hidden_t.double(), sizes)
    (grad64,) = torch.autograd.grad(want.loss_sum * 0.5, exact)
    assert found.loss_sum.item() == pytest.approx(want.loss_sum.item(), rel=2e-6)
    assert (found.images.item(), found.skipped.item()) == (want.images.item(), want.skipped.item()) == (3, 1)
    assert countable_images(hidden_t, sizes).tolist() == [True] * 4
    assert countable_images(hidden_s.detach(), sizes).tolist() == [True, True, False, True]
    assert relative(grad, grad64) < 0.002  # bfloat16 rounds the gradient to 0.0017
    assert not grad.unflatten(0, (4, -1))[2].any()


@pytest.mark.parametrize(
    ("tokens", "width_s", "width_t", "kernels"), [(4, 3, 8, False), (4, 8, 3, False), (4, 4, 4, True)]
)
def test_relation__small_width__runs_in_torch(tokens, width_s, width_t, kernels):
    made = torch.Generator().manual_seed(5)
    hidden_s = torch.randn(2 * tokens, width_s, generator=made).bfloat16().to(DEVICE)
    hidden_t = torch.randn(2 * tokens, width_t, generator=made).bfloat16().to(DEVICE)
    found = relational_loss(hidden_s, hidden_t, [tokens] * 2)
    want = relational_loss(hidden_s.double(), hidden_t.double(), [tokens] * 2)
    assert found.loss_sum.item() == pytest.approx(want.loss_sum.item(), rel=2e-6)
    in_torch = relational_loss(hidden_s.float(), hidden_t.float(), [tokens] * 2)
    assert kernels or torch.equal(found.loss_sum, in_torch.loss_sum)
    hidden_t[tokens:] = hidden_t[0]
    assert countable_images(hidden_t, [tokens] * 2).tolist() == [True, False]


def test_relation__images_of_mixed_sizes__grouped_by_size():
    made = torch.Generator().manual_seed(1)
    sizes = [9, 3, 16, 9]
    hidden_s = torch.randn(sum(sizes), 32, generator=made).bfloat16().to(DEVICE).requires_grad_()
    hidden_t = torch.randn(sum(sizes), 48, generator=made).bfloat16().to(DEVICE)
    found = relational_loss(hidden_s, hidden_t, sizes)
    want = relational_loss(hidden_s.detach().double(), hidden_t.double(), sizes)
    assert found.loss_sum.item() == pytest.approx(want.loss_sum.item(), rel=2e-6)
    assert (found.images.item(), found.skipped.item()) == (3, 1)
