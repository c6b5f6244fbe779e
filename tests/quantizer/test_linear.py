"""An attached layer's product as one function: the bits of torch's own product with the fake-quantized weight."""

import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grace_plugin.quantizer import PARAMETER, QuantFormat, attach, fake_quantize
from grace_plugin.quantizer.linear import STATE
from grace_plugin.quantizer.scales import autocasts

FORM = QuantFormat(4, 8)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def layer(dtype=torch.float32, bias=True, cache=True):
    torch.manual_seed(0)
    linear = nn.Linear(16, 12, bias=bias, dtype=dtype)
    return linear, attach({"a": linear}, FORM, cache=cache)


def apart(linear, x):
    """The same by two functions of autograd."""
    weight = fake_quantize(linear.weight, getattr(linear, PARAMETER), FORM)
    return nn.functional.linear(x, weight, linear.bias)


def gradients(linear, x):
    found = [
        x.grad,
        linear.weight.grad,
        getattr(linear, PARAMETER).grad,
        linear.bias.grad if linear.bias is not None else None,
    ]
    x.grad = None
    linear.zero_grad()
    return found


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)])
@pytest.mark.parametrize(
    ("weight", "given", "cast"),
    [(torch.float32, torch.float32, False), (torch.bfloat16, torch.bfloat16, False), (torch.float32, torch.float32, True),
     (torch.float32, torch.bfloat16, True)],
)  # fmt: skip
def test_linear__value_and_gradients__equal_two_functions(weight, given, cast, shape, bias, cache):
    linear, _ = layer(weight, bias, cache)
    x = torch.randn(shape).to(given).requires_grad_()
    found = []
    for run in (linear, lambda x: apart(linear, x)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            y = run(x)
        (y.float() * torch.arange(12.0)).sum().backward()
        found.append([y.detach(), *gradients(linear, x)])
    for one, other in zip(*found, strict=True):
        assert one is other is None or (one.dtype == other.dtype and torch.equal(one, other))


@pytest.mark.parametrize("wanted", ["input", "weight", PARAMETER, "bias"])
def test_linear__one_trainable_input__its_gradient_alone(wanted):
    linear, _ = layer()
    x = torch.randn(4, 16, requires_grad=wanted == "input")
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(name == wanted)
    y = linear(x)
    with Products() as products:
        y.sum().backward()
    assert products.count == (wanted in ("input", "weight", PARAMETER))
    got = {name for name, parameter in [*linear.named_parameters(), ("input", x)] if parameter.grad is not None}
    assert got == {wanted}


def test_linear__mixed_dtypes__under_autocast_alone():
    linear, _ = layer()
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(torch.randn(4, 16, dtype=torch.bfloat16))
    assert not autocasts("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocasts("cpu") and not autocasts("meta")
        assert linear(torch.randn(4, 16, dtype=torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("cache", [True, False])
def test_linear__saved_tensors__input_and_weight_without_cache(cache):
    """Without a cache the quantized weight is another, so that checkpointing drops it."""
    linear, _ = layer(cache=cache)
    x, saved = torch.randn(4, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = linear(x)
    assert saved == ([x.shape] if cache else [x.shape, linear.weight.shape])
    assert len(y.grad_fn.saved_weights.tensors()) == 3


def test_linear__no_cache__backward_reads_saved_weight():
    linear, _ = layer(cache=False)
    x = torch.randn(4, 16, requires_grad=True)
    found = []
    for factor in (1, 2):

        def unpack(saved, factor=factor):
            return saved * factor if saved.shape == linear.weight.shape else saved

        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
            y = linear(x).sum()
        found.append(torch.autograd.grad(y, x)[0])
    assert torch.equal(found[0] * 2, found[1]) and found[0].any()


def test_linear__held_graph__keeps_no_quantized_weight():
    linear, _ = layer()
    y = linear(torch.randn(2, 3, 16, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    cache = linear.__dict__[STATE].cache
    address = cache._entry[1][0].data_ptr()

    def held():
        return sum(isinstance(one, torch.Tensor) and one.data_ptr() == address for one in gc.get_objects())

    assert held() == 1
    cache.drop()
    assert held() == 0 and y.grad_fn is not None


@pytest.mark.parametrize("change", ["dtype", "dropped", "invalidated"])
def test_linear__cache_lost_before_backward__same_gradients(change):
    linear, attached = layer()
    x = torch.randn(4, 16, requires_grad=True)
    want = torch.autograd.grad(linear(x).square().sum(), [x, linear.weight])
    y = linear(x).square().sum()
    if change == "dtype":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear(x)
    elif change == "dropped":
        linear.__dict__[STATE].cache.drop()
    else:
        attached.invalidate()
    assert all(map(torch.equal, torch.autograd.grad(y, [x, linear.weight]), want))


def test_linear__lora_under_autocast__dtype_recorded():
    linear, attached = layer()
    attached.add_lora(["a"], rank=2, alpha=4.0)
    with torch.no_grad():
        linear.lora_B.normal_(std=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(4, 16)).dtype == torch.bfloat16
    assert linear.__dict__[STATE].computed_in == torch.bfloat16
    frozen = attached.freeze()
    assert attached.count_forward_mismatches(frozen) == {}
    codes, scale = frozen["a"]
    assert attached.count_forward_mismatches({"a": (codes + 1, scale)}) == {"a": codes.numel()}
