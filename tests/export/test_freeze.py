"""Freezing: saved codes and scales are those that a forward pass multiplies by, in the run's dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grace_plugin.export.freeze import freeze_layers
from grace_plugin.quantizer import QuantFormat, attach
from grace_plugin.quantizer.fake_quant import dequantize
from grace_plugin.quantizer.linear import STATE


def layers(lora: bool) -> tuple[dict[str, nn.Linear], object]:
    """Two layers with scales, and low-rank updates that are not zero."""
    torch.manual_seed(0)
    linears = {name: nn.Linear(128, 8) for name in ("a", "b")}
    attached = attach(linears, QuantFormat(4, 32))
    if lora:
        attached.add_lora(["a", "b"], rank=2, alpha=4.0)
        for linear in linears.values():
            linear.lora_B.data.normal_(std=0.1)
        attached.invalidate()
    return linears, attached


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_freeze_layers__final_weights__forward_multiplies_by_code_times_scale(lora: bool, autocast: bool) -> None:
    linears, attached = layers(lora)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        seen = {name: linear(torch.eye(128)) for name, linear in linears.items()}
    frozen, counted = freeze_layers([attached])
    assert counted == {"weights": 2 * 128 * 8, "weights_differing": 0}
    for name, linear in linears.items():
        expected = nn.functional.linear(torch.eye(128), dequantize(*frozen[name]).float(), linear.bias)
        assert torch.allclose(seen[name].float(), expected, atol=0.0 if not autocast else 0.01, rtol=0.0)
        assert linear.__dict__[STATE].computed_in == (torch.bfloat16 if autocast else torch.float32)
        assert linear.__dict__[STATE].cache._entry is None, "one layer at a time"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_freeze_layers__weight_written_through_data__counted_by_layer_and_unchanged(lora: bool, autocast: bool) -> None:
    linears, attached = layers(lora)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        for linear in linears.values():
            linear(torch.ones(1, 128))
    before = linears["b"].weight.detach().clone()
    linears["b"].weight.data[0, :5] += 100.0
    after = linears["b"].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"in 1 of 2 layers .*\(b: 5\).*Call invalidate\(\)"):
        freeze_layers([attached])
    assert torch.equal(linears["b"].weight, after) and not torch.equal(before, after)
    assert freeze_layers([attached])[1]["weights_differing"] == 0
