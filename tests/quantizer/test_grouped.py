"""Attaching to a model: what it computes, what it costs, what it refuses, and that nothing is left behind."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from grace_plugin.quantizer import (
    PARAMETER,
    QuantFormat,
    attach,
    codes,
    dequantize,
    fake_quantize,
    start_scales,
    stored_scale,
)


class Tiny(nn.Module):
    """Two layers to quantize, one that is not."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))

    def linears(self):
        return {"up": self.up, "down": self.down}


def attached(seed=0, fmt=None, **kwargs):
    model = Tiny(seed)
    return model, attach(model.linears(), fmt or QuantFormat(4, 16), **kwargs)


def batch(n=6, seed=1):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_attach__scales__float32_parameters_from_start_search():
    model, result = attached()
    assert result.scales["up"] is model.up.weight_log_scale
    assert {name: tuple(p.shape) for name, p in result.scales.items()} == {"up": (48, 2), "down": (16, 3)}
    for name, linear in model.linears().items():
        assert torch.equal(result.scales[name], start_scales(linear.weight, QuantFormat(4, 16)))
        assert result.scales[name].dtype == torch.float32
        assert result.scales[name].requires_grad
    assert sorted(n for n, _ in model.named_parameters() if PARAMETER in n) == [
        f"{n}.{PARAMETER}" for n in ("down", "up")
    ]
    assert len(result) == 2
    assert result.linears == model.linears()


def test_attach__start_search_arguments__passed_on():
    fmt = QuantFormat(3, 16, torch.float16)
    model, result = attached(fmt=fmt, candidates=3, low=0.4, high=0.9)
    want = start_scales(model.up.weight, fmt, candidates=3, low=0.4, high=0.9)
    assert torch.equal(result.scales["up"], want)
    default_model, default = attached()
    assert torch.equal(
        default.scales["up"],
        start_scales(default_model.up.weight, QuantFormat(4, 16), candidates=20, low=0.3, high=1.2),
    )


def test_forward__attached_layer__uses_stored_weight():
    model, result = attached()
    x = batch()
    weight = fake_quantize(model.up.weight, result.scales["up"], QuantFormat(4, 16))
    assert torch.equal(model.up(x), nn.functional.linear(x, weight, model.up.bias))
    assert not torch.equal(model.up(x), nn.functional.linear(x, model.up.weight, model.up.bias))
    frozen = result.freeze()
    assert torch.equal(dequantize(*frozen["up"]).float(), weight)


def test_backward__attached_layer__reaches_weight_scale_bias_and_input():
    model, result = attached()
    x = batch().requires_grad_()
    model(x).square().sum().backward()
    for linear in model.linears().values():
        assert linear.weight.grad.abs().sum() > 0
        assert linear.weight_log_scale.grad.abs().sum() > 0
    assert model.up.bias.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0
    assert len(result) == 2


def test_cache__micro_batches_and_checkpointing__one_quantization_per_step():
    model, result = attached()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 4):
        for micro in range(4):
            checkpoint(model, batch(seed=micro), use_reentrant=False).square().sum().backward()
        assert result.quantizations == 2 * step
        optimizer.step()
        optimizer.zero_grad()


def test_cache__micro_batches__gradients_of_whole_batch():
    cached, _ = attached(seed=3)
    plain, off = attached(seed=3, cache=False)
    x = batch(8)
    for part in x.split(2):
        checkpoint(cached, part, use_reentrant=False).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, a), (_, b) in zip(cached.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=2e-6, msg=name)
    assert off.quantizations == 0


def test_cache__on_and_off__same_run():
    results = []
    for cache in (True, False):
        model, result = attached(seed=4, cache=cache)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(5):
            for micro in range(2):
                model(batch(seed=10 * step + micro)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((snapshot(model), result.freeze()))
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name
    for name in ("up", "down"):
        assert torch.equal(results[0][1][name][0], results[1][1][name][0])


def test_cache__optimizer_that_writes_through_data__is_seen():
    class Hidden(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(0.1 * parameter.grad)

    model, _ = attached(seed=5)
    plain, _ = attached(seed=5, cache=False)
    for net in (model, plain):
        net(batch()).square().sum().backward()
        Hidden(net.parameters(), lr=0.1).step()
    assert torch.equal(model(batch()), plain(batch()))


def test_invalidate__write_outside_an_optimizer__is_seen():
    model, result = attached()
    before = model(batch())
    model.up.weight.data.mul_(3.0)
    assert torch.equal(model(batch()), before)
    result.invalidate()
    assert not torch.equal(model(batch()), before)


def test_cache__loaded_state__is_seen():
    model, _ = attached(seed=1)
    other, _ = attached(seed=2)
    model(batch())
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(batch()), other(batch()))


def test_freeze__trained_layers__codes_and_scales_of_forward():
    model, result = attached(fmt=QuantFormat(3, 16, torch.float16))
    frozen = result.freeze()
    assert list(frozen) == ["up", "down"]
    for name, linear in model.linears().items():
        integers, scale = frozen[name]
        assert integers.dtype == torch.int8
        assert scale.dtype == torch.float16
        assert torch.equal(
            integers, codes(linear.weight, result.scales[name], QuantFormat(3, stored_dtype=torch.float16))
        )
        assert torch.equal(scale, stored_scale(result.scales[name], torch.float16))
        assert not scale.requires_grad


def test_bake__trained_layers__code_times_scale_and_same_codes():
    model, result = attached()
    model(batch()).sum().backward()
    frozen = result.freeze()
    bias = model.up.bias.clone()
    parameter = model.up.weight
    result.bake()
    assert model.up.weight is parameter
    assert isinstance(model.up.weight, nn.Parameter)
    for name, linear in model.linears().items():
        assert linear.weight.dtype == torch.bfloat16
        assert linear.weight.grad is None
        assert torch.equal(linear.weight, dequantize(*frozen[name]))
    assert torch.equal(model.up.bias, bias)
    again = result.freeze()
    for name, (integers, scale) in frozen.items():
        assert torch.equal(again[name][0], integers)
        assert torch.equal(again[name][1], scale)


def test_bake__then_detach__same_outputs():
    model, result = attached(fmt=QuantFormat(4, 16, torch.float32))
    trained = model(batch())
    result.bake()
    assert torch.equal(model(batch()), trained)
    result.detach()
    assert torch.equal(model(batch()), trained)


def test_detach__attached_layer__as_before():
    plain = Tiny()
    model, result = attached()
    before = set(vars(plain.up))
    result.detach()
    result.detach()
    assert set(vars(model.up)) == before
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(batch()), plain(batch()))
    assert len(result) == 0
    assert result.scales == {}


def test_detach__earlier_forward__restored():
    model = Tiny()
    original = model.up.forward

    def doubled(x):
        return 2 * original(x)

    model.up.forward = doubled
    want = model(batch())
    result = attach(model.linears(), QuantFormat(4, 16))
    assert not torch.equal(model(batch()), want)
    result.detach()
    assert model.up.forward is doubled
    assert torch.equal(model(batch()), want)


def test_attach__after_detach__works():
    model, result = attached()
    result.detach()
    again = attach(model.linears(), QuantFormat(4, -1))
    assert again.scales["up"].shape == (48, 1)


def test_detach__optimizer_step__not_counted():
    model, result = attached()
    counter = result._counter
    result.detach()
    model(batch()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert counter.steps == 0


def test_clip_share__several_layers__share_of_all_weights():
    model, result = attached()
    with torch.no_grad():
        for scale in result.scales.values():
            scale.sub_(1.0)
    acted = total = 0
    for name, linear in model.linears().items():
        s = stored_scale(result.scales[name], torch.bfloat16).float().repeat_interleave(16, dim=1)
        rounded = (linear.weight / s).round()
        acted += ((rounded < -8) | (rounded > 7)).sum().item()
        total += linear.weight.numel()
    assert 0.05 < acted / total < 0.95
    share = result.clip_share()
    assert share.ndim == 0
    assert share.item() == pytest.approx(acted / total)
    assert not share.requires_grad


def test_attach__bad_layers__one_error_names_all_and_changes_nothing():
    model = Tiny()
    before = set(vars(model.up))
    layers = {"up": model.up, "narrow": nn.Linear(40, 4), "odd": nn.Linear(33, 4), "up.twice": model.up}
    layers["half"] = nn.Linear(32, 4, dtype=torch.float16)
    layers["norm"] = nn.LayerNorm(32)
    layers["sharded"] = nn.Linear(32, 4)
    layers["sharded"].weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="problem") as caught:
        attach(layers, QuantFormat(4, 16))
    text = str(caught.value)
    assert text.startswith("6 problem(s)")
    assert text.count("\n  ") == 6 and "XX" not in text
    for part in (
        "narrow: input width 40 is not divisible by group_size 16",
        "odd: input width 33 is not divisible by group_size 16",
        "up.twice: the same module as up",
        "half: a weight in torch.float16 cannot hold what is stored as torch.bfloat16",
        "norm: a LayerNorm, not a torch.nn.Linear",
        "sharded: its weight is (0,); attach before the model is sharded",
        "another group_size",
        "ignore",
    ):
        assert part in text
    assert set(vars(model.up)) == before
    assert PARAMETER not in model.up._parameters


def test_attach__attached_layers__refused_and_unchanged():
    model, result = attached()
    theta = model.up.weight_log_scale
    with pytest.raises(ValueError, match=r"2 problem\(s\).*\n  up: carries learned scales already; detach them first"):
        attach(model.linears(), QuantFormat(4, 16))
    assert model.up.weight_log_scale is theta
    assert result.freeze()


def test_attach__foreign_parameter_of_that_name__refused():
    model = Tiny()
    model.up.register_parameter(PARAMETER, nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"1 problem\(s\).*\n  up: carries learned scales already"):
        attach(model.linears(), QuantFormat(4, 16))
    assert model.up.weight_log_scale.shape == (1,)


def test_attach__float64_weights__float32_scales():
    model = Tiny().double()
    result = attach(model.linears(), QuantFormat(4, 16))
    assert {scale.dtype for scale in result.scales.values()} == {torch.float32}


def test_attach__bad_format_or_no_layers__refused():
    model = Tiny()
    with pytest.raises(ValueError, match="no layer to quantize; check targets and ignore"):
        attach({}, QuantFormat(4, 16))
    with pytest.raises(ValueError, match="8-bit codes"):
        attach(model.linears(), QuantFormat(8, 16))
    with pytest.raises(ValueError, match="group_size 0 is not a positive number"):
        attach(model.linears(), QuantFormat(4, 0))


class Refusing(nn.Linear):
    """A layer that fails when a parameter is registered, after others were attached."""

    def register_parameter(self, name, param):
        if name == PARAMETER:
            raise RuntimeError("out of memory")
        super().register_parameter(name, param)


def test_attach__failure_half_way__model_as_before():
    model = Tiny()
    model.down = Refusing(48, 16, bias=False)
    names, fields = list(model.state_dict()), [set(vars(model.up)), set(vars(model.down))]
    want = model(batch())
    with pytest.raises(RuntimeError, match="out of memory"):
        attach({**model.linears(), "head": model.head}, QuantFormat(4, 16))
    assert list(model.state_dict()) == names
    assert [set(vars(model.up)), set(vars(model.down))] == fields
    assert torch.equal(model(batch()), want)


def test_deepcopy__attached_model__independent():
    model, _ = attached()
    model(batch())
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.up.weight.mul_(2.0)
        clone.up.weight_log_scale.add_(0.5)
    plain = Tiny()
    plain.load_state_dict({k: v for k, v in clone.state_dict().items() if PARAMETER not in k})
    other = attach(plain.linears(), QuantFormat(4, 16))
    with torch.no_grad():
        for name, scale in other.scales.items():
            scale.copy_(clone.linears()[name].weight_log_scale)
    assert torch.equal(clone(batch()), plain(batch()))
    assert not torch.equal(clone(batch()), model(batch()))


def test_cache__with_and_without_autocast__separate_values():
    model, _ = attached()
    plain = model.up(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.up(batch()).dtype == torch.bfloat16
    assert torch.equal(model.up(batch()), plain)
    other, _ = attached()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.up(batch())
    assert torch.equal(other.up(batch()), plain)


def test_forward__autocast__computes_in_its_dtype():
    model, result = attached()
    x = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.up(x)
    weight = dequantize(*result.freeze()["up"])
    want = nn.functional.linear(x.bfloat16(), weight, model.up.bias.bfloat16())
    assert torch.equal(out, want)


def test_backward__bfloat16_model__float32_scale_gradients():
    model = Tiny().to(torch.bfloat16)
    result = attach(model.linears(), QuantFormat(4, 16))
    model(batch().bfloat16()).float().square().sum().backward()
    assert {p.grad.dtype for p in result.scales.values()} == {torch.float32}
    assert result.scales["up"].dtype == torch.float32
    assert torch.equal(result.scales["up"], start_scales(model.up.weight, QuantFormat(4, 16)))


@pytest.mark.slow
def test_ddp__attached_model__trains_scales(tmp_path):
    model, _ = attached(seed=6)
    plain, _ = attached(seed=6)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel = DistributedDataParallel(model)
    try:
        with parallel.no_sync():
            parallel(batch(seed=1)).square().sum().backward()
        parallel(batch(seed=2)).square().sum().backward()
    finally:
        del (
            parallel
        )  # the wrapper must go before the group: as its last owner it would wait for gloo's threads with the GIL held
        gc.collect()
        torch.distributed.destroy_process_group()
    for seed in (1, 2):
        plain(batch(seed=seed)).square().sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=1e-8, msg=name)


def test_training__scales_alone__lower_error():
    """A hundred steps on the scales alone lower the error of two-bit weights below that of the best start values."""
    torch.manual_seed(0)
    model, result = attached(fmt=QuantFormat(2, 16))
    reference = Tiny()
    optimizer = torch.optim.Adam(result.scales.values(), lr=2e-2)

    def error():
        x = batch(64)
        return (model.down(torch.tanh(model.up(x))) - reference.down(torch.tanh(reference.up(x)))).square().mean()

    first = error().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = error()
        loss.backward()
        optimizer.step()
    assert error().item() < 0.9 * first
