"""Many layers in one launch against a launch each, bit for bit, in Triton's interpreter (TRITON_INTERPRET=1) or on CUDA."""

import copy

import pytest
import torch
from torch import nn

from grace_plugin.quantizer import attach, fake_quant_triton, together_triton
from grace_plugin.quantizer.scales import code_range, start_scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8, 256), (40, 128), (3, 384), (17, 640)]  # rows that fill no tile, one layer of many tiles


def drawn(shapes, group, dtype, stored_dtype):
    made = torch.Generator().manual_seed(5)
    weights = [torch.randn(*shape, generator=made).to(dtype) for shape in shapes]
    thetas = [start_scales(weight, group, dtype=stored_dtype).float() - 0.5 for weight in weights]  # some are clipped
    return [weight.to(DEVICE) for weight in weights], [theta.to(DEVICE) for theta in thetas]


@pytest.mark.parametrize(
    ("dtype", "stored_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_layer_of_a_launch_has_the_numbers_of_its_own(dtype, stored_dtype, count):
    weights, thetas = drawn(SHAPES[:count], 128 if count == 4 else 32, dtype, stored_dtype)
    made = together_triton.forward(weights, thetas, stored_dtype, (-8, 7), dtype)
    grads = [torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype) for w in weights]
    changed = [grad.clone() for grad in grads]
    of_scales = together_triton.backward(weights, thetas, changed, stored_dtype, (-8, 7))
    for weight, theta, (value, scale), grad, one, of_scale in zip(
        weights, thetas, made, grads, changed, of_scales, strict=True
    ):
        alone = fake_quant_triton.forward(weight, theta, stored_dtype, (-8, 7), dtype)
        assert torch.equal(value, alone[0]) and torch.equal(scale, alone[1])
        want, want_of_scale = torch.empty_like(weight), torch.empty_like(theta)
        fake_quant_triton.backward(weight, scale, grad, code_range(4), want, want_of_scale)
        assert torch.equal(one, want) and 0 < int((one == 0).sum()) < one.numel()
        assert torch.equal(of_scale, want_of_scale) and of_scale.shape == theta.shape


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 96), nn.Linear(96, 96), nn.Linear(96, 16)).to(DEVICE)


def linears(made):
    return {str(number): layer for number, layer in enumerate(made)}


def gradients(made):
    return {name: parameter.grad for name, parameter in made.named_parameters()}


def one_by_one(made, batch):
    """Gradients where no layer stands beside another: each is attached by itself."""
    attached = [attach({name: layer}, group_size=16) for name, layer in linears(made).items()]
    for each in attached:
        each.defer()
    for part in batch.split(3):
        made(part).square().sum().backward()
    for each in attached:
        each.settle()
    return gradients(made)


def test_a_step_of_a_model_has_the_gradients_of_its_layers_alone():
    batch = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    want = one_by_one(model(), batch)
    made = model()
    attached = attach(linears(made), group_size=16)
    attached.defer()
    for part in batch.split(3):
        made(part).square().sum().backward()
    assert attached.quantizations == 4
    attached.settle()
    found = gradients(made)
    assert len(found) == 12 and found.keys() == want.keys()
    for name, grad in found.items():
        assert torch.equal(grad, want[name]) and grad.any(), name


def test_the_first_layer_of_a_pass_quantizes_for_all_and_the_others_find_it():
    made = model()
    attached = attach(linears(made), group_size=16)
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    made[0](torch.randn(2, 64, device=DEVICE)).sum().backward()
    assert attached.quantizations == 4
    made(torch.randn(2, 64, device=DEVICE)).sum().backward()
    assert attached.quantizations == 4
    optimizer.step()
    made[2](torch.randn(2, 96, device=DEVICE)).sum().backward()
    made(torch.randn(2, 64, device=DEVICE)).sum().backward()
    assert attached.quantizations == 8
    with torch.no_grad():
        made[1].weight.mul_(1.5)
    made(torch.randn(2, 64, device=DEVICE)).sum().backward()
    assert attached.quantizations == 9, "what still stands is not made again"


def test_layers_that_no_launch_takes_are_done_by_themselves():
    made = model()
    made[1].weight.data = made[1].weight.data.T.contiguous().T  # columns contiguous
    made[2].weight.data = torch.empty(96 * 96 + 1, device=DEVICE)[1:].copy_(made[2].weight.data.flatten()).view(96, 96)
    made[3].weight.requires_grad_(False)
    other = copy.deepcopy(made)
    batch = torch.randn(6, 64, device=DEVICE)
    attached = attach(linears(made), group_size=16)
    attached.defer()
    for part in batch.split(3):
        made(part).square().sum().backward()
    attached.settle()
    want, found = one_by_one(other, batch), gradients(made)
    assert attached.quantizations == 4
    assert found.pop("3.weight") is None and want.pop("3.weight") is None
    for name, grad in found.items():
        assert torch.equal(grad, want[name]) and grad.any(), name


def test_a_copied_model_fills_nothing_of_the_first():
    made = model()
    attached = attach(linears(made), group_size=16)
    copy.deepcopy(made)(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 0
    made(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 4


def test_layers_with_a_low_rank_update_are_left_to_their_own_forward_pass():
    made = model()
    attached = attach(linears(made), group_size=16)
    attached.add_lora(["1", "2"], rank=2, alpha=4.0)
    made[0](torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 2
    made(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 4
