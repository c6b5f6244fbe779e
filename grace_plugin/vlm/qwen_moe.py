"""Qwen3-VL-MoE: Qwen3-VL with a mixture of experts in the decoder.

transformers holds the experts of a layer as two 3D parameters, which no linear quantizer reaches. Before scales are attached
they become one `nn.Linear` per expert and projection, through llm-compressor; the checkpoint then holds each expert by itself,
as vLLM reads it. Plain `from_pretrained` knows fused experts only, so transformers reads such a checkpoint inside `reading()`.
The router stays as it is, in transformers (no `nn.Linear`) and in vLLM (ignored by name).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import nn
from transformers import AutoModelForImageTextToText

from grace_plugin.upstream import linearize_moe, load_quantizable_moe, patch_moe_mappings, remove_module_offload
from grace_plugin.vlm.qwen_vl import Qwen3VL

__all__ = ["Qwen3VLMoe"]

_FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class Qwen3VLMoe(Qwen3VL):
    """`Qwen3VLMoeForConditionalGeneration`."""

    model_type = "qwen3_vl_moe"
    router: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?mlp\.gate$",)

    def unfuse_experts(self, model: nn.Module) -> None:
        linearize_moe(model)
        for (
            module
        ) in model.modules():  # upstream pins what it made to the device it was made on; a trainer moves models
            remove_module_offload(module)

    @contextmanager
    def reading(self) -> Iterator[None]:
        with patch_moe_mappings(self.model_type, [], _FUSED), load_quantizable_moe(AutoModelForImageTextToText):
            yield
