"""Grouping, start values and the rounding of scales to what the file holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from grace_plugin.quantizer import QuantFormat, scales, start_scales, stored_scale
from tests.reference import fake_quant as oracle

STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FACTORS = [0.3 + 0.9 * i / 19 for i in range(20)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("stored", list(STORED))
def test_stored_scale__any_theta__nearest_normal_number(stored):
    theta = torch.cat([torch.linspace(-20, 12, 400), torch.tensor([-1e3, -150.0, 90.0, 1e3])])
    found = stored_scale(theta.unsqueeze(1), STORED[stored])
    assert found.dtype == STORED[stored]
    assert found.shape == (404, 1)
    assert found.flatten().tolist() == [oracle.scale(t, stored) for t in theta.tolist()]
    assert found.min() == oracle.SMALLEST[stored]
    assert found.max() == oracle.LARGEST[stored] / 128
    assert torch.isfinite(found * -128).all()


def test_stored_scale__place_in_a_tensor__does_not_matter():
    """Vectorised exponentials differ in the last bit from their scalar tail; a rounded scale must not."""
    theta = normal(40_000, 1, seed=2) - 4
    whole = stored_scale(theta, torch.float32)
    assert torch.equal(whole[:-3], stored_scale(theta[:-3], torch.float32))
    assert torch.equal(whole.flip(0), stored_scale(theta.flip(0), torch.float32))
    assert whole[17::4999].flatten().tolist() == [
        oracle.scale(t, "float32") for t in theta[17::4999].flatten().tolist()
    ]


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.sampled_from(list(STORED)))
def test_stored_scale__extreme_theta__never_zero_or_infinite(theta, stored):
    found = stored_scale(torch.tensor([[theta]]), STORED[stored])
    assert oracle.SMALLEST[stored] <= found.item() <= oracle.LARGEST[stored] / 128


def test_stored_scale__gradient__is_rounded_scale():
    theta = torch.tensor([[0.1], [-3.3]], requires_grad=True)
    found = stored_scale(theta, torch.bfloat16)
    (found.float() * torch.tensor([[2.0], [-3.0]])).sum().backward()
    assert theta.grad.dtype == torch.float32
    assert torch.equal(theta.grad, found.detach().float() * torch.tensor([[2.0], [-3.0]]))
    assert found[0].item() != math.exp(0.1)


def test_stored_scale__float64__passes_gradcheck():
    theta = normal(3, 2, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda t: stored_scale(t, torch.float64), (theta,))


@pytest.mark.parametrize("stored", list(STORED))
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_start_scales__candidates__least_squared_error(stored, bits):
    weight = normal(5, 24, seed=bits, dtype=torch.float64) * 0.05
    found = start_scales(weight, QuantFormat(bits, 8, STORED[stored]))
    assert found.shape == (5, 3)
    for row in range(5):
        for group in range(3):
            values = weight[row, 8 * group : 8 * group + 8].tolist()
            want, _ = oracle.best_factor(values, bits, stored, FACTORS)
            assert math.exp(found[row, group].item()) == pytest.approx(want, rel=1e-9)


def test_start_scales__normal_weights__better_than_max():
    weight = normal(16, 256, seed=3)

    def error(log_scale):
        s = log_scale.exp().unsqueeze(-1)
        grouped = weight.unflatten(-1, (2, 128))
        return ((grouped / s).round().clamp(-8, 7) * s - grouped).square().sum().item()

    plain = (weight.unflatten(-1, (2, 128)).abs().amax(-1) / 7).log()
    assert error(start_scales(weight, QuantFormat(4, 128, torch.float32))) < 0.85 * error(plain)


def test_start_scales__range__as_asked():
    weight = normal(4, 16, dtype=torch.float64)
    unit = weight.abs().amax(dim=1, keepdim=True) / 7
    one = start_scales(weight, QuantFormat(4, -1, torch.float64), candidates=1, low=0.5, high=2.0)
    torch.testing.assert_close(one.exp(), 0.5 * unit, rtol=1e-12, atol=0)
    two = start_scales(weight, QuantFormat(4, None, torch.float64), candidates=2, low=1.0, high=50.0)
    torch.testing.assert_close(two.exp(), unit, rtol=1e-12, atol=0)
    last = start_scales(weight, QuantFormat(4, None, torch.float64), candidates=2, low=50.0, high=1.0)
    torch.testing.assert_close(last.exp(), unit, rtol=1e-12, atol=0)


def test_start_scales__equal_candidates__first_wins():
    """3 is 3 * 1 and 1 * 3: both scales meet it exactly."""
    weight = torch.tensor([[3.0]], dtype=torch.float64)
    for low, high in ((1.0, 3.0), (3.0, 1.0)):
        found = start_scales(weight, QuantFormat(3, 1, torch.float64), candidates=2, low=low, high=high)
        assert found.exp().item() == pytest.approx(low)


def test_start_scales__group_of_zeros__geometric_mean_of_others():
    weight = normal(3, 8)
    weight[1, 4:] = 0
    found = start_scales(weight, QuantFormat(4, 4))
    others = [found[i, j].item() for i in range(3) for j in range(2) if (i, j) != (1, 1)]
    assert found[1, 1].item() == pytest.approx(sum(others) / 5, rel=1e-6)
    assert torch.equal(start_scales(torch.zeros(2, 8), QuantFormat(4, 4)), torch.zeros(2, 2))


def test_start_scales__one_nonzero_group__decides_for_others():
    weight = torch.zeros(1, 8)
    weight[0, :4] = torch.tensor([0.5, -0.1, 0.2, 0.3])
    found = start_scales(weight, QuantFormat(4, 4))
    assert found[0, 1] == found[0, 0]


def test_start_scales__tiny_weights__smallest_normal_scale():
    found = start_scales(normal(2, 8) * 1e-8, QuantFormat(4, 4, torch.float16))
    assert torch.equal(stored_scale(found, torch.float16), torch.full((2, 2), 2.0**-14, dtype=torch.float16))


def test_start_scales__logarithm__stored_scale_is_a_candidate():
    """What the search judged is what stored_scale gives back, for bfloat16 weights too."""
    weight = normal(64, 256, seed=9, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        found = start_scales(weight, QuantFormat(4, 32, dtype))
        assert found.dtype == torch.float32
        unit = weight.float().unflatten(-1, (8, 32)).abs().amax(-1) / 7
        factors = torch.linspace(0.3, 1.2, 20, dtype=torch.float64)
        candidates = torch.stack([(unit * f).to(dtype) for f in factors.tolist()])
        assert (candidates == stored_scale(found, dtype)).any(dim=0).all()


def test_row_blocks__any_shape__cover_once():
    step = scales.BLOCK_ELEMENTS // 1000
    blocks = list(scales.row_blocks(2 * step + 1, 1000))
    assert blocks == [slice(0, step), slice(step, 2 * step), slice(2 * step, 3 * step)]
    assert list(scales.row_blocks(2, 2 * scales.BLOCK_ELEMENTS)) == [slice(0, 1), slice(1, 2)]
    assert list(scales.row_blocks(scales.BLOCK_ELEMENTS, 1)) == [slice(0, scales.BLOCK_ELEMENTS)]


def test_start_scales__several_blocks__equal_row_by_row():
    weight = normal(3, scales.BLOCK_ELEMENTS // 2)
    found = start_scales(weight, QuantFormat(4, 1 << 16), candidates=2)
    rows = [start_scales(weight[row : row + 1], QuantFormat(4, 1 << 16), candidates=2) for row in range(3)]
    assert torch.equal(found, torch.cat(rows))


def test_row_blocks__no_columns__not_empty():
    assert list(scales.row_blocks(0, 5)) == []
    assert len(list(scales.row_blocks(3, 0))) == 1


@pytest.mark.parametrize(
    ("dtype", "stored", "fits"),
    [
        (torch.float32, torch.bfloat16, True), (torch.float32, torch.float16, True),
        (torch.bfloat16, torch.bfloat16, True), (torch.bfloat16, torch.float16, False),
        (torch.float16, torch.bfloat16, False), (torch.bfloat16, torch.float32, False),
    ],
)  # fmt: skip
def test_holds__pairs_of_dtypes__as_expected(dtype, stored, fits):
    assert scales.holds(dtype, stored) is fits
