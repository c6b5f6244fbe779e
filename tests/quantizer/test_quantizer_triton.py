"""The quantizer's kernels against torch, bit for bit, in Triton's interpreter or on CUDA; run with TRITON_INTERPRET=1."""

import pytest
import torch

from grace_plugin.quantizer import fake_quant, fake_quant_triton
from grace_plugin.quantizer.scales import code_range, start_scales, stored_scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]  # fmt: skip


def drawn(weight_dtype, stored_dtype, group, width, bits):
    """A weight with rows of very different size, half of them at ties or one step beside, and its start scales."""
    made = torch.Generator().manual_seed(width + bits)
    weight = (torch.randn(8, width, generator=made) * torch.randn(8, 1, generator=made).mul(3).exp()).to(weight_dtype)
    theta = start_scales(weight, group, num_bits=bits, dtype=stored_dtype).float()
    scale = stored_scale(theta, stored_dtype).float().repeat_interleave(width // theta.shape[1], 1)
    at_ties = (torch.randint(-(2**bits), 2**bits, weight.shape, generator=made) + 0.5) * scale
    beside = at_ties.view(torch.int32) + torch.randint(-1, 2, weight.shape, generator=made).int()
    weight[::2] = beside.view(torch.float32).to(weight_dtype)[::2]
    return weight.to(DEVICE), theta.to(DEVICE)


@pytest.mark.parametrize(("weight_dtype", "stored_dtype"), FORMATS)
@pytest.mark.parametrize(("group", "width"), [(128, 512), (32, 256), (None, 384), (None, 1500), (100, 300)])
@pytest.mark.parametrize("bits", [4, 2, 7])
def test_values_scales_and_gradients_equal_torch(weight_dtype, stored_dtype, group, width, bits):
    weight, theta = drawn(weight_dtype, stored_dtype, group, width, bits)
    assert fake_quant_triton.usable(weight, stored_dtype)
    value, scale = fake_quant_triton.forward(weight, theta, stored_dtype, code_range(bits), weight_dtype)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, weight_dtype)
    found = fake_quant.gradients(weight, scale, grad, bits, (True, True))
    assert torch.equal(scale, stored_scale(theta, stored_dtype))
    codes = fake_quant.codes(weight, theta, num_bits=bits, stored_dtype=stored_dtype)
    assert torch.equal(value, fake_quant.dequantize(codes, scale).to(weight_dtype))
    want = torch.empty_like(weight), torch.empty(scale.shape, dtype=torch.float32, device=DEVICE)
    fake_quant._backward_in_torch(weight, scale, grad, code_range(bits), *want)
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1], want[1], rtol=2e-5, atol=2e-5 * want[1].abs().max().item())


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed_is_computed(needs):
    weight, theta = drawn(torch.float32, torch.bfloat16, 64, 128, 4)
    scale = stored_scale(theta, torch.bfloat16)
    grad = torch.ones_like(weight)
    both = fake_quant.gradients(weight, scale, grad, 4, (True, True))
    some = fake_quant.gradients(weight, scale, grad, 4, needs)
    for part, whole, needed in zip(some, both, needs, strict=True):
        assert (part is not None) == needed
        assert part is None or torch.equal(part, whole)


def test_scales_outside_the_range_of_the_file_are_clamped():
    weight = torch.randn(2, 32, device=DEVICE)
    theta = torch.tensor([[-200.0], [200.0]], device=DEVICE)
    _, scale = fake_quant_triton.forward(weight, theta, torch.bfloat16, (-8, 7), torch.float32)
    assert torch.equal(scale, stored_scale(theta, torch.bfloat16))
    assert scale.isfinite().all() and (scale > 0).all()


def test_weights_whose_quotient_overflows_are_clipped():
    weight = torch.tensor([[3e38, -3e38, 1.0, 0.0] * 8], device=DEVICE)
    theta = torch.full((1, 1), -80.0, device=DEVICE)
    value, scale = fake_quant_triton.forward(weight, theta, torch.bfloat16, (-8, 7), torch.float32)
    assert torch.equal(value[0, :4] / scale.float()[0], torch.tensor([7.0, -8.0, 7.0, 0.0], device=DEVICE))
