"""Fake quantization bit for bit: the scalar oracle, compressed-tensors' own functions, and the gradient by hand."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as upstream_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as upstream_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from grace_plugin.quantizer import QuantFormat, clipped, codes, dequantize, fake_quantize, stored_scale
from grace_plugin.quantizer.grouped import finalize_deferred_grads
from tests.reference import fake_quant as oracle
from tests.reference.footprint import Footprint

STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def draw(rows=6, columns=24, groups=3, seed=0, spread=0.05, dtype=torch.float32):
    """A weight, and scales at which about a tenth of it is clipped."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g, dtype=torch.float64) * spread
    log_scale = (weight.unflatten(1, (groups, -1)).abs().amax(-1) / 10).log()
    log_scale = log_scale + 0.3 * torch.randn(rows, groups, generator=g, dtype=torch.float64)
    return weight.to(dtype), log_scale.to(torch.float64 if dtype == torch.float64 else torch.float32)


def quantized(weight, log_scale, group_size=8, num_bits=4, stored_dtype=torch.bfloat16, **kwargs):
    return fake_quantize(weight, log_scale, QuantFormat(num_bits, group_size, stored_dtype), **kwargs)


@pytest.mark.parametrize("stored", list(STORED))
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_codes_and_values__random_weights__equal_scalar_oracle(stored, bits, seed):
    weight, log_scale = draw(seed=seed)
    got = codes(weight, log_scale, QuantFormat(bits, stored_dtype=STORED[stored]))
    value = quantized(weight, log_scale, num_bits=bits, stored_dtype=STORED[stored])
    want_codes, want_values = oracle.quantize(weight.tolist(), log_scale.tolist(), bits, stored)
    assert got.dtype == torch.int8
    assert got.tolist() == want_codes
    assert value.dtype == torch.float32
    assert value.tolist() == want_values


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10_000), st.floats(-8, 8), st.sampled_from(list(STORED)))
def test_codes__any_weight__within_range(bits, seed, exponent, stored):
    weight, log_scale = draw(rows=2, seed=seed, spread=10**exponent)
    found = codes(weight, log_scale, QuantFormat(bits, stored_dtype=STORED[stored]))
    assert found.min() >= -(2 ** (bits - 1))
    assert found.max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_codes__bfloat16_weights__divided_in_float32(stored):
    """A quotient rounded to bfloat16 would fall on ties that are none."""
    dtype = torch.bfloat16 if stored == "bfloat16" else torch.float16
    weight, log_scale = draw(rows=64, columns=96, groups=3, dtype=dtype)
    got = codes(weight, log_scale, QuantFormat(6, stored_dtype=STORED[stored]))
    want, values = oracle.quantize(weight.tolist(), log_scale.tolist(), 6, stored)
    assert got.tolist() == want
    s = stored_scale(log_scale, STORED[stored]).repeat_interleave(32, dim=1)
    assert ((weight / s).round().clamp(-32, 31) != got).any()
    value = fake_quantize(weight, log_scale, QuantFormat(6, 32, STORED[stored]))
    assert value.tolist() == values
    ratios = [w / t for w, t in zip(weight.flatten().tolist(), s.flatten().tolist(), strict=True)]
    acted = sum(not -8 <= oracle.nearest(ratio) <= 7 for ratio in ratios)
    assert clipped(weight, log_scale, QuantFormat(4, stored_dtype=STORED[stored])).item() == acted
    if stored == "bfloat16":
        rounded = (weight / s).round()
        assert ((rounded < -8) | (rounded > 7)).sum().item() != acted


def test_gradients__bfloat16_weights__formed_in_float32():
    weight, log_scale = draw(rows=16, columns=64, groups=2, dtype=torch.bfloat16)
    leaves = [weight.clone().requires_grad_(), log_scale.clone().requires_grad_()]
    upstream = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    quantized(*leaves, group_size=32).backward(upstream)
    by_weight, by_theta = oracle.gradients(weight.tolist(), log_scale.tolist(), upstream.tolist(), 4, "bfloat16")
    assert leaves[0].grad.tolist() == by_weight
    torch.testing.assert_close(leaves[1].grad, torch.tensor(by_theta), rtol=1e-5, atol=1e-7)


def test_codes__one_float64_side__divided_in_float64():
    """w / s a hair above a tie: float32 sees the tie and rounds to 0, float64 rounds to 1."""
    hair = 1e-12
    fmt = QuantFormat(4, stored_dtype=torch.float64)
    cases = [
        (torch.tensor([[0.5 + hair]], dtype=torch.float64), torch.tensor([[0.0]])),
        (torch.tensor([[0.5]]), torch.tensor([[-hair]], dtype=torch.float64)),
    ]
    for weight, log_scale in cases:
        assert codes(weight, log_scale, fmt).item() == 1
        assert clipped(-weight - 8.0, log_scale, fmt).item() == 1
        assert clipped(-weight.float() - 8.0, torch.zeros(1, 1), fmt).item() == 0
    assert codes(torch.tensor([[0.5]]), torch.tensor([[0.0]]), fmt).item() == 0
    weight = torch.tensor([[7.5 + hair]], dtype=torch.float64, requires_grad=True)
    quantized(weight, torch.tensor([[0.0]]), group_size=1, stored_dtype=torch.float64).sum().backward()
    assert weight.grad.item() == 0
    log_scale = torch.tensor([[-hair]], dtype=torch.float64)
    weight = torch.tensor([[7.5]], requires_grad=True)
    theta = log_scale.clone().requires_grad_()
    fake_quantize(weight.double(), theta, QuantFormat(4, 1, torch.float64)).sum().backward()
    assert weight.grad.item() == 0


def test_codes__ties_and_ends__even_and_reached():
    log_scale = torch.zeros(1, 1)
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -8.5, 7.5, -9.0, 7.4, 100.0, -8.4]])
    found = codes(weight, log_scale, QuantFormat(4))
    assert found.tolist() == [[0, 2, 2, 0, -2, -8, 7, -8, 7, 7, -8]]
    assert clipped(weight, log_scale, QuantFormat(4)).item() == 3


PAIRS = [(torch.float32, stored) for stored in STORED] + [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")]


@pytest.mark.parametrize(("dtype", "stored"), PAIRS)
def test_fake_quantize__value__equals_dequantized_code(dtype, stored):
    for seed in range(20):
        weight, log_scale = draw(rows=32, columns=64, groups=4, seed=seed, dtype=dtype)
        value = quantized(weight, log_scale, group_size=16, stored_dtype=STORED[stored])
        integers = codes(weight, log_scale, QuantFormat(4, stored_dtype=STORED[stored]))
        shipped = dequantize(integers, stored_scale(log_scale, STORED[stored]))
        assert shipped.dtype == STORED[stored]
        assert value.dtype == dtype
        assert torch.equal(value, shipped.to(dtype))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("group_size", [32, -1])
def test_fake_quantize__packed_by_compressed_tensors__same_bits(stored, bits, group_size):
    strategy = "group" if group_size > 0 else "channel"
    args = QuantizationArgs(
        num_bits=bits, group_size=group_size if group_size > 0 else None, strategy=strategy, symmetric=True
    )
    for seed in range(20):
        weight, log_scale = draw(rows=16, columns=128, groups=4 if group_size > 0 else 1, seed=seed)
        value = quantized(weight, log_scale, group_size=group_size, num_bits=bits, stored_dtype=stored)
        integers = codes(weight, log_scale, QuantFormat(bits, stored_dtype=stored))
        scale = stored_scale(log_scale, stored)
        baked = dequantize(integers, scale)
        saved = upstream_quantize(baked, scale, None, args, dtype=torch.int8)
        assert torch.equal(saved, integers)
        packed = pack_to_int32(saved, bits)
        unpacked = unpack_from_int32(packed, bits, integers.shape)
        loaded = upstream_dequantize(unpacked, scale, None, args)
        assert loaded.dtype == stored
        assert torch.equal(loaded, baked)
        assert torch.equal(loaded.float(), value)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_codes__every_scale_of_a_dtype__survive_saving(stored, bits):
    """A proof by enumeration: every positive normal scale of the dtype with every code, divided as upstream divides.

    Scales beyond the largest number / 128 are left out, ``stored_scale`` never gives them.
    """
    limits = torch.finfo(stored)
    scale = torch.arange(0, 1 << 15, dtype=torch.int32).to(torch.int16).view(stored)
    scale = scale[torch.isfinite(scale) & (scale >= limits.tiny) & (scale.float() <= limits.max / 128)].unsqueeze(1)
    integers = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8).expand(len(scale), -1)
    baked = dequantize(integers, scale)
    assert torch.isfinite(baked).all()
    args = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=True)
    assert torch.equal(upstream_quantize(baked, scale, None, args, dtype=torch.int8), integers)
    log_scale = scale.double().log()
    assert torch.equal(stored_scale(log_scale, stored), scale)
    assert torch.equal(codes(baked, log_scale, QuantFormat(bits, stored_dtype=stored)), integers)


def test_codes__8_bits_in_bfloat16__flip_and_are_refused():
    scale = torch.arange(0x3F80, 0x4000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).unsqueeze(1)
    integers = torch.arange(-128, 128).to(torch.int8).expand(len(scale), -1)
    args = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    saved = upstream_quantize(dequantize(integers, scale), scale, None, args, dtype=torch.int8)
    assert (saved != integers).sum() > 0
    with pytest.raises(ValueError, match="8-bit codes do not survive"):
        codes(torch.zeros(1, 8), torch.zeros(1, 1), QuantFormat(8))
    with pytest.raises(ValueError, match="8-bit codes do not survive"):
        quantized(torch.zeros(1, 8), torch.zeros(1, 1), num_bits=8)


def test_codes__latent_weights_saved__flip_where_baked_do_not():
    """What the rounding of the scale is for: handing over latent weights changes codes in the saved dtype."""
    weight, log_scale = draw(rows=256, columns=512, groups=4, seed=5)
    scale = stored_scale(log_scale, torch.bfloat16)
    integers = codes(weight, log_scale, QuantFormat(4))
    args = QuantizationArgs(num_bits=4, group_size=128, strategy="group", symmetric=True)
    latent = upstream_quantize(weight.bfloat16(), scale, None, args, dtype=torch.int8)
    baked = upstream_quantize(dequantize(integers, scale), scale, None, args, dtype=torch.int8)
    assert (latent != integers).float().mean() > 1e-3
    assert torch.equal(baked, integers)


@pytest.mark.parametrize("stored", list(STORED))
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients__random_weights__equal_scalar_oracle(stored, bits):
    weight, log_scale = draw(seed=7)
    weight.requires_grad_()
    log_scale.requires_grad_()
    upstream = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    quantized(weight, log_scale, num_bits=bits, stored_dtype=STORED[stored]).backward(upstream)
    arguments = weight.tolist(), log_scale.tolist(), upstream.tolist()
    by_weight, by_theta = oracle.gradients(*arguments, bits, stored)
    assert weight.grad.tolist() == by_weight
    want = torch.tensor(by_theta)
    torch.testing.assert_close(log_scale.grad, want, rtol=2e-5, atol=1e-6 * want.abs().max().item())
    assert 0 < (weight.grad == 0).sum() < weight.numel()


def test_scale_gradient__below_inside_and_above_range__by_hand():
    """s = 0.5: v = w / s is -10 (below), 3.25 (inside), 7.4 (inside, not rounded beyond 7), 12 (above)."""
    weight = torch.tensor([[-5.0], [1.625], [3.7], [6.0]], requires_grad=True)
    log_scale = torch.full((4, 1), 0.5).log().requires_grad_()
    upstream = torch.tensor([[3.0], [5.0], [7.0], [11.0]])
    value = quantized(weight, log_scale, group_size=1)
    value.backward(upstream)
    assert value.tolist() == [[-4.0], [1.5], [3.5], [3.5]]
    assert weight.grad.tolist() == [[0.0], [5.0], [7.0], [0.0]]
    by_hand = [0.5 * 3 * -8, 0.5 * 5 * (3 - 3.25), 0.5 * 7 * (7 - 7.4), 0.5 * 11 * 7]
    assert log_scale.grad.flatten().tolist() == pytest.approx(by_hand, rel=1e-5)


def test_scale_gradient__one_group__sums_over_it_alone():
    weight, log_scale = draw(rows=2, columns=8, groups=2)
    log_scale.requires_grad_()
    quantized(weight, log_scale, group_size=4)[0, :4].sum().backward()
    assert log_scale.grad[0, 0] != 0
    assert log_scale.grad[0, 1] == 0
    assert torch.equal(log_scale.grad[1], torch.zeros(2))


def test_fake_quantize__beyond_the_range__passes_gradcheck():
    """Beyond the range the value is q * s exactly: no straight-through, gradcheck applies to both inputs."""
    log_scale = torch.tensor([[0.1, -0.2], [0.3, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(
        [[20.0, -30.0, 15.0, -12.0], [-25.0, 40.0, -11.0, 13.0]], dtype=torch.float64, requires_grad=True
    )

    def run(w, theta):
        return quantized(w, theta, group_size=2, stored_dtype=torch.float64)

    assert gradcheck(run, (weight, log_scale))


def test_gradients__surrogate_with_detached_rounding__equal_autograd():
    weight, log_scale = draw(dtype=torch.float64, seed=4)
    upstream = torch.randn(6, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = [weight.clone().requires_grad_(), log_scale.clone().requires_grad_()]
    quantized(*got, stored_dtype=torch.float64).backward(upstream)
    want = [weight.clone().requires_grad_(), log_scale.clone().requires_grad_()]
    s = want[1].exp().repeat_interleave(8, dim=1)
    v = want[0] / s
    q = v + (v.round() - v).detach()
    q = torch.where(v.round() > 7, 7.0, torch.where(v.round() < -8, -8.0, q))
    (q * s).backward(upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_gradients__frozen_input__none(trained):
    weight, log_scale = draw()
    both = [weight.clone().requires_grad_(), log_scale.clone().requires_grad_()]
    quantized(*both).sum().backward()
    one = [weight.requires_grad_(trained[0]), log_scale.requires_grad_(trained[1])]
    quantized(*one).sum().backward()
    for leaf, want, wanted in zip(one, both, trained, strict=True):
        assert (leaf.grad is not None) == wanted
        if wanted:
            assert torch.equal(leaf.grad, want.grad)


def test_gradients__frozen_weight__none_allocated():
    """Scale-only runs: nothing of the weight's size is made for a gradient that nobody reads."""
    made = []
    for trained in (False, True):
        weight, log_scale = draw(dtype=torch.bfloat16)
        out = quantized(weight.requires_grad_(trained), log_scale.requires_grad_())
        with Footprint() as footprint:
            out.sum().backward()
        made.append(footprint.made)
    assert made[0] + weight.numel() <= made[1]


def test_gradients__dtypes__those_of_their_inputs():
    weight, log_scale = draw(dtype=torch.bfloat16)
    weight.requires_grad_()
    log_scale.requires_grad_()
    quantized(weight, log_scale).float().sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert log_scale.grad.dtype == torch.float32


def test_backward__saved_tensors__weight_and_scales_alone():
    """By the function itself: hooks of checkpointing and offloading see nothing of them."""
    weight, log_scale = draw()
    weight.requires_grad_()
    log_scale.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = quantized(weight, log_scale)
    assert saved == []
    kept = value.grad_fn.saved_weights.tensors()
    assert [t.data_ptr() for t in kept[:2]] == [weight.data_ptr(), log_scale.data_ptr()]
    assert len(kept) == 3 and kept[2].shape == log_scale.shape  # and the scales as stored


@pytest.mark.parametrize("changed", [0, 1])
def test_backward__changed_weight_or_scale__refused(changed):
    tensors = [t.requires_grad_() for t in draw()]
    value = quantized(*tensors)
    with torch.no_grad():
        tensors[changed].mul_(1.0)
    with pytest.raises(
        RuntimeError, match="modified by an inplace operation between forward and backward; step the opt"
    ):
        value.sum().backward()


def test_fake_quantize__autocast__decides_compute_dtype():
    weight, log_scale = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantized(weight, log_scale)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside.float(), quantized(weight, log_scale))


@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32)])
def test_fake_quantize__compute_dtype_that_rounds__refused(dtype, stored):
    weight, log_scale = draw(dtype=dtype)
    with pytest.raises(ValueError, match=r"computes in torch.bfloat16.*train in"):
        quantized(weight, log_scale, stored_dtype=stored)
    with torch.autocast("cpu", dtype=dtype), pytest.raises(ValueError, match="would not see what is shipped"):
        quantized(weight.float(), log_scale, stored_dtype=stored)


def test_fake_quantize__one_scale_per_row__equals_oracle():
    weight, log_scale = draw(groups=1)
    for group_size in (-1, None, 24):
        value = quantized(weight, log_scale, group_size=group_size)
        assert value.tolist() == oracle.quantize(weight.tolist(), log_scale.tolist(), 4, "bfloat16")[1]


def test_fake_quantize__scales_that_do_not_fit__refused():
    weight, log_scale = draw()
    for wrong in (log_scale[:5], log_scale[:, :0], log_scale[0], torch.zeros(6, 5)):
        for call in (lambda s=wrong: quantized(weight, s), lambda s=wrong: dequantize(weight.to(torch.int8), s),
                     lambda s=wrong: codes(weight, s, QuantFormat(4))):  # fmt: skip
            with pytest.raises(ValueError, match="do not fit a weight"):
                call()
    with pytest.raises(ValueError, match=r"do not fit a weight \(24,\)"):
        quantized(weight[0], log_scale)
    with pytest.raises(ValueError, match="3 scales per row for groups of 12 in a width of 24"):
        quantized(weight, log_scale, group_size=12)


def test_clipped__random_weights__equal_oracle():
    weight, log_scale = draw(rows=40, seed=2)
    s = stored_scale(log_scale, torch.bfloat16).float().repeat_interleave(8, dim=1)
    want = sum(not -8 <= oracle.nearest(v) <= 7 for v in (weight / s).flatten().tolist())
    found = clipped(weight, log_scale, QuantFormat(4))
    assert want > 10
    assert found.item() == want
    assert found.dtype == torch.int64


def test_finalize__float64_weight__float32_scale_gradient():
    weight, log_scale = draw(dtype=torch.float64)
    plain = [weight.clone().requires_grad_(), log_scale.float().requires_grad_()]
    late = [weight.clone().requires_grad_(), log_scale.float().requires_grad_()]
    quantized(*plain).square().sum().backward()
    quantized(*late, defer_grads=True).square().sum().backward()
    finalize_deferred_grads(*late, QuantFormat(4))
    assert [one.grad.dtype for one in late] == [torch.float64, torch.float32]
    assert torch.equal(late[0].grad, plain[0].grad)
    torch.testing.assert_close(late[1].grad, plain[1].grad, rtol=1e-6, atol=0)


def test_fake_quantize__several_blocks__equal_row_by_row():
    from grace_plugin.quantizer.scales import BLOCK_ELEMENTS

    columns = BLOCK_ELEMENTS // 2
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    log_scale = torch.full((3, 8), -0.9)
    log_scale[2] = -1.3
    leaves = [weight.clone().requires_grad_(), log_scale.clone().requires_grad_()]
    value = quantized(*leaves, group_size=columns // 8, num_bits=3)
    value.backward(weight)
    rows = []
    for row in range(3):
        part = [weight[row : row + 1].clone().requires_grad_(), log_scale[row : row + 1].clone().requires_grad_()]
        out = quantized(*part, group_size=columns // 8, num_bits=3)
        out.backward(weight[row : row + 1])
        count = clipped(*part, QuantFormat(3))
        rows.append((out.detach(), part[0].grad, part[1].grad, count))
    assert torch.equal(value.detach(), torch.cat([row[0] for row in rows]))
    assert torch.equal(leaves[0].grad, torch.cat([row[1] for row in rows]))
    assert torch.equal(leaves[1].grad, torch.cat([row[2] for row in rows]))
    assert clipped(weight, log_scale, QuantFormat(3)) == sum(row[3] for row in rows)
