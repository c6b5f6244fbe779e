"""What trains under each method, in which dtype, and that nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grace_plugin.quantizer import QuantFormat, attach
from grace_plugin.recipe import LoraRecipe, TrainingRecipe
from grace_plugin.trainable import choose_trainable, lora_layers, release_masters, upcast_to_fp32
from grace_plugin.upstream import match_named_modules
from grace_plugin.vlm import family_of
from tests.tiny import build


def decoder_linears(model: Any) -> dict[str, nn.Linear]:
    return dict(match_named_modules(model, ["Linear"], family_of(model).quantization_ignore()))


def prepared(family: str, **asked: Any) -> Any:
    """A bfloat16 student with scales, and low-rank updates for method "lora"."""
    model, _ = build(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    attached = attach(decoder_linears(model), QuantFormat(4, 128))
    if asked.get("method") == "lora":
        attached.add_lora(attached.linears, rank=2, alpha=4.0)
    choose_trainable(model, family_of(model), TrainingRecipe(**asked))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_choose_trainable__method_scales__scales_alone(family: str) -> None:
    model = prepared(family, method="scales")
    found = trained(model)
    assert len(found) == len(decoder_linears(model)) > 0
    assert {name.rpartition(".")[2] for name in found} == {"weight_log_scale"}
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_choose_trainable__lora_and_norms__float32_masters(family: str) -> None:
    model = prepared(family, method="lora", norms=True)
    found = trained(model)
    learned = ("weight_log_scale", "lora_A", "lora_B")
    norms = {name: p for name, p in found.items() if not name.endswith(learned)}
    assert len(found) - len(norms) == 3 * len(decoder_linears(model))
    assert len(norms) >= 2 * len(family_of(model).text_model(model).layers) + 1  # type: ignore[arg-type]
    assert all(p.ndim == 1 and family_of(model).trains(name) for name, p in norms.items())
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_norm_master__small_steps__kept_and_rounded() -> None:
    model = prepared("llava", method="scales", norms=True)
    norm = model.model.language_model.norm
    before = norm.weight.clone()
    assert before.dtype == torch.bfloat16
    master = norm.parametrizations.weight.original
    moved = []
    for _ in range(2):
        with torch.no_grad():
            master.mul_(1 + 1.5 * 2**-9)  # below half a step of bfloat16, two of them above it
        moved.append(not torch.equal(norm.weight, before))
    assert moved == [False, True]
    norm(torch.ones(1, 256, dtype=torch.bfloat16)).float().sum().backward()
    assert master.grad.dtype == torch.float32
    kept = master.detach().clone()
    release_masters(model)
    assert torch.equal(norm.weight, kept)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert type(norm).__name__ == "LlamaRMSNorm"


def test_norm_master__float32_model_or_keep__none() -> None:
    for dtype, masters in ((torch.float32, "float32"), (torch.bfloat16, "keep")):
        model, _ = build("llava")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        asked = TrainingRecipe(method="scales", norms=True, master_weights=masters)  # type: ignore[arg-type]
        choose_trainable(model, family_of(model), asked)
        assert len(trained(model)) == 7
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_choose_trainable__freeze_patterns__hold_for_scales_and_norms() -> None:
    model = prepared(
        "llava", method="scales", norms=True, freeze=["re:.*layers.0..*", "model.language_model.norm.weight"]
    )
    names = set(trained(model))
    assert names and not any(".layers.0." in name or "language_model.norm." in name for name in names)


def test_choose_trainable__method_full__familys_rule() -> None:
    model = prepared("llava", method="full")
    names = set(trained(model))
    assert {"lm_head.weight", "model.multi_modal_projector.linear_1.weight"} <= names
    assert not any("vision_tower" in name for name in names)
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith("weight_log_scale")} == {torch.bfloat16}


@pytest.mark.parametrize(("method", "masters", "expected"), [
    ("full", "float32", torch.float32), ("full", "keep", torch.bfloat16), ("scales", "float32", torch.bfloat16),
])  # fmt: skip
def test_upcast_to_fp32__methods__full_alone(method: Any, masters: Any, expected: torch.dtype) -> None:
    layer = nn.Linear(2, 2).bfloat16()
    upcast_to_fp32(layer, TrainingRecipe(method=method, master_weights=masters))
    assert {p.dtype for p in layer.parameters()} == {expected}


def test_lora_layers__targets__names_and_patterns() -> None:
    linears = {f"layers.{n}.{part}": nn.Linear(64, 32) for n in (0, 1) for part in ("q_proj", "v_proj")}
    assert lora_layers(LoraRecipe(), linears) == list(linears)
    assert lora_layers(LoraRecipe(targets=("re:.*q_proj$",)), linears) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert lora_layers(LoraRecipe(targets=("layers.1.v_proj",)), linears) == ["layers.1.v_proj"]
    with pytest.raises(ValueError, match=r"no quantized layer matches training\.lora\.targets \['q_proj'\]"):
        lora_layers(LoraRecipe(targets=("q_proj",)), linears)
    with pytest.raises(ValueError, match=r"rank 32 is not below the width of 4 layer\(s\): layers\.0\.q_proj"):
        lora_layers(LoraRecipe(rank=32), linears)
