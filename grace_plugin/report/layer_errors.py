"""Errors of B's layers against A's: each quantized linear on A's inputs, and each decoder layer in its own run.

output error   |y_B - y_A| / |y_A| of y = W x (+ b), Frobenius norms over all tokens x that are no padding. Both sides get A's
               inputs, so that a layer's error is its own and does not add up.
hidden error   |h_B - h_A| / |h_A| of each decoder layer's output, each model in its own run: the error added up so far.
weight error   |W_B - W_A| / |W_A|.
at bounds      share of codes that are the smallest or largest of their range (-8 and 7 in 4 bits).

Errors are separate for visual and for text tokens where a layer sees all tokens of a batch. An expert of a mixture sees only
the tokens routed to it, padding included, and has one number.

Cost: one more product per linear; per batch, B's decoder outputs (layers x tokens x width) until A has passed them.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.export.verify import each_packed_layer
from grace_plugin.quantizer import row_blocks
from grace_plugin.schemes import format_of

PARTS = ("all", "visual", "text")


def stored_formats(model: Any) -> dict[str, dict[str, Any]]:
    """Return bits, group size, number of weights and share of codes at the bounds, by name of the packed layer."""
    found = {}
    # only before the first forward pass, which turns packed layers into dense ones
    for name, codes, scales in each_packed_layer(model):
        fmt = format_of(model.get_submodule(name).quantization_scheme.weights, scales.dtype)
        smallest, largest = fmt.integer_range
        at_bounds = int(((codes == smallest) | (codes == largest)).sum())
        found[name] = {
            "bits": fmt.num_bits,
            "group_size": codes.shape[1] // scales.shape[1],
            "weights": codes.numel(),
            "clip_share": at_bounds / codes.numel(),
        }
    return found


def _ratio(error: float, reference: float) -> float | None:
    return (error / reference) ** 0.5 if reference > 0 else None


def _output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class LayerErrors:
    """Sums of squared errors and references over batches.

    Args:
        a, b: the models; A must hold a linear of each name.
        decoders: their decoders.
        names: the quantized linears of B.

    Raises:
        ValueError: A lacks a layer that B has quantized.
    """

    def __init__(self, a: Any, b: Any, decoders: tuple[nn.Module, nn.Module], names: list[str]) -> None:
        inside = dict(a.named_modules())
        missing = [name for name in names if not isinstance(inside.get(name), nn.Linear)]
        if missing:
            raise ValueError(f"B has quantized {len(missing)} layers that A does not have, the first {missing[0]!r}")
        self.linears = {name: (inside[name], b.get_submodule(name)) for name in names}
        self.layers = [list(decoder.get_submodule("layers").children()) for decoder in decoders]
        device = next(a.parameters()).device
        self.sums = {name: torch.zeros(len(PARTS), 2, dtype=torch.float64, device=device) for name in names}
        self.hidden = torch.zeros(len(self.layers[0]), len(PARTS), 2, dtype=torch.float64, device=device)
        self.masks = torch.zeros(0)
        self.shape = torch.Size()
        self.states: list[Tensor] = []

    def set_masks(self, attention_mask: Tensor, visual: Tensor) -> None:
        """Set which tokens of the next batch count (int64 [B, S]), and which of them are visual (positions in [B * S])."""
        kept = attention_mask.flatten().bool()
        seen = torch.zeros_like(kept).index_fill_(0, visual, True) & kept
        self.shape, self.masks = attention_mask.shape, torch.stack([kept, seen, kept & ~seen]).double()

    def _squares(self, error: Tensor, reference: Tensor, *, by_token: bool) -> Tensor:
        """Sum the squares of errors and references (float32 [tokens, width]) over all, visual and text tokens: [3, 2]."""
        # float64: the sums run over all tokens of a data set
        both = torch.stack([x.square().sum(dim=1, dtype=torch.float64) for x in (error, reference)], dim=1)
        if by_token:
            return self.masks @ both
        return torch.cat([both.sum(dim=0, keepdim=True), both.new_zeros(2, 2)])

    @contextmanager
    def running_b(self) -> Iterator[None]:
        """Keep the outputs of B's decoder layers in its forward pass."""
        self.states = []
        handles = [
            layer.register_forward_hook(lambda _m, _i, out: self.states.append(_output(out).flatten(0, 1)))
            for layer in self.layers[1]
        ]
        with _removed(handles):
            yield

    @contextmanager
    def running_a(self) -> Iterator[None]:
        """Add to all sums in A's forward pass of the same batch."""

        def compare(index: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
                ours, theirs = _output(out).flatten(0, 1).float(), self.states[index].float()
                self.states[index] = torch.empty(0)  # freed as A goes: the memory of one batch's states is the peak
                self.hidden[index] += self._squares(theirs - ours, ours, by_token=True)

            return hook

        def measure(name: str, other: Any) -> Any:
            def hook(module: Any, inputs: Any, out: Tensor) -> None:
                given = inputs[0]
                by_token = given.dim() == 3 and given.shape[:2] == self.shape
                # (W_B - W_A) x rather than W_B x - W_A x, whose difference would be rounding of two large products
                gap = other.weight.float() - module.weight.float()
                bias = None if module.bias is None else other.bias.float() - module.bias.float()
                # float32: in BF16 the product of a small difference would be lost to rounding
                error = nn.functional.linear(given.reshape(-1, given.shape[-1]).float(), gap, bias)
                self.sums[name] += self._squares(error, out.reshape(-1, out.shape[-1]).float(), by_token=by_token)

            return hook

        handles = [layer.register_forward_hook(compare(index)) for index, layer in enumerate(self.layers[0])]
        handles += [ours.register_forward_hook(measure(name, other)) for name, (ours, other) in self.linears.items()]
        with _removed(handles):
            yield

    def linear_findings(self, formats: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one entry per quantized linear, largest output error first; None, where no token passed, is last."""
        place = {id(m): i for i, layer in enumerate(self.layers[0]) for m in layer.modules()}
        found = []
        for name, (ours, other) in self.linears.items():
            index = place.get(id(ours))
            errors = [_ratio(*pair) for pair in self.sums[name].tolist()]
            kind = re.sub(r"^.*?layers\.\d+\.", "", name) if index is not None else name
            entry: dict[str, Any] = {"name": name, "decoder_layer": index, "kind": kind}
            entry |= dict(zip(("output_error", "output_error_visual", "output_error_text"), errors, strict=True))
            found.append(entry | {"weight_error": _weight_error(ours.weight, other.weight)} | formats[name])
        return sorted(found, key=lambda one: -1.0 if one["output_error"] is None else one["output_error"], reverse=True)

    def hidden_findings(self) -> list[dict[str, Any]]:
        """Return one entry per decoder layer, in order."""
        keys = ("hidden_error", "hidden_error_visual", "hidden_error_text")
        return [
            {"decoder_layer": i, **dict(zip(keys, (_ratio(*pair) for pair in sums), strict=True))}
            for i, sums in enumerate(self.hidden.tolist())
        ]


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _weight_error(ours: Tensor, other: Tensor) -> float | None:
    sums = torch.zeros(2, dtype=torch.float64, device=ours.device)
    for rows in row_blocks(*ours.shape):
        reference = ours[rows].double()
        sums += torch.stack([(other[rows].double() - reference).square().sum(), reference.square().sum()])
    return _ratio(*sums.tolist())
