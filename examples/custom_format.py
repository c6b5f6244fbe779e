"""Add a weight format from outside the package: signed powers of two, which 4-bit integers hold.

A multiplication by 0, 1, 2 or 4 is a shift, and the codes are integers of an ordinary W4A16 checkpoint, so compressed-tensors
packs them and vLLM serves them without knowing the format. A format takes two things: a fake quantizer, which says what code a
quotient w / s becomes, and one row of the format table. With the row in the table a recipe's `scheme: W4A16` trains it.

    python examples/custom_format.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grace_plugin.quantizer import (
    FormatRow,
    IntegerQuantizer,
    QuantFormat,
    QuantizedLayerGroup,
    attach,
    dequantize,
    register_format,
)


class PowersOfTwo(IntegerQuantizer):
    """0 and signed powers of two, each quotient rounded to the nearest one."""

    has_kernel = False  # the Triton kernels round to integers; these codes are made in torch

    def code_range(self, fmt: QuantFormat) -> tuple[int, int]:
        """Return -4 and 4 for 4 bits, which hold -8 to 7."""
        largest = 1 << (fmt.num_bits - 2)
        return -largest, largest

    def round(self, quotient: Tensor) -> Tensor:
        """Return the nearest of 0, 1, 2, 4, ... with the quotient's sign; the caller clips it."""
        size = quotient.abs()
        # halfway between 2^k and 2^(k + 1) lies 0.75 * 2^(k + 1)
        power = torch.exp2((size / 0.75).log2().floor().clamp(min=0))
        return torch.where(size < 0.5, 0.0, power) * quotient.sign()


ROW = FormatRow("powers of two", (4,), PowersOfTwo())


def train(steps: int = 200) -> tuple[float, float, QuantizedLayerGroup]:
    """Train weights and scales of one layer to give the outputs of its float32 original, on inputs of 8 directions.

    Returns:
        The mean squared error before and after, and the layer's group.
    """
    torch.manual_seed(0)
    original, layer = nn.Linear(64, 32), nn.Linear(64, 32)
    layer.load_state_dict(original.state_dict())
    inputs, errors = torch.randn(512, 8) @ torch.randn(8, 64), []
    targets = original(inputs).detach()
    group = attach({"layer": layer}, QuantFormat(num_bits=4, group_size=32))
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(steps):
        error = (layer(inputs) - targets).square().mean()
        errors.append(error.item())
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    return errors[0], errors[-1], group


if __name__ == "__main__":
    register_format(ROW)
    before, after, group = train()
    codes, scale = group.freeze()["layer"]
    print(f"error {before:.5f} -> {after:.5f}")
    print(f"codes {codes.unique().tolist()}, the first weights {dequantize(codes, scale)[0, :4].tolist()}")
