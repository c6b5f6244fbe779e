"""Schemes that are not learned are refused with the field named; those that are learned are sorted by format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grace_plugin.quantizer import QuantFormat
from grace_plugin.run.inputs import read_recipe
from grace_plugin.schemes import layers_by_format, stored_dtype
from tests.pairs import Pair, modifier_of, recipe_text
from tests.tiny import build


def groups(**weights: Any) -> dict[str, Any]:
    fine = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    return {"group_0": {"targets": ["Linear"], "weights": fine | weights}}


@pytest.mark.parametrize(
    ("scheme", "field"),
    [
        ("W8A8", "input_activations is quantized"),
        ("W4A16_ASYM", "weights.symmetric is False"),
        ("FP8", "weights.type is float"),
        ("NVFP4", "weights.type is float"),
        ("NVFP4A16", "weights.strategy is tensor_group"),
    ],
)
def test_read_formats__presets_not_learned__refused(scheme: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"does not learn this scheme[\s\S]*{field}[\s\S]*use scheme: W4A16"):
        read_recipe(recipe_text("t", scheme=scheme))


@pytest.mark.parametrize(
    ("weights", "field"),
    [
        ({"actorder": "weight"}, "weights.actorder is weight"),
        ({"symmetric": False}, "weights.symmetric is False"),
        ({"strategy": "tensor", "group_size": None}, "weights.strategy is tensor"),
        ({"num_bits": 16}, "weights.num_bits is 16"),
    ],
)
def test_read_formats__fields_not_learned__refused(weights: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"group_0\.{field}"):
        read_recipe(recipe_text("t", scheme=None, config_groups=groups(**weights)))


def test_read_formats__kv_cache__refused() -> None:
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    with pytest.raises(ValueError, match=r"kv_cache_scheme is set"):
        read_recipe(recipe_text("t", kv_cache_scheme=cache))


def test_read_formats__several_problems__all_listed() -> None:
    with pytest.raises(ValueError, match=r"input_activations") as caught:
        read_recipe(recipe_text("t", scheme="FP8"))
    assert "weights.type is float" in str(caught.value)


def test_recipe__no_scheme__refused() -> None:
    with pytest.raises(ValueError, match=r"set scheme .*or config_groups, or quantize: false"):
        read_recipe(recipe_text("t", scheme=None))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_by_format__learned_bits__sorted(bits: int) -> None:
    modifier = modifier_of(recipe_text("t", scheme=None, config_groups=groups(num_bits=bits)))
    layer = nn.Linear(256, 8)
    assert layers_by_format(modifier.resolved_config, {"a": layer}, torch.float16) == {
        QuantFormat(bits, 128, torch.float16): {"a": layer}
    }


def test_layers_by_format__two_groups__sorted_by_format() -> None:
    asked = {
        "wide": {
            "targets": ["re:.*mlp.*"],
            "weights": groups(num_bits=8, strategy="channel", group_size=None)["group_0"]["weights"],
        },
        "narrow": {"targets": ["re:.*attn.*"], "weights": groups()["group_0"]["weights"]},
    }
    modifier = modifier_of(recipe_text("t", scheme=None, config_groups=asked))
    layers = {name: nn.Linear(128, 4) for name in ("x.mlp.up", "x.attn.q", "x.attn.k")}
    found = layers_by_format(modifier.resolved_config, layers, torch.float16)
    assert {fmt: sorted(names) for fmt, names in found.items()} == {
        QuantFormat(8, None, torch.float16): ["x.mlp.up"],
        QuantFormat(4, 128, torch.float16): ["x.attn.k", "x.attn.q"],
    }


def test_layers_by_format__two_claims__layer_named() -> None:
    asked = groups() | {"second": {"targets": ["re:.*mlp.*"], "weights": groups(num_bits=8)["group_0"]["weights"]}}
    modifier = modifier_of(recipe_text("t", scheme=None, config_groups=asked))
    with pytest.raises(ValueError, match=r"x\.mlp\.up is claimed by 2 formats"):
        layers_by_format(modifier.resolved_config, {"x.mlp.up": nn.Linear(128, 4)}, torch.float16)


def test_layers_by_format__not_a_linear__layer_named() -> None:
    modifier = modifier_of(recipe_text("t"))
    with pytest.raises(ValueError, match=r"conv is a Conv1d; GRACE quantizes torch.nn.Linear, add it to ignore"):
        layers_by_format(modifier.resolved_config, {"conv": nn.Conv1d(4, 4, 1)}, torch.bfloat16)


def test_stored_dtype__auto__source_checkpoints(llava: Pair) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(llava.student, dtype=torch.float32)
    assert stored_dtype(model, "auto") == torch.bfloat16
    assert stored_dtype(model, "float16") == torch.float16


def test_stored_dtype__float32_source__refused_with_fix(tmp_path: Path) -> None:
    model, _ = build("llava")
    with pytest.raises(ValueError, match=r"stored as torch\.float32.*Set scales\.stored_dtype: bfloat16"):
        stored_dtype(model, "auto")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"stored as torch\.float32"):
        stored_dtype(model, "auto")
    assert stored_dtype(model, "bfloat16") == torch.bfloat16
