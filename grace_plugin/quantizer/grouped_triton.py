"""The quantizer of many layers in one Triton launch each way: the kernels of `fake_quant_triton`, given a table of weights.

A row of the table is a layer: addresses of its weight and of what is written, its first tile and its first group among all. A
program finds the layer of its tile by bisection. Every number is that of a launch of its own. The table takes 32 bytes a layer
and is copied to the device in the order of the stream.

Legend: layers of one device, dtype and group size; weight [out, in]; a tile is some groups of one layer.
"""

# mypy: allow-untyped-defs

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from grace_plugin.quantizer import fake_quant_triton as alone
from grace_plugin.quantizer.format import QuantFormat

__all__ = ["backward", "forward"]

Pair = tuple[Tensor, Tensor]  # weight [out, in] and log-scale, float32 [out, groups]

if alone.triton is not None:
    import triton
    import triton.language as tl

    from grace_plugin.quantizer.fake_quant_triton import backward_tile, forward_tile

    @triton.jit
    def _place(table, layers, ROWS: tl.constexpr):
        """Of this program's tile: its layer's row of the table, its groups in the layer, how many that has, and its first."""
        tile = tl.program_id(0)
        low, high = 0, layers
        while high - low > 1:  # the last layer whose first tile does not come after this one
            middle = (low + high) // 2
            first = tl.load(table + middle * 4 + 2)
            low = tl.where(first <= tile, middle, low)
            high = tl.where(first <= tile, high, middle)
        row = table + low * 4
        first = tl.load(row + 3)
        return row, (tile - tl.load(row + 2)) * ROWS + tl.arange(0, ROWS), tl.load(row + 7) - first, first

    @triton.jit
    def _forward(
        table, layers, scale, smallest, largest, WEIGHT: tl.constexpr, OUT: tl.constexpr, STORED: tl.constexpr,
        EXACT: tl.constexpr, size: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        row, group, groups, first = _place(table, layers, ROWS)
        weight = tl.multiple_of(tl.load(row).to(tl.pointer_type(WEIGHT)), 16)
        out = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(OUT)), 16)
        s = tl.load(scale + first + group, mask=group < groups, other=1.0).to(tl.float32)
        forward_tile(weight, s, out, group, groups, smallest, largest, size, STORED, EXACT, ROWS, WIDTH)

    @triton.jit
    def _backward(
        table,
        layers,
        scale,
        grad_log_scale,
        smallest,
        largest,
        WEIGHT: tl.constexpr,
        EXACT: tl.constexpr,
        size: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        row, group, groups, first = _place(table, layers, ROWS)
        weight = tl.multiple_of(tl.load(row).to(tl.pointer_type(WEIGHT)), 16)
        grad = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(WEIGHT)), 16)
        backward_tile(
            weight,
            scale + first,
            grad,
            grad,
            grad_log_scale + first,
            group,
            groups,
            smallest,
            largest,
            size,
            EXACT,
            True,
            True,
            ROWS,
            WIDTH,
        )


def _table(weights: Sequence[Tensor], others: Sequence[Tensor], counts: list[int], rows: int) -> tuple[Tensor, int]:
    """int64 [layers + 1, 4] on the weights' device, and the number of tiles; the last row ends the one before."""
    tiles = [0, *accumulate(-(-count // rows) for count in counts)]
    groups = [0, *accumulate(counts)]
    addresses = [[tensor.data_ptr() for tensor in tensors] + [0] for tensors in (weights, others)]
    # addresses are read from memory: a launch takes a fixed number of arguments, a model has hundreds of layers
    table = torch.tensor(list(zip(*addresses, tiles, groups, strict=True)), dtype=torch.int64)
    device = weights[0].device
    # pinned and not waited for: a pageable copy would stop the host until the device has caught up
    return (table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table), tiles[-1]


def _prepared(
    layers: Sequence[Pair], others: Sequence[Tensor], fmt: QuantFormat
) -> tuple[Tensor, tuple[int], Tensor, dict[str, Any]]:
    """Table, grid, scales of all groups [groups], and the arguments that both launches take by name."""
    weights, log_scales = [weight for weight, _ in layers], [log_scale.detach() for _, log_scale in layers]
    tile = alone.tile_of(weights[0].shape[1] // log_scales[0].shape[1])
    table, tiles = _table(weights, others, [log_scale.numel() for log_scale in log_scales], tile["ROWS"])
    scale = alone.scales(torch.cat([log_scale.flatten() for log_scale in log_scales]), fmt.stored_dtype)
    smallest, largest = map(float, fmt.code_range)
    named = {"smallest": smallest, "largest": largest, "WEIGHT": alone.stored_type(weights[0].dtype)}
    return table, (tiles,), scale, {**tile, **named, "EXACT": alone.divides(scale)}


def _by_layer(flat: Tensor, layers: Sequence[Pair]) -> list[Tensor]:
    """Numbers of all groups as each layer's [out, groups]."""
    parts = flat.split([log_scale.numel() for _, log_scale in layers])
    return [part.view(log_scale.shape) for part, (_, log_scale) in zip(parts, layers, strict=True)]


def forward(layers: Sequence[Pair], fmt: QuantFormat, out_dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return w^ [out, in] in ``out_dtype`` and the stored scales [out, groups] of every layer."""
    outs = [torch.empty(weight.shape, dtype=out_dtype, device=weight.device) for weight, _ in layers]
    table, grid, scale, named = _prepared(layers, outs, fmt)
    dtypes = {"OUT": alone.stored_type(out_dtype), "STORED": alone.stored_type(fmt.stored_dtype)}
    with torch.cuda.device_of(scale):
        _forward[grid](table, len(outs), scale, **dtypes, **named)
    return list(zip(outs, _by_layer(scale, layers), strict=True))


def backward(layers: Sequence[Pair], grads: Sequence[Tensor], fmt: QuantFormat) -> list[Tensor]:
    """Return gradients of the log-scales, float32 [out, groups]; each dL/dw^ of ``grads`` becomes the weight's gradient."""
    table, grid, scale, named = _prepared(layers, grads, fmt)
    found = torch.empty(scale.shape, dtype=torch.float32, device=scale.device)
    with torch.cuda.device_of(scale):
        _backward[grid](table, len(grads), scale, found, **named)
    return _by_layer(found, layers)
