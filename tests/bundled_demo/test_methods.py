"""Test that a method of the demo is scored with the weights that are stored."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoProcessor

from examples.bundled_demo.methods import STUDENT, in_float32, load_model, post_training
from examples.bundled_demo.scenes import heldout_samples
from examples.bundled_demo.score import encode_questions, greedy_answers
from grace_plugin.export.verify import packed_layers
from grace_plugin.quantizer.fake_quant import dequantize


def test_in_float32__packed_checkpoint__stored_weights_value_for_value(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(STUDENT)
    encoded = encode_questions(processor, list(heldout_samples(16)))
    folder = post_training("rtn", 4, tmp_path / "rtn", processor)
    stored = {name: dequantize(*layer) for name, layer in packed_layers(load_model(folder)).items()}
    dense = dict(load_model(STUDENT).named_parameters())
    model = in_float32(load_model(folder), encoded[0])
    modules = dict(model.named_modules())
    assert stored
    for name, weight in stored.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(modules[name].weight, weight.float())
    for name, parameter in dense.items():
        found = model.get_parameter(name)
        assert found.dtype == torch.float32
        assert name.removesuffix(".weight") in stored or torch.equal(found, parameter.float())
    assert any(greedy_answers(model, processor, encoded))
