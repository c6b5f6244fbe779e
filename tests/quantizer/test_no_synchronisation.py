"""The quantizer runs on the meta device, where reading a value on the host or leaving the device raises."""

import torch
from torch import nn

from grace_plugin.quantizer import (
    QuantFormat,
    attach,
    clipped,
    codes,
    dequantize,
    fake_quantize,
    start_scales,
    stored_scale,
)


def on_meta(*tensors):
    return {tensor.device.type for tensor in tensors} == {"meta"}


def test_functions__on_meta__no_host_read():
    weight = torch.empty(6, 32, device="meta", requires_grad=True)
    log_scale = torch.empty(6, 2, device="meta", requires_grad=True)
    fmt = QuantFormat(4, 16)
    assert on_meta(start_scales(weight, fmt))
    integers, scale = codes(weight, log_scale, fmt), stored_scale(log_scale, torch.bfloat16)
    assert on_meta(integers, scale, dequantize(integers, scale), clipped(weight, log_scale, fmt))
    fake_quantize(weight, log_scale, fmt).sum().backward()
    assert on_meta(weight.grad, log_scale.grad)


def test_attached_layers__on_meta__no_host_read():
    layers = {"a": nn.Linear(32, 8, device="meta"), "b": nn.Linear(32, 8, bias=False, device="meta")}
    attached = attach(layers, QuantFormat(4, 16))
    x = torch.empty(3, 32, device="meta")
    (layers["a"](x) + layers["b"](x)).sum().backward()
    frozen = attached.freeze()
    assert on_meta(attached.clip_share(), *frozen["a"], *frozen["b"], layers["a"].weight_log_scale.grad)
    assert attached.quantizations == 2
    attached.bake()
    assert on_meta(layers["a"].weight)


def test_lora__on_meta__no_host_read():
    layer = nn.Linear(32, 8, device="meta")
    attached = attach({"a": layer}, QuantFormat(4, 16))
    attached.add_lora(["a"], rank=2, alpha=4.0)
    layer(torch.empty(3, 32, device="meta")).sum().backward()
    assert on_meta(layer.lora_A, layer.lora_B, layer.lora_A.grad, layer.lora_B.grad, *attached.freeze()["a"])


def test_clip_share__layers_on_two_devices__on_the_first():
    attached = attach({"a": nn.Linear(32, 8, device="meta"), "b": nn.Linear(32, 8)}, QuantFormat(4, 16))
    assert on_meta(attached.clip_share())
