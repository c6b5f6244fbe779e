"""What a forward pass multiplies by, compared with what is saved: in the run's dtype, from what is kept, layer by layer."""

import warnings

import pytest
import torch
from torch import nn

from grace_plugin.quantizer import QuantFormat, attach


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_count_forward_mismatches__write_through_data__counted(autocast, cache):
    """A write through .data is not counted by torch: what is kept is older, and only that differs from what would be saved.

    Stored in float16, a weight cannot be computed in bfloat16, autocast's own choice on a CPU.
    """
    torch.manual_seed(0)
    linears = {name: nn.Linear(128, 8) for name in ("a", "b")}
    attached = attach(linears, QuantFormat(4, 32, torch.float16), cache=cache)

    def forward():
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast), torch.no_grad():
            for linear in linears.values():
                linear(torch.ones(1, 128))

    forward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attached.count_forward_mismatches(attached.freeze()) == {}
    made = attached.quantizations
    forward()
    assert attached.quantizations == made + 2 * cache  # nothing was kept
    linears["b"].weight.data[0, :5] += 100.0
    assert attached.count_forward_mismatches(attached.freeze()) == ({"b": 5} if cache else {})
    assert attached.count_forward_mismatches(attached.freeze()) == {}
