"""Kernel shape rules: what is refused, what is a warning, and that the rules are vLLM's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from grace_plugin.quantizer import QuantFormat
from grace_plugin.vllm_constraints import GPU_KERNELS, check_kernels


def layers(**shapes: tuple[int, int]) -> dict[str, nn.Linear]:
    return {f"model.layers.0.{name}": nn.Linear(*shape, device="meta") for name, shape in shapes.items()}


def test_check_kernels__real_model_shapes__no_warning() -> None:
    real = layers(q_proj=(3584, 3584), k_proj=(3584, 512), o_proj=(3584, 3584), down_proj=(18944, 3584))
    assert check_kernels({QuantFormat(4, 128): real}, 4) == []


@pytest.mark.parametrize(
    ("name", "shape", "ranks", "sentence"),
    [
        ("down_proj", (8964, 1536), 8, "8964 cannot be split in 8"),
        ("down_proj", (8960, 1536), 4, "2240 inputs per rank, group 128"),
        ("o_proj", (1536, 1536), 8, "192 inputs per rank, group 128"),
        ("k_proj", (1536, 255), 2, "255 cannot be split in 2"),
    ],
)
def test_check_kernels__width_no_rank_can_hold__refused(
    name: str, shape: tuple[int, int], ranks: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        check_kernels({QuantFormat(4, 128): layers(**{name: shape, "q_proj": (1536, 1536)})}, ranks)
    assert "q_proj" not in str(caught.value)
    assert "tensor_parallel_size" in str(caught.value)


def test_check_kernels__row_parallel_layers__inputs_split() -> None:
    """The same width passes as q_proj, whose outputs are cut, and fails as o_proj."""
    assert check_kernels({QuantFormat(4, 128): layers(q_proj=(384, 512))}, 2) == []
    with pytest.raises(ValueError, match="192 inputs per rank"):
        check_kernels({QuantFormat(4, 128): layers(o_proj=(384, 512))}, 2)


def test_check_kernels__no_gpu_kernel__warnings(caplog: pytest.LogCaptureFixture) -> None:
    found = check_kernels(
        {
            QuantFormat(4, 32): layers(k_proj=(96, 64), q_proj=(128, 64)),
            QuantFormat(3, 128): layers(up_proj=(128, 128)),
        }
    )
    assert len(found) == 2
    assert "[3] bits" in found[0] and "humming-kernels" in found[0] and "transformers alone" not in found[0]
    assert "k_proj (96 in, 64 out)" in found[1]
    assert "q_proj" not in found[1]
    assert [record.getMessage() for record in caplog.records] == found


def test_check_kernels__one_scale_per_channel__no_group_to_fit() -> None:
    assert check_kernels({QuantFormat(8, None, torch.float16): layers(down_proj=(320, 128))}, 5) == []
    assert set(GPU_KERNELS) == {"Marlin", "Machete"}
