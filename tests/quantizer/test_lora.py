"""Low-rank updates under fake quantization: the sum is what is quantized, trained and shipped."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from grace_plugin.quantizer import (
    LORA_A,
    LORA_B,
    QuantFormat,
    attach,
    codes,
    dequantize,
    fake_quantize,
    fake_quantize_merged,
    merged,
    start_scales,
    stored_scale,
)
from grace_plugin.quantizer.fake_quant import WeightCache
from grace_plugin.quantizer.lora import _blocks
from grace_plugin.quantizer.scales import row_blocks
from tests.reference.footprint import Footprint

FMT = QuantFormat(4, 8)
SCALING = 1.7


def draw(rows=6, columns=24, rank=2, seed=0, dtype=torch.float32):
    """W, A, B and theta with an update as large as the weight, at which some of the sum is clipped."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(rows, columns, generator=g, dtype=torch.float64).to(dtype)
    lora_a, lora_b = (
        torch.randn(*s, generator=g, dtype=torch.float64).to(wide) for s in ((rank, columns), (rows, rank))
    )
    theta = start_scales(weight, FMT) + 0.3
    return weight, lora_a, lora_b, theta


def quantized(weight, lora_a, lora_b, theta, **kwargs):
    return fake_quantize_merged(weight, lora_a, lora_b, theta, FMT, scaling=SCALING, **kwargs)


def test_lora__value_and_gradients__equal_quantized_sum():
    ours = [t.requires_grad_() for t in draw(dtype=torch.float64)]
    plain = [t.detach().clone().requires_grad_() for t in ours]
    upstream = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    value = quantized(*ours)
    weight, lora_a, lora_b, theta = plain
    expected = fake_quantize(weight + SCALING * (lora_b @ lora_a), theta, FMT)
    assert torch.equal(value, expected)
    value.backward(upstream)
    expected.backward(upstream)
    clipped = codes((weight + SCALING * (lora_b @ lora_a)).detach(), theta.detach(), FMT)
    assert 0 < int((clipped == 7).sum()) + int((clipped == -8).sum()) < clipped.numel()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lora__value__equals_dequantized_code_of_sum(dtype):
    weight, lora_a, lora_b, theta = draw(dtype=dtype)
    total = merged(weight, lora_a, lora_b, scaling=SCALING)
    assert total.dtype == torch.float32
    integers = codes(total, theta, FMT)
    shipped = dequantize(integers, stored_scale(theta, torch.bfloat16))
    value = quantized(weight, lora_a, lora_b, theta)
    assert value.dtype == dtype
    assert torch.equal(value, shipped.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantized(weight, lora_a, lora_b, theta), shipped)
        assert torch.equal(merged(weight, lora_a, lora_b, scaling=SCALING), total)


@pytest.mark.slow
def test_lora__several_blocks__one_weight():
    weight, lora_a, lora_b, theta = draw(rows=2100, columns=2048)
    torch.testing.assert_close(
        merged(weight, lora_a, lora_b, scaling=SCALING), weight + SCALING * (lora_b @ lora_a), rtol=1e-6, atol=1e-5
    )
    lora_b.requires_grad_()
    quantized(weight, lora_a, lora_b, theta).sum().backward()
    assert lora_b.grad[-1].abs().sum() > 0


def test_lora__frozen_weight__no_gradient():
    weight, *trained = draw(dtype=torch.bfloat16)
    trained = [t.requires_grad_() for t in trained]
    quantized(weight, *trained).float().sum().backward()
    assert weight.grad is None
    assert [t.grad.dtype for t in trained] == [torch.float32] * 3
    quantized(weight.requires_grad_(), *trained).float().sum().backward()
    assert weight.grad.dtype == torch.bfloat16


def test_lora__frozen_weight__no_gradient_allocated():
    made = {}
    for trains in (False, True):
        weight, *trained = draw()
        value = quantized(weight.requires_grad_(trains), *(t.requires_grad_() for t in trained)).sum()
        with Footprint() as footprint:
            value.backward()
        made[trains] = footprint.made
    assert made[True] - made[False] >= 3 * weight.numel()  # its matrix, its rows written, what autograd hands on


def test_lora__small_layer_on_host__by_blocks_of_rows():
    assert list(_blocks(torch.empty(6, 24))) == list(row_blocks(6, 24)) != [slice(None)]
    assert len(list(_blocks(torch.empty(2100, 2048)))) == len(list(row_blocks(2100, 2048))) > 1


def test_lora__cache__value_by_dtype():
    tensors, cache = draw(), WeightCache()
    assert quantized(*tensors, cache=cache).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantized(*tensors, cache=cache).dtype == torch.bfloat16
    assert cache.quantizations == 2


def test_lora__saved_tensors__weight_and_trained_alone():
    tensors = [t.requires_grad_() for t in draw()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = quantized(*tensors)
    assert saved == []
    assert [t.data_ptr() for t in value.grad_fn.saved_weights.tensors()] == [t.data_ptr() for t in tensors]
    with torch.no_grad():
        tensors[1].mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation between forward and backward"):
        value.sum().backward()


def test_lora__autocast__sums_in_float32():
    tensors = [t.requires_grad_() for t in draw(dtype=torch.bfloat16)]
    with Footprint() as footprint, torch.autocast("cpu", dtype=torch.bfloat16):
        quantized(*tensors).float().sum().backward()
    assert footprint.products == {torch.float32}


def test_lora__float64_weight__float32_factor_gradients():
    weight, *trained = draw(dtype=torch.float64)
    trained = [t.float().requires_grad_() for t in trained]
    wide = [t.detach().double().requires_grad_() for t in trained]
    found, expected = quantized(weight, *trained), quantized(weight, *wide)
    assert torch.equal(found, expected)
    assert merged(weight, *trained[:2], scaling=SCALING).dtype == torch.float64
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(trained, wide, strict=True):
        assert one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-6, atol=1e-6)


def test_lora__frozen_factors__weight_trains():
    weight, lora_a, lora_b, theta = draw()
    quantized(weight.requires_grad_(), lora_a, lora_b, theta).sum().backward()
    assert weight.grad.any()


def test_lora__float32_stored__outside_autocast():
    weight, lora_a, lora_b, theta = draw()
    fmt = QuantFormat(4, 8, torch.float32)
    value = fake_quantize_merged(weight, lora_a, lora_b, theta, fmt, scaling=SCALING)
    assert torch.equal(value, fake_quantize(merged(weight, lora_a, lora_b, scaling=SCALING), theta, fmt))


def test_lora__compute_dtype_that_rounds__refused():
    tensors = draw()
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(ValueError, match=r"computes in torch\.float16, which"),
    ):
        quantized(*tensors)


class Tiny(nn.Module):
    """Two layers to quantize, in bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 16, bias=False)
        self.bfloat16()
        self.requires_grad_(False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(seed=None, **kwargs):
    model = Tiny()
    result = attach({"up": model.up, "down": model.down}, QuantFormat(4, 16), **kwargs)
    torch.manual_seed(99 if seed is None else seed + 100)  # the update does not come from the global generator
    result.add_lora(["up", "down"], rank=4, alpha=8.0, **({} if seed is None else {"seed": seed}))
    return model, result


def batch(seed=1):
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)).bfloat16()


def train(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(steps):
        for micro in range(2):
            (model(batch(10 * step + micro)).float() - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_add_lora__start__zero_update_from_seed():
    plain = Tiny()
    attach({"up": plain.up, "down": plain.down}, QuantFormat(4, 16))
    model, _ = adapted()
    again, _ = adapted(seed=0)
    other, _ = adapted(seed=1)
    assert torch.equal(model(batch()), plain(batch()))
    assert not torch.equal(model.up.lora_A, other.up.lora_A)
    assert torch.equal(model.up.lora_A, again.up.lora_A) and model.up.lora_A.abs().max() <= 32**-0.5
    assert model.up.lora_A.std() > 0.5 * 32**-0.5
    assert not torch.equal(model.up.lora_A[:, :16], model.down.lora_A[:, :16])
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in model.up.named_parameters() if name in (LORA_A, LORA_B)}
    assert shapes == {LORA_A: ((4, 32), torch.float32), LORA_B: ((48, 4), torch.float32)}


def test_lora__trained_and_baked__codes_of_last_forward():
    model, result = adapted()
    before = result.freeze()
    start = model.up.weight.clone()
    train(model)
    assert torch.equal(model.up.weight, start)
    last = model(batch())
    frozen = result.freeze()
    assert not torch.equal(frozen["up"][0], before["up"][0])
    share = result.clip_share()
    integers = torch.cat([frozen[name][0].flatten() for name in ("up", "down")])
    assert 0 < share <= ((integers == -8) | (integers == 7)).float().mean()
    result.bake()
    assert torch.equal(model(batch()), last)
    assert all(torch.equal(result.freeze()[name][0], frozen[name][0]) for name in frozen)
    assert torch.equal(model.up.weight, dequantize(*frozen["up"]))
    result.detach()
    assert torch.equal(model(batch()), last)
    assert {name for name, _ in model.named_parameters()} == {"up.weight", "up.bias", "down.weight"}


def test_lora__cache__one_quantization_per_step():
    model, result = adapted()
    uncached, _ = adapted(cache=False)
    train(model)
    train(uncached)
    assert result.quantizations == 2 * 4
    assert torch.equal(model(batch()), uncached(batch()))
    with torch.no_grad():
        model.up.lora_B.mul_(3.0)
        uncached.up.lora_B.mul_(3.0)
    assert torch.equal(model(batch()), uncached(batch()))
    with torch.no_grad():
        model.up.lora_A.mul_(-2.0)
        uncached.up.lora_A.mul_(-2.0)
    assert torch.equal(model(batch()), uncached(batch()))


def test_add_lora__scaling__alpha_over_rank():
    model, result = adapted()
    with torch.no_grad():
        model.up.lora_B.normal_()
    total = merged(model.up.weight, model.up.lora_A, model.up.lora_B, scaling=2.0)
    expected = codes(total, model.up.weight_log_scale, FMT)
    assert torch.equal(result.freeze()["up"][0], expected)


def test_lora__with_and_without_autocast__separate_values():
    model, _ = adapted()
    x = batch().float()
    model.float()
    assert model(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert model(x).dtype == torch.float32


def test_add_lora__some_layers__others_learn_scales():
    model = Tiny()
    result = attach({"up": model.up, "down": model.down}, QuantFormat(4, 16))
    result.add_lora(["down"], rank=2, alpha=2.0)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"up.weight_log_scale", "down.weight_log_scale", "down.lora_A", "down.lora_B"}


def test_lora__deepcopy__independent():
    model, _ = adapted()
    twin = copy.deepcopy(model)
    train(model)
    assert not torch.equal(model(batch()), twin(batch()))
    fresh, _ = adapted()
    assert torch.equal(twin(batch()), fresh(batch()))


def test_lora__beyond_the_range__passes_gradcheck():
    """Where the whole sum lies beyond the range the value is q * s exactly; gradcheck applies to all four tensors."""
    _, lora_a, lora_b, _ = draw(rows=2, columns=8, dtype=torch.float64)
    lora_a = lora_a[:, :4].clone()
    weight = torch.tensor([[90.0, -95.0, 80.0, -85.0], [-99.0, 96.0, -88.0, 97.0]], dtype=torch.float64)
    theta = torch.tensor([[0.1, -0.2], [0.3, 0.0]], dtype=torch.float64)
    given = [t.requires_grad_() for t in (weight, lora_a, lora_b, theta)]

    def run(weight, lora_a, lora_b, theta):
        return fake_quantize_merged(weight, lora_a, lora_b, theta, QuantFormat(4, 2, torch.float64), scaling=SCALING)

    assert gradcheck(run, given)


def test_lora__factors_inside_the_range__equal_surrogate():
    """Inside the range: the hand-written products against the difference quotients of the sum that is quantized."""
    weight, lora_a, lora_b, _ = draw(rows=3, columns=8, dtype=torch.float64)
    theta = torch.full((3, 2), 3.0, dtype=torch.float64)  # wide enough that nothing is clipped
    upstream = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    given = [t.requires_grad_() for t in (weight, lora_a, lora_b)]
    fmt = QuantFormat(8, 4, torch.float64)
    found = torch.autograd.grad(fake_quantize_merged(*given, theta, fmt, scaling=SCALING), given, upstream)

    def surrogate(weight, lora_a, lora_b):
        return weight + SCALING * lora_b @ lora_a

    assert gradcheck(surrogate, given)
    for one, other in zip(found, torch.autograd.grad(surrogate(*given), given, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
