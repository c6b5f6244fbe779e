"""Put fake quantization of other libraries on the study's student: torchao's QAT and NVIDIA ModelOpt's quantizer.

Both quantize weights symmetrically in groups and recompute each group's scale from its largest weight on every forward pass
(ModelOpt: once, by calibration, before training). Training then is the study's one loop. At the end the weights are what their
own fake quantizer gives, so that the student is scored as it would ship.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

__all__ = ["prepare"]


def prepare(
    quantizer: str, model: nn.Module, names: Collection[str], bits: int, size: int | None
) -> Callable[[], None]:
    """Put the fake quantization of "torchao" or "modelopt" on the named linears; returns what bakes it into their weights.

    Args:
        names: linears of `model`.
        bits: of a code. size: weights of a row that share a scale; None for one scale per row.

    Raises:
        ImportError: the library is not installed.
    """
    (_torchao if quantizer == "torchao" else _modelopt)(model, frozenset(names), bits, size)

    @torch.no_grad()
    def bake() -> None:
        for name in names:
            linear = model.get_submodule(name)
            fake: Any = linear.weight_fake_quantizer if quantizer == "torchao" else linear.weight_quantizer
            plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(fake(linear.weight)), linear.bias
            model.set_submodule(name, plain)

    return bake


def _torchao(model: nn.Module, names: frozenset[str], bits: int, size: int | None) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    how = {"granularity": "per_channel"} if size is None else {"group_size": size}
    weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), is_symmetric=True, **how)
    quantize_(model, QATConfig(weight_config=weights, step="prepare"), filter_fn=lambda _, name: name in names)


def _modelopt(model: nn.Module, names: frozenset[str], bits: int, size: int | None) -> None:
    import modelopt.torch.quantization as mtq

    how: dict[str, Any] = {"num_bits": bits, "enable": True}
    how |= {"axis": 0} if size is None else {"block_sizes": {-1: size}}
    chosen = [{"quantizer_name": f"{name}.weight_quantizer", "cfg": how} for name in sorted(names)]
    mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *chosen], "algorithm": "max"})
