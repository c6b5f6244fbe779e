"""The quantizer's kernels against torch, bit for bit, in Triton's interpreter or on CUDA; run with TRITON_INTERPRET=1."""

import pytest
import torch

from grace_plugin.quantizer import (
    QuantFormat,
    fake_quant,
    fake_quant_triton,
    fake_quantize,
    fake_quantize_merged,
    merged,
)
from grace_plugin.quantizer.scales import start_scales, stored_scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]  # fmt: skip


def drawn(weight_dtype, stored_dtype, group, width, bits):
    """A weight with rows of very different size, half of them at ties or one step away, and its start scales."""
    made = torch.Generator().manual_seed(width + bits)
    weight = (torch.randn(8, width, generator=made) * torch.randn(8, 1, generator=made).mul(3).exp()).to(weight_dtype)
    theta = start_scales(weight, QuantFormat(bits, group, stored_dtype)).float()
    scale = stored_scale(theta, stored_dtype).float().repeat_interleave(width // theta.shape[1], 1)
    at_ties = (torch.randint(-(2**bits), 2**bits, weight.shape, generator=made) + 0.5) * scale
    near_ties = at_ties.view(torch.int32) + torch.randint(-1, 2, weight.shape, generator=made).int()
    weight[::2] = near_ties.view(torch.float32).to(weight_dtype)[::2]
    return weight.to(DEVICE), theta.to(DEVICE)


@pytest.mark.parametrize(("weight_dtype", "stored_dtype"), FORMATS)
@pytest.mark.parametrize(("group", "width"), [(128, 512), (32, 256), (None, 384), (None, 1500), (100, 300)])
@pytest.mark.parametrize("bits", [4, 2, 7])
def test_kernels__values_scales_and_gradients__equal_torch(weight_dtype, stored_dtype, group, width, bits):
    weight, theta = drawn(weight_dtype, stored_dtype, group, width, bits)
    fmt = QuantFormat(bits, group, stored_dtype)
    assert fake_quant_triton.usable(weight, fmt)
    value, scale = fake_quant_triton.forward(weight, theta, fmt, weight_dtype)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, weight_dtype)
    found = fake_quant.gradients(weight, scale, grad, fmt, (True, True))
    assert torch.equal(scale, stored_scale(theta, stored_dtype))
    codes = fake_quant.codes(weight, theta, fmt)
    assert torch.equal(value, fake_quant.dequantize(codes, scale).to(weight_dtype))
    want = torch.empty_like(weight), torch.empty(scale.shape, dtype=torch.float32, device=DEVICE)
    fake_quant._backward_in_torch(weight, scale, grad, fmt, *want)
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1], want[1], rtol=2e-5, atol=2e-5 * want[1].abs().max().item())


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_kernels__one_gradient_needed__computed_alone(needs):
    weight, theta = drawn(torch.float32, torch.bfloat16, 64, 128, 4)
    scale = stored_scale(theta, torch.bfloat16)
    grad = torch.ones_like(weight)
    both = fake_quant.gradients(weight, scale, grad, QuantFormat(4, 64), (True, True))
    some = fake_quant.gradients(weight, scale, grad, QuantFormat(4, 64), needs)
    for part, whole, needed in zip(some, both, needs, strict=True):
        assert (part is not None) == needed
        assert part is None or torch.equal(part, whole)


@pytest.mark.parametrize(("weight_dtype", "stored_dtype"), FORMATS)
def test_kernels__small_layers__equal_torch(weight_dtype, stored_dtype):
    weight, theta = drawn(weight_dtype, stored_dtype, 16, 32, 3)
    fmt = QuantFormat(3, 16, stored_dtype)
    theta -= 0.5  # some are clipped
    scale = stored_scale(theta, stored_dtype)
    shipped = fake_quant.dequantize(fake_quant.codes(weight, theta, fmt), scale)
    leaves = [weight.requires_grad_(), theta.requires_grad_()]
    value = fake_quantize(*leaves, fmt)
    assert value.dtype == weight_dtype and torch.equal(value, shipped.to(weight_dtype))
    upstream = torch.randn(32, 8, generator=torch.Generator().manual_seed(2)).to(DEVICE, weight_dtype)
    value.backward(upstream.T)  # rows not contiguous
    want = torch.empty_like(weight), torch.empty(scale.shape, device=DEVICE)
    fake_quant._backward_in_torch(weight.detach(), scale, upstream.T, fmt, *want)
    assert torch.equal(weight.grad, want[0]) and 0 < int((want[0] == 0).sum()) < weight.numel()
    torch.testing.assert_close(theta.grad, want[1], rtol=2e-5, atol=2e-5 * want[1].abs().max().item())


def test_kernels__small_layers_with_lora__equal_torch():
    weight, theta = drawn(torch.bfloat16, torch.bfloat16, 16, 32, 4)
    made = torch.Generator().manual_seed(3)
    lora = [torch.randn(*shape, generator=made).to(DEVICE).requires_grad_() for shape in ((2, 32), (8, 2))]
    fmt = QuantFormat(4, 16)
    value = fake_quantize_merged(weight, *lora, theta, fmt, scaling=0.7)
    total = merged(weight, *lora, scaling=0.7)
    shipped = fake_quant.dequantize(fake_quant.codes(total, theta, fmt), stored_scale(theta, torch.bfloat16))
    assert value.dtype == torch.bfloat16 and torch.equal(value, shipped)
    value.float().square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in lora]
    want = fake_quantize_merged(weight.double(), *exact, theta, fmt, scaling=0.7)
    assert (want == value).float().mean() > 0.99  # a tie may fall to the other side in float64
    (2 * value.double().detach() * want).sum().backward()
    for one, other in zip(lora, exact, strict=True):
        assert (one.grad - other.grad).norm() < 0.01 * other.grad.norm()  # gradients of w^ are rounded to bfloat16


def test_kernels__scales_beyond_dtype__clamped():
    weight = torch.randn(2, 32, device=DEVICE)
    theta = torch.tensor([[-200.0], [200.0]], device=DEVICE)
    _, scale = fake_quant_triton.forward(weight, theta, QuantFormat(4), torch.float32)
    assert torch.equal(scale, stored_scale(theta, torch.bfloat16))
    assert scale.isfinite().all() and (scale > 0).all()


def test_kernels__quotient_overflows__clipped():
    weight = torch.tensor([[3e38, -3e38, 1.0, 0.0] * 8], device=DEVICE)
    theta = torch.full((1, 1), -80.0, device=DEVICE)
    value, scale = fake_quant_triton.forward(weight, theta, QuantFormat(4), torch.float32)
    assert torch.equal(value[0, :4] / scale.float()[0], torch.tensor([7.0, -8.0, 7.0, 0.0], device=DEVICE))


CASES = [(8, 512, 0), (8, 512, 0), (16, 1024, 0), (8, 512, 1), (8, 512, 1), (1, 64, 0), (3, 64, 0)]


def test_kernel__started_again__equals_tritons_start():
    """Rows, width, and how far the weight lies from an aligned address."""
    for rows, width, offset in CASES:
        weight, theta = drawn(torch.float32, torch.bfloat16, 64, width, 4)
        weight, theta = weight.repeat(2, 1)[:rows], theta.repeat(2, 1)[:rows]
        weight = torch.cat([weight.new_zeros(offset), weight.flatten()])[offset:].view(rows, width)
        grad, found = torch.full_like(weight, 0.5), []
        for forget in (False, True):
            if forget:
                fake_quant_triton._forward_kernel._compiled.clear()
                fake_quant_triton._backward_kernel._compiled.clear()
            value, scale = fake_quant_triton.forward(weight, theta, QuantFormat(4), torch.bfloat16)
            found.append((value, scale, *fake_quant.gradients(weight, scale, grad, QuantFormat(4, 64), (True, True))))
        assert all(map(torch.equal, *found))
        codes = fake_quant.codes(weight, theta, QuantFormat(4))
        assert torch.equal(value, fake_quant.dequantize(codes, scale))
