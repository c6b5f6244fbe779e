"""INT4 layers in vLLM on a CPU for which it has no kernel: a plugin that `mend.py vllm` puts into the serving environment.

What vLLM 0.32 lacks on x86. Its kernel for INT4 linear layers (`cpu_gemm_wna16`) is compiled into its AVX-512 build only; on
another CPU it loads a W4A16 checkpoint, picks that kernel all the same, and the first product ends in an AttributeError. For
INT4 experts it has kernels that round activations to 8 bits, on CPUs with AMX or with zentorch; with
`VLLM_CPU_INT4_W4A8=0`, or on another CPU, a mixture of experts is refused.

What this does, there and only there. Stored codes and scales are made dense when the model is loaded, and multiplied in
float32. All else is vLLM's: what it reads from the checkpoint and where, routing, attention, sampling, the server. Its log
says `DenseInt4LinearKernel` or `dense INT4 experts`, so that nobody takes these products for vLLM's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as experts,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

Method = experts.CompressedTensorsWNA16MoEMethod
logger = init_logger(__name__)


def dense(packed: torch.Tensor, scale: torch.Tensor) -> torch.nn.Parameter:
    """code * scale rounded to the scale's stored dtype, as compressed-tensors makes it, in float32.

    packed: int32 [..., out, in / 8], the first of 8 codes in the lowest bits. scale: [..., out, groups]; where vLLM computes in
    float32 it has widened the file's bfloat16 scales, which shows in their values.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> shifts & 15).sub_(8).flatten(-2)
    stored = scale.bfloat16() if torch.equal(scale.bfloat16().to(scale.dtype), scale) else scale
    weight = (codes.unflatten(-1, (stored.shape[-1], -1)) * stored.unsqueeze(-1)).flatten(-2)
    return torch.nn.Parameter(weight.float(), requires_grad=False)


def empty(layer: torch.nn.Module, *names: str) -> None:
    """Give the memory of parameters back."""
    for name in names:
        parameter = getattr(layer, name)
        parameter.data = parameter.data.new_empty(0)


class DenseInt4LinearKernel(MPLinearKernel):
    """y = x @ w^, sums in float32."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type != scalar_types.uint4b8 or c.zero_points:
            return False, "only symmetric INT4 weights are made dense"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.dense_weight = dense(getattr(layer, self.w_q_name).data, getattr(layer, self.w_s_name).data)
        empty(layer, self.w_q_name, self.w_s_name)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = functional.linear(x.float(), layer.dense_weight, None if bias is None else bias.float())
        return y.to(x.dtype)


class NoExperts:
    """In place of vLLM's experts class: routing stays outside."""

    @staticmethod
    def is_monolithic() -> bool:
        return False


def without_backend(select: Any) -> Any:
    """vLLM's choice of a backend, where it has one that keeps activations as they are."""

    def choose(*args: Any, **given: Any) -> Any:
        args_of = given["quant_config"]
        if args_of.num_bits != 4 or not args_of.symmetric:
            return select(*args, **given)
        logger.info("Using dense INT4 experts")
        return None, NoExperts

    return choose


def make_experts_dense(own: Any) -> Any:
    """`process_weights_after_loading` of vLLM's method, where a backend was chosen."""

    def process(self: Any, layer: torch.nn.Module) -> None:
        if self.wna16_backend is not None:
            return own(self, layer)
        for name in ("w13_weight", "w2_weight"):
            setattr(layer, name, dense(getattr(layer, f"{name}_packed").data, getattr(layer, f"{name}_scale").data))
            empty(layer, f"{name}_packed", f"{name}_scale")
        return None

    return process


def multiply_experts(own: Any) -> Any:
    """`apply` of vLLM's method, where a backend was chosen; else y_i = sum over experts e of p_ie * w2_e (silu(g) * u)."""

    def apply(
        self: Any,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *rest: Any,
        **more: Any,
    ) -> torch.Tensor:
        if self.wna16_backend is not None:
            return own(self, layer, x, topk_weights, topk_ids, *rest, **more)
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = functional.linear(x[rows].float(), layer.w13_weight[expert]).chunk(2, dim=-1)
            y = functional.linear(functional.silu(gate) * up, layer.w2_weight[expert])
            out.index_add_(0, rows, y * topk_weights[rows, slots].float().unsqueeze(1))
        return out.to(x.dtype)

    return apply


def register() -> None:
    """Put both in place on a CPU that lacks vLLM's kernels; nothing elsewhere. May be called twice."""
    if not current_platform.is_cpu():
        return
    kernels = linear._POSSIBLE_KERNELS[current_platform._enum]
    if not torch.cpu._is_avx512_supported() and DenseInt4LinearKernel not in kernels:
        kernels.insert(0, DenseInt4LinearKernel)
    if not envs.VLLM_CPU_INT4_W4A8 and not hasattr(experts, "grace_dense"):
        experts.grace_dense = True
        experts.select_wna16_moe_backend = without_backend(experts.select_wna16_moe_backend)
        Method.process_weights_after_loading = make_experts_dense(Method.process_weights_after_loading)
        Method.apply = multiply_experts(Method.apply)
