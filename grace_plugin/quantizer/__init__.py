"""Learned group scales: fake quantization that trains exactly what the checkpoint will hold. Pure torch."""

from grace_plugin.quantizer.attach import QuantizedLayerGroup, attach
from grace_plugin.quantizer.cache import StepCounter, WeightCache
from grace_plugin.quantizer.fake_quant import clipped, codes, dequantize, fake_quantize
from grace_plugin.quantizer.layers import PARAMETER, Format
from grace_plugin.quantizer.lora import LORA_A, LORA_B, fake_quantize_merged, merged
from grace_plugin.quantizer.scales import (
    check_format,
    code_range,
    group_count,
    start_scales,
    stored_scale,
    validate_group,
)

__all__ = [
    "LORA_A",
    "LORA_B",
    "PARAMETER",
    "Format",
    "QuantizedLayerGroup",
    "StepCounter",
    "WeightCache",
    "attach",
    "check_format",
    "clipped",
    "code_range",
    "codes",
    "dequantize",
    "fake_quantize",
    "fake_quantize_merged",
    "group_count",
    "merged",
    "start_scales",
    "stored_scale",
    "validate_group",
]
