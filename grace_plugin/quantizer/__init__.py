"""Learned group scales: fake quantization that trains exactly what the checkpoint will hold. Pure torch."""

from grace_plugin.quantizer.fake_quant import StepCounter, WeightCache, clipped, codes, dequantize, fake_quantize
from grace_plugin.quantizer.format import FormatRow, IntegerQuantizer, QuantFormat, register_format
from grace_plugin.quantizer.grouped import QuantizedLayerGroup, attach
from grace_plugin.quantizer.linear import PARAMETER, check_layers
from grace_plugin.quantizer.lora import LORA_A, LORA_B, fake_quantize_merged, merged
from grace_plugin.quantizer.scales import row_blocks, start_scales, stored_scale

__all__ = [
    "LORA_A",
    "LORA_B",
    "PARAMETER",
    "FormatRow",
    "IntegerQuantizer",
    "QuantFormat",
    "QuantizedLayerGroup",
    "StepCounter",
    "WeightCache",
    "attach",
    "check_layers",
    "clipped",
    "codes",
    "dequantize",
    "fake_quantize",
    "fake_quantize_merged",
    "merged",
    "register_format",
    "row_blocks",
    "start_scales",
    "stored_scale",
]
