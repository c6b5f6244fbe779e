"""The contract of `contract.py` for every registered family, and facts of single families."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grace_plugin.vlm import family_of, matches
from tests.tiny import EVERY, build, make_samples
from tests.vlm.contract import FamilyContract, collated, replaced


@pytest.mark.parametrize("name", EVERY)
class TestRegisteredFamilies(FamilyContract):
    pass


def test_unfuse_experts__router__left_alone_and_same_logits() -> None:
    routed = [name for name in EVERY if family_of(build(name)[0]).router]
    assert routed
    for name in routed:
        model, processor = build(name)
        family, batch = family_of(model), collated(processor, make_samples(1, seed=1))
        assert matches("language_model.model.layers.0.mlp.gate", family.quantization_ignore())
        with torch.no_grad():
            before = model(**batch).logits
            fused = sum(parameter.numel() for parameter in model.parameters())
            family.unfuse_experts(model)
            after = model(**batch).logits
        assert fused == sum(parameter.numel() for parameter in model.parameters())
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        assert all(type(module._parameters) is dict for module in model.modules())  # nothing is pinned to a device
        experts = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".experts." in n]
        assert len(experts) == 3 * model.config.text_config.num_experts * len(family.text_model(model).layers)


def test_softcap__decoder_config__read() -> None:
    model, _ = build("gemma3")
    assert family_of(model).softcap(model.config) is None
    model.config.text_config.final_logit_softcapping = 30.0
    assert family_of(model).softcap(model.config) == 30.0


@pytest.mark.parametrize("most", [1, 2, 9])
def test_tile_grid__too_many_patches__shrunk(most: int) -> None:
    model, processor = build("llava_onevision")
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = f"anyres_max_{most}"
    batch = collated(processor, make_samples(1, seed=5, size=112))
    found = family_of(model).visual_tokens(model.config, batch)
    assert found.index.tolist() == replaced(model, batch).flatten().nonzero().squeeze(1).tolist()
    assert sum(found.sizes) == 16 + {1: 16, 2: 25, 9: 64}[most]
