"""INT4 linear layers in vLLM on a CPU without AVX-512: a vLLM plugin that `mend.py vllm` puts into the serving environment.

vLLM compiles its CPU kernel for INT4 weights (`cpu_gemm_wna16`) into its AVX-512 build only. On another x86 CPU it loads
a W4A16 checkpoint, picks that kernel all the same, and the first product ends in an AttributeError. There, and only there,
this plugin puts a kernel before it that makes the stored codes and scales dense when the model is loaded and multiplies in
float32. All else is vLLM's: what it reads from the checkpoint, attention, sampling, the server. The name of the kernel stands
in vLLM's log, so that nobody takes these products for vLLM's own.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types


class DenseInt4LinearKernel(MPLinearKernel):
    """y = x @ w^ with w^ = code * scale rounded to the scale's dtype, as compressed-tensors makes it; sums in float32."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type != scalar_types.uint4b8 or c.zero_points:
            return False, "only symmetric INT4 weights are made dense"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scale = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)  # [out, in / 8], [out, groups]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = (packed.data.unsqueeze(-1) >> shifts & 15).sub_(8).flatten(1)
        dense = (codes.unflatten(1, (scale.shape[1], -1)) * scale.data.unsqueeze(-1)).flatten(1)
        layer.dense_weight = torch.nn.Parameter(dense.float(), requires_grad=False)
        for name in (self.w_q_name, self.w_s_name):
            getattr(layer, name).data = torch.empty(0, dtype=getattr(layer, name).dtype)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.nn.functional.linear(x.float(), layer.dense_weight, None if bias is None else bias.float())
        return y.to(x.dtype)


def register() -> None:
    """Put the kernel first for CPUs without AVX-512; nothing elsewhere. May be called twice."""
    kernels = linear._POSSIBLE_KERNELS[current_platform._enum] if current_platform.is_cpu() else []
    if current_platform.is_cpu() and not torch.cpu._is_avx512_supported() and DenseInt4LinearKernel not in kernels:
        kernels.insert(0, DenseInt4LinearKernel)
