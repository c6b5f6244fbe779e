"""The facts about upstream that the code relies on still hold; `test_upstream_attributes.py` checks the names.

When a fact has changed in our favour, the work-around named in the test can go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmcompressor
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, Trainer

from grace_plugin import upstream
from tests.pairs import Pair, pair, recipe_text
from tests.tiny import build


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair("llava", tmp_path_factory.mktemp("pair"))


def loaded(pair: Pair) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pair.student, dtype="auto")


def test_the_factory_keeps_our_name_through_a_refresh() -> None:
    upstream.ModifierFactory.refresh()
    upstream.ModifierFactory.refresh()
    (modifier,) = upstream.Recipe.create_instance(recipe_text("t")).modifiers
    assert type(modifier).__name__ == "GraceModifier"


def test_a_plugins_pipeline_is_not_inferred_from_its_modifier() -> None:
    """Why on_finalize refuses a session that trained nothing."""
    from tests.pairs import modifier_of

    chosen = upstream.CalibrationPipeline.from_modifiers([modifier_of(recipe_text("t"))])
    assert "grace" not in type(chosen).__name__.lower()


def test_custom_pipelines_run_with_gradients(llava: Pair) -> None:
    seen: list[bool] = []

    class Probe(upstream.CalibrationPipeline):
        @staticmethod
        def __call__(model: nn.Module, dataloader: Any, dataset_args: Any) -> None:
            seen.append(torch.is_grad_enabled())

    upstream.CalibrationPipeline.register_value(Probe, "gradient_probe")
    recipe = "s_stage: {s_modifiers: {QuantizationModifier: {scheme: W4A16, targets: [Linear], ignore: ['re:.*']}}}"
    llmcompressor.oneshot(model=loaded(llava), recipe=recipe, dataset=DataLoader([{}]), pipeline="gradient_probe")
    assert seen == [True]


def initialized(model: nn.Module) -> nn.Linear:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = QuantizationModifier(scheme="W4A16", targets=["Linear"], ignore=["re:(?!.*layers.0.mlp.up_proj)"])
    modifier.initialize_quantization(model)
    modifier.start_calibration(model)
    return model.get_submodule("model.language_model.layers.0.mlp.up_proj")  # type: ignore[return-value]


def test_the_stock_fake_quantization_teaches_no_scale() -> None:
    """Why we attach a forward of our own: no gradient reaches weight_scale, and the weight's has no clip mask."""
    model, _ = build("llava")
    layer = initialized(model)
    assert not layer.weight_scale.requires_grad
    layer.weight_scale.data.fill_(1e-3)
    layer(torch.randn(2, layer.in_features)).sum().backward()
    assert layer.weight_scale.grad is None


def test_schemes_stand_on_layers_with_a_scale_in_the_weights_dtype() -> None:
    model, _ = build("llava")
    layer = initialized(model.to(torch.bfloat16))
    assert layer.weight_scale.dtype == torch.bfloat16
    assert layer.weight_scale.shape == (layer.out_features, layer.in_features // 128)
    assert layer.quantization_scheme.weights.num_bits == 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codes_unpack_to_themselves(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (8, 64), dtype=torch.int8)
    packed = pack_to_int32(codes, bits)
    assert packed.dtype == torch.int32
    assert torch.equal(upstream.unpack_from_int32(packed, bits, codes.shape), codes)


def test_the_trainer_still_has_the_hooks_we_override() -> None:
    for name in ("get_batch_samples", "compute_loss", "create_optimizer", "_clip_grad_norm", "_get_grad_norm", "_save",
                 "_load_from_checkpoint", "get_train_dataloader", "log"):  # fmt: skip
        assert callable(getattr(Trainer, name, None)), f"transformers.Trainer.{name} is gone; GraceTrainer overrides it"


def test_upstreams_ignore_list_does_not_load_back_for_llava(llava: Pair, tmp_path: Path) -> None:
    """Why rewrite_ignore exists: upstream's own checkpoint of the same student loses its tower on reload."""
    recipe = (
        "s_stage: {s_modifiers: {QuantizationModifier: {scheme: W4A16, targets: [Linear], "
        "ignore: ['re:.*vision_tower.*', 're:.*multi_modal_projector.*', 're:.*lm_head']}}}"
    )
    model = loaded(llava)
    llmcompressor.oneshot(model=model, recipe=recipe)
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    assert loads_tower_packed(tmp_path / "out"), "upstream's ignore list maps back: rewrite_ignore can go"


def loads_tower_packed(folder: Path) -> bool:
    """Whether transformers takes the vision tower for quantized, or cannot load the checkpoint because of it."""
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (RuntimeError, ValueError, KeyError, AttributeError):
        return True
    packed = [name for name, module in model.named_modules() if hasattr(module, "weight_packed")]
    return bool(report["missing_keys"]) or any("vision_tower" in name for name in packed)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_rotary_buffers_are_float32_and_stay_so_when_parameters_are_cast(family: str) -> None:
    model, _ = build(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    rotary = {n: b.dtype for n, b in model.named_buffers() if "inv_freq" in n}
    assert rotary and set(rotary.values()) == {torch.float32}
