"""The example that adds a weight format from outside the package, trained, packed and unpacked."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize

from grace_plugin.quantizer import dequantize, register_format
from grace_plugin.quantizer.format import FORMATS

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "custom_format.py"


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The example, with its row in the table for the length of a test."""
    spec = importlib.util.spec_from_file_location("custom_format", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register_format(module.ROW)
    yield module
    FORMATS.remove(module.ROW)


def test_custom_format__trained_layer__only_its_codes_and_a_lower_error(example: ModuleType) -> None:
    before, after, group = example.train(60)
    assert after < 0.5 * before
    codes, scale = group.freeze()["layer"]
    assert codes.unique().tolist() == [-4, -2, -1, 0, 1, 2, 4]
    assert group.count_forward_mismatches({"layer": (codes, scale)}) == {}


def test_custom_format__every_quotient__nearest_code(example: ModuleType) -> None:
    quotients = torch.linspace(-6, 6, 4001)
    quotients = quotients[((quotients.abs().unsqueeze(1) - torch.tensor([0.5, 1.5, 3.0, 6.0])).abs() > 1e-4).all(dim=1)]
    levels = torch.tensor([-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0])
    nearest = levels[(quotients.unsqueeze(1) - levels).abs().argmin(dim=1)]
    assert torch.equal(example.PowersOfTwo().round(quotients), nearest)


def test_custom_format__saved_by_compressed_tensors__same_codes(example: ModuleType) -> None:
    _, _, group = example.train(2)
    codes, scale = group.freeze()["layer"]
    args = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    saved = quantize(dequantize(codes, scale), scale, None, args, dtype=torch.int8)
    assert torch.equal(unpack_from_int32(pack_to_int32(saved, 4), 4, codes.shape), codes)


def test_custom_format__run_as_a_script__prints_errors_and_codes() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "codes [-4, -2, -1, 0, 1, 2, 4]" in done.stdout
