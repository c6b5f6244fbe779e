"""Many layers in one launch against a launch each, bit for bit, in Triton's interpreter (TRITON_INTERPRET=1) or on CUDA."""

import copy

import pytest
import torch
from torch import Tensor, nn

from grace_plugin.quantizer import QuantFormat, attach, fake_quant_triton, grouped_triton
from grace_plugin.quantizer.grouped import Layer, finalize_all_deferred_grads, launches
from grace_plugin.quantizer.linear import STATE
from grace_plugin.quantizer.scales import start_scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8, 256), (40, 128), (3, 384), (17, 640)]  # rows that fill no tile, one layer of many tiles


def drawn(shapes, group, dtype, stored_dtype):
    made = torch.Generator().manual_seed(5)
    weights = [torch.randn(*shape, generator=made).to(dtype) for shape in shapes]
    thetas = [
        start_scales(weight, QuantFormat(4, group, stored_dtype)).float() - 0.5 for weight in weights
    ]  # some are clipped
    return [weight.to(DEVICE) for weight in weights], [theta.to(DEVICE) for theta in thetas]


@pytest.mark.parametrize(
    ("dtype", "stored_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_grouped_kernels__several_layers__equal_own_launches(dtype, stored_dtype, count):
    weights, thetas = drawn(SHAPES[:count], 128 if count == 4 else 32, dtype, stored_dtype)
    fmt, layers = QuantFormat(4, stored_dtype=stored_dtype), list(zip(weights, thetas, strict=True))
    made = grouped_triton.forward(layers, fmt, dtype)
    grads = [torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype) for w in weights]
    changed = [grad.clone() for grad in grads]
    of_scales = grouped_triton.backward(layers, changed, fmt)
    for weight, theta, (value, scale), grad, one, of_scale in zip(
        weights, thetas, made, grads, changed, of_scales, strict=True
    ):
        alone = fake_quant_triton.forward(weight, theta, fmt, dtype)
        assert torch.equal(value, alone[0]) and torch.equal(scale, alone[1])
        want, want_of_scale = torch.empty_like(weight), torch.empty_like(theta)
        fake_quant_triton.backward(weight, scale, grad, fmt, want, want_of_scale)
        assert torch.equal(one, want) and 0 < int((one == 0).sum()) < one.numel()
        assert torch.equal(of_scale, want_of_scale) and of_scale.shape == theta.shape


def layer(rows=4, width=64, groups=4, **changes):
    """A layer with a gradient that a launch takes, but for what is changed."""
    weight, theta = torch.ones(rows, width, device=DEVICE), torch.zeros(rows, groups, device=DEVICE)
    weight, theta = changes.get("weight", lambda w: w)(weight), changes.get("theta", lambda t: t)(theta)
    weight.grad = changes.get("grad", torch.ones_like)(weight)
    return Layer(weight, theta, None)


def columns_first(t):
    return t.T.contiguous().T


def unaligned(t):
    return torch.ones(t.numel() + 1, dtype=t.dtype, device=DEVICE)[1:].view(t.shape)


FORM = QuantFormat(4, 16)


def test_launches__dtype_and_group_size__shared():
    three = [layer(), layer(rows=9), layer(width=32, groups=2)]
    wide = [layer(width=128), layer(rows=2, width=64, groups=2)]  # groups of 32
    low = [layer(weight=Tensor.bfloat16), layer(weight=Tensor.bfloat16)]
    alone = layer(width=96, groups=2)
    mixed = [three[0], wide[0], low[0], alone, three[1], low[1], wide[1], three[2]]
    found = launches(mixed, FORM, grads=True)
    assert [[id(one) for one in several] for several in found] == [
        [id(one) for one in part] for part in (three, wide, low)
    ]
    assert launches([], FORM, grads=True) == []


@pytest.mark.parametrize(
    "changes",
    [{"weight": columns_first}, {"weight": unaligned}, {"theta": columns_first}, {"theta": unaligned},
     {"theta": Tensor.double}, {"weight": Tensor.double}],
)  # fmt: skip
def test_launches__unsuitable_layers__left_out(changes):
    others = [layer(), layer()]
    (found,) = launches([others[0], layer(**changes), others[1]], FORM, grads=False)
    assert [id(one) for one in found] == [id(one) for one in others]
    assert not launches(others, QuantFormat(4, 16, torch.float64), grads=False), "a stored dtype that exists for tests"


@pytest.mark.parametrize("change", [columns_first, unaligned])
def test_finalize_all__unsuitable_gradient__finalized_alone(change):
    others = [layer(grad=torch.ones_like), layer(grad=lambda w: change(torch.ones_like(w))), layer()]
    assert len(launches(others, FORM, grads=False)[0]) == 3
    assert [id(one) for one in launches(others, FORM, grads=True)[0]] == [id(others[0]), id(others[2])]
    others[1].weight.grad.copy_(torch.arange(256.0, device=DEVICE).view(4, 64))
    lone = layer(grad=lambda w: torch.arange(256.0, device=DEVICE).view(4, 64))
    for each in (*others, lone):
        each.log_scale.sub_(2.5)  # codes are clipped in every weight
        each.weight[:, ::2] = 0.05
    finalize_all_deferred_grads(others, FORM)
    finalize_all_deferred_grads([lone], FORM)
    assert torch.equal(others[1].weight.grad, lone.weight.grad) and lone.weight.grad.any()
    assert torch.equal(others[1].log_scale.grad, lone.log_scale.grad) and lone.log_scale.grad.any()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 96), nn.Linear(96, 96), nn.Linear(96, 16)).to(DEVICE)


def linears(made):
    return {str(number): layer for number, layer in enumerate(made)}


def gradients(made):
    return {name: parameter.grad for name, parameter in made.named_parameters()}


def one_by_one(made, batch):
    """Gradients where each layer is attached by itself."""
    attached = [attach({name: layer}, QuantFormat(4, 16)) for name, layer in linears(made).items()]
    for each in attached:
        each.defer_grads()
    for part in batch.split(3):
        made(part).square().sum().backward()
    for each in attached:
        each.finalize_deferred_grads()
    return gradients(made)


def test_step__grouped_layers__gradients_of_single_layers():
    batch = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    want = one_by_one(model(), batch)
    made = model()
    attached = attach(linears(made), QuantFormat(4, 16))
    attached.defer_grads()
    for part in batch.split(3):
        made(part).square().sum().backward()
    assert attached.quantizations == 4
    attached.finalize_deferred_grads()
    found = gradients(made)
    assert len(found) == 12 and found.keys() == want.keys()
    for name, grad in found.items():
        assert torch.equal(grad, want[name]) and grad.any(), name


def test_fill__first_layer_of_a_pass__quantizes_all():
    made = model()
    attached = attach(linears(made), QuantFormat(4, 16))
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
    assert attached.quantizations == 9, "what is still valid is not made again"


def test_fill__layers_of_other_dtype__left_alone():
    made = model()
    attached = attach(linears(made), QuantFormat(4, 16))

    def run():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            low = made[1](made[0](torch.randn(2, 64, device=DEVICE)))
        return made[3](made[2](low.float()))

    run()
    seen = attached.quantizations
    for _ in range(2):
        run().sum().backward()
    assert attached.quantizations == seen, "each finds what it kept"
    attached.invalidate()
    run()
    assert attached.quantizations == seen + 4


def test_step__unsuitable_layers__done_alone():
    made = model()
    made[1].weight.data = made[1].weight.data.T.contiguous().T  # columns contiguous
    made[2].weight.data = torch.empty(96 * 96 + 1, device=DEVICE)[1:].copy_(made[2].weight.data.flatten()).view(96, 96)
    made[3].weight.requires_grad_(False)
    other = copy.deepcopy(made)
    batch = torch.randn(6, 64, device=DEVICE)
    attached = attach(linears(made), QuantFormat(4, 16))
    attached.defer_grads()
    for part in batch.split(3):
        made(part).square().sum().backward()
    attached.finalize_deferred_grads()
    want, found = one_by_one(other, batch), gradients(made)
    assert attached.quantizations == 4
    assert found.pop("3.weight") is None and want.pop("3.weight") is None
    for name, grad in found.items():
        assert torch.equal(grad, want[name]) and grad.any(), name


def test_count_forward_mismatches__cache__one_layer_at_a_time():
    made = model()
    attached = attach(linears(made), QuantFormat(4, 16))
    held = []

    class Frozen(dict):
        def __getitem__(self, name):
            held.append(sum(one.__dict__[STATE].cache._entry is not None for one in made))
            return super().__getitem__(name)

    assert attached.count_forward_mismatches(Frozen(attached.freeze())) == {}
    assert held == [1, 1, 1, 1] and attached.quantizations == 4
    made[0](torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 8, "and in one launch again"


def test_deepcopy__forward__fills_nothing_of_the_first():
    made = model()
    attached = attach(linears(made), QuantFormat(4, 16))
    copy.deepcopy(made)(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 0
    made(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 4


def test_fill__layers_with_lora__left_alone():
    made = model()
    attached = attach(linears(made), QuantFormat(4, 16))
    attached.add_lora(["1", "2"], rank=2, alpha=4.0)
    made[0](torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 2
    made(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 4
    made(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 4
    attached.invalidate()
    made(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 8


def test_add_lora__no_cache__stays_without():
    made = model()
    attached = attach(linears(made), QuantFormat(4, 16), cache=False)
    attached.add_lora(["1", "2"], rank=2, alpha=4.0)
    for _ in range(2):
        made(torch.randn(2, 64, device=DEVICE))
    assert attached.quantizations == 0


def test_prefetch__after_a_step__forward_finds_weights():
    made, batch = model(), torch.randn(2, 64, device=DEVICE)
    attached = attach(linears(made), QuantFormat(4, 16))
    attached.prefetch_quantized_weights()
    assert attached.quantizations == 0, "no forward pass has said in what dtype"
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        made(batch).sum().backward()
    optimizer.step()
    attached.prefetch_quantized_weights()
    assert attached.quantizations == 8
    attached.prefetch_quantized_weights()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ahead = made(batch)
    assert attached.quantizations == 8, "the forward pass found all of it"
    attached.invalidate()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(made(batch), ahead)
    assert attached.quantizations == 12


def test_prefetch__layers_of_two_dtypes__each_in_its_own():
    made, batch = model(), torch.randn(2, 64, device=DEVICE)
    attached = attach(linears(made), QuantFormat(4, 16))

    def run():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            low = made[1](made[0](batch))
        return made[3](made[2](low.float()))

    run()
    run()
    attached.invalidate()
    attached.prefetch_quantized_weights()
    seen, ahead = attached.quantizations, run()
    assert attached.quantizations == seen
    attached.invalidate()
    assert torch.equal(run(), ahead)
