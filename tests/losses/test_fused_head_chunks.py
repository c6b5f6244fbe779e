"""The head's own parts, without the losses around them."""

import pytest
import torch

from grace_plugin.losses.fused_head_chunks import Head


@pytest.mark.parametrize("bias", [False, True])
def test_head_part__ids__equals_head_of_those_ids(bias):
    """A head without a bias has parts without one."""
    ids = torch.arange(20, dtype=torch.float64)
    head = Head(ids.view(5, 4), ids[:5] if bias else None, 1.5)
    part = head.part(1, 3)
    assert torch.equal(part.weight, head.weight[1:3]) and part.cap == 1.5
    assert torch.equal(part.bias, head.bias[1:3]) if bias else part.bias is None
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        part.logits(hidden), head.logits(hidden)[:, 1:3], rtol=1e-14, atol=0
    )  # a product's order


@pytest.mark.parametrize("biased", [True, False])
def test_head_unrounded__some_ids__equal_float32_product(biased):
    made = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 40, generator=made).bfloat16() for rows in (3, 5))
    bias = torch.randn(5, generator=made).bfloat16() if biased else None
    ids = torch.tensor([[4, 0], [1, 1], [2, 3]])
    exact = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double() if biased else None)
    found = Head(weight, bias, 0.5).unrounded(hidden, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact.gather(1, ids), rtol=1e-6, atol=1e-6)
