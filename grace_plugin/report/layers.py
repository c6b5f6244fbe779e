"""Where in the network B differs from A: each quantized linear on A's inputs, and each decoder layer in its own run.

output error   |y_B - y_A| / |y_A| of y = W x (+ b), Frobenius norms over all tokens x that are no padding. The inputs are A's
               on both sides (teacher-forced), so that a layer answers for itself and errors do not add up. The difference
               of the weights is multiplied in float32; sums run in float64.
hidden error   |h_B - h_A| / |h_A| of each decoder layer's output, each model in its own run: what has added up by then.
weight error   |W_B - W_A| / |W_A|.
at bounds      share of codes that are the smallest or largest of their range (-8 and 7 in 4 bits).

Errors are told apart for visual tokens and for text where a layer sees rows of tokens; an expert of a mixture sees the tokens
routed to it, padding included, and has one number.

Costs: one more product per linear; of a batch, B's decoder outputs (layers x tokens x width) until A has passed them.

Legend: B batch, S sequence, n tokens that are no padding.
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

__all__ = ["LayerErrors", "stored_formats"]

PARTS = ("all", "visual", "text")


def stored_formats(model: Any) -> dict[str, dict[str, Any]]:
    """What is stored of each packed layer: bits, groups of a row, weights, and the share of codes at the bounds.

    To be asked before the first forward pass, which unpacks the layers.
    """
    found = {}
    for name, codes, scales in each_packed_layer(model):
        fmt = format_of(model.get_submodule(name).quantization_scheme.weights, scales.dtype)
        smallest, largest = fmt.integer_range
        at_bounds = int(((codes == smallest) | (codes == largest)).sum())
        found[name] = {
            "bits": fmt.num_bits, "group_size": codes.shape[1] // scales.shape[1], "weights": codes.numel(),
            "clip_share": at_bounds / codes.numel(),
        }  # fmt: skip
    return found


def _ratio(error: float, reference: float) -> float | None:
    return (error / reference) ** 0.5 if reference > 0 else None


def _output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class LayerErrors:
    """Sums over batches. `names` are the quantized linears of B; A holds modules of the same names.

    Raises:
        ValueError: A lacks a module that B has quantized.
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

    def look_at(self, attention_mask: Tensor, visual: Tensor) -> None:
        """Say of the coming batch which tokens count (int64 [B, S]), and which of them are visual (flat positions)."""
        kept = attention_mask.flatten().bool()
        seen = torch.zeros_like(kept).index_fill_(0, visual, True) & kept
        self.shape, self.masks = attention_mask.shape, torch.stack([kept, seen, kept & ~seen]).double()

    def _squares(self, error: Tensor, reference: Tensor, *, rows: bool) -> Tensor:
        """Sums of squares [3, 2] of errors and references (float32 [tokens, width]), by part."""
        both = torch.stack([x.square().sum(dim=1, dtype=torch.float64) for x in (error, reference)], dim=1)
        if rows:
            return self.masks @ both
        return torch.cat([both.sum(dim=0, keepdim=True), both.new_zeros(2, 2)])

    @contextmanager
    def running_b(self) -> Iterator[None]:
        """B's forward pass of the batch: its decoder layers' outputs are kept."""
        self.states = []
        handles = [
            layer.register_forward_hook(lambda _m, _i, out: self.states.append(_output(out).flatten(0, 1)))
            for layer in self.layers[1]
        ]
        with _removed(handles):
            yield

    @contextmanager
    def running_a(self) -> Iterator[None]:
        """A's forward pass of the same batch: every sum grows."""

        def compare(index: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
                ours, theirs = _output(out).flatten(0, 1).float(), self.states[index].float()
                self.states[index] = torch.empty(0)
                self.hidden[index] += self._squares(theirs - ours, ours, rows=True)

            return hook

        def judge(name: str, other: Any) -> Any:
            def hook(module: Any, inputs: Any, out: Tensor) -> None:
                given = inputs[0]
                rows = given.dim() == 3 and given.shape[:2] == self.shape
                gap = other.weight.float() - module.weight.float()
                bias = None if module.bias is None else other.bias.float() - module.bias.float()
                error = nn.functional.linear(given.reshape(-1, given.shape[-1]).float(), gap, bias)
                self.sums[name] += self._squares(error, out.reshape(-1, out.shape[-1]).float(), rows=rows)

            return hook

        handles = [layer.register_forward_hook(compare(index)) for index, layer in enumerate(self.layers[0])]
        handles += [ours.register_forward_hook(judge(name, other)) for name, (ours, other) in self.linears.items()]
        with _removed(handles):
            yield

    def linear_findings(self, formats: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """One finding for each quantized linear, the largest output error first (None, for a layer nothing passed, last)."""
        place = {id(m): i for i, layer in enumerate(self.layers[0]) for m in layer.modules()}
        found = []
        for name, (ours, other) in self.linears.items():
            index = place.get(id(ours))
            errors = [_ratio(*pair) for pair in self.sums[name].tolist()]
            kind = re.sub(r"^.*?layers\.\d+\.", "", name) if index is not None else name
            found.append({
                "name": name, "decoder_layer": index, "kind": kind, "output_error": errors[0],
                "output_error_visual": errors[1], "output_error_text": errors[2],
                "weight_error": _weight_error(ours.weight, other.weight), **formats[name],
            })  # fmt: skip
        return sorted(found, key=lambda one: -1.0 if one["output_error"] is None else one["output_error"], reverse=True)

    def hidden_findings(self) -> list[dict[str, Any]]:
        """One finding for each decoder layer, in order."""
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
