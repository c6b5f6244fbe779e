"""A checkpoint is loaded whole or refused by what does not fit, before any weight is in memory where its headers show it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from grace_plugin.vlm.checkpoint_files import excerpt, tensors_of
from grace_plugin.vlm.loading import check_checkpoint, check_finite, check_model, load_model
from tests.pairs import Pair
from tests.tiny import build, save

Weights = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.1."
ONE = "language_model.model.layers.0.mlp.gate_proj.weight"


def copied(source: Path, path: Path, change: Callable[[Weights], Weights] | None = None, **config: Any) -> str:
    """A copy of a checkpoint with other weights or config values (`text_config` values are merged)."""
    shutil.copytree(source, path)
    if change is not None:
        save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    for key, value in config.items():
        written[key] = written[key] | value if key == "text_config" else value
    (path / "config.json").write_text(json.dumps(written))
    return str(path)


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def with_extra(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(4)}


PARTIAL: dict[str, tuple[Any, dict[str, Any], str]] = {
    "head": (without("lm_head"), {}, r"1 weight\(s\) are missing \(lm_head\.weight\)\. The output head was not saved"),
    "layer": (without(LAYER), {}, r"9 weight\(s\) are missing \(.*layers\.1\.input_layernorm\.weight, .*\.\.\.\)"),
    "projector": (without("multi_modal_projector"), {}, r"4 weight\(s\) are missing .*A file or a part .* was lost"),
    "wrapper": (
        lambda weights: {f"base_model.model.{name}": value for name, value in weights.items()}, {},
        r"89 weight\(s\) are missing .*; 89 key\(s\) are left over \(base_model\.model\..*merge_and_unload\(\)",
    ),
    "adapter": (
        with_extra("language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"), {},
        r"1 key\(s\) are left over .*An adapter was saved with the weights: call merge_and_unload",
    ),
    "extra": (with_extra("mtp.layers.0.weight"), {}, r"1 key\(s\) are left over \(mtp\.layers\.0\.weight\)"),
    "packed": (with_extra(ONE + "_scale"), {}, r"config\.json does not say how \(quantization_config\)"),
    "more layers asked": (None, {"text_config": {"num_hidden_layers": 4}}, r"9 weight\(s\) are missing .*layers\.3"),
    "fewer layers asked": (None, {"text_config": {"num_hidden_layers": 2}}, r"9 key\(s\) are left over .*smaller or another"),
    "vocabulary": (None, {"text_config": {"vocab_size": 512}}, r"2 weight\(s\) have another shape \(lm_head\.weight is"),
    "half a weight": (
        lambda weights: weights | {ONE: weights[ONE][:, :128].clone()}, {},
        r"gate_proj\.weight is \(384, 128\), the config asks for \(384, 256\)",
    ),
    "codes": (lambda weights: weights | {ONE: weights[ONE].to(torch.int8)}, {}, r"stores 1 tensor\(s\) as I8 .*gate_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTIAL)
def test_load_model__weights_that_do_not_fit__refused_by_key(llava: Pair, tmp_path: Path, name: str) -> None:
    change, config, message = PARTIAL[name]
    folder = copied(llava.student, tmp_path / "m", change, **config)
    for role in ("student", "teacher"):
        with pytest.raises(ValueError, match=message) as caught:
            check_checkpoint(folder, role)
        assert role in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        load_model(folder, "student")


def test_loading_info__headers_unreadable_for_it__decides_alone(llava: Pair, tmp_path: Path) -> None:
    """Weights in torch's own format have no header to check; the loading info refuses them as they are loaded."""
    folder = tmp_path / "m"
    copied(llava.student, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(without("lm_head")(weights), folder / "pytorch_model.bin")
    check_checkpoint(str(folder), "student")
    with pytest.raises(
        ValueError, match=r"cannot load the student .* whole: 1 weight\(s\) are missing \(lm_head\.weight\)"
    ):
        load_model(str(folder), "student")
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(load_model(str(folder), "student").lm_head.weight, weights["language_model.lm_head.weight"])


@pytest.mark.parametrize(
    "extra",
    ["language_model.model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.vision_model.embeddings.position_ids",
     "vision_tower.vision_model.norm.num_batches_tracked"],
)  # fmt: skip
def test_load_model__harmless_leftover__loads(llava: Pair, tmp_path: Path, extra: str) -> None:
    folder = copied(llava.student, tmp_path / "m", with_extra(extra))
    assert torch.equal(
        load_model(folder, "student").lm_head.weight, load_model(str(llava.student), "student").lm_head.weight
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "internvl", "gemma3"])
def test_load_model__tied_fused_or_renamed_weights__loads(family: str, tmp_path: Path) -> None:
    """Tied embeddings are not missing, and what a class converts as it reads (fused experts, renamed towers) fits."""
    model, processor = build(family)
    save(model, processor, tmp_path)
    state = torch.get_rng_state()
    loaded = load_model(str(tmp_path), "student")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def sharded(llava: Pair, path: Path) -> Path:
    copied(llava.student, path)
    (path / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_pretrained(llava.student, dtype="auto").save_pretrained(
        path, max_shard_size="400KB"
    )
    assert tensors_of(path, "student") is not None
    return path


def test_tensors_of__shard_missing_or_short__one_sentence(llava: Pair, tmp_path: Path) -> None:
    folder = sharded(llava, tmp_path / "m")
    shards = sorted(folder.glob("model-*.safetensors"))
    content = shards[0].read_bytes()
    shards[0].unlink()
    with pytest.raises(
        ValueError, match=rf"lacks 1 of {len(shards)} weights files \({shards[0].name}\).*incomplete; fetch"
    ):
        check_checkpoint(str(folder), "teacher")
    check_checkpoint(str(folder), "teacher", kind="cached")  # needs the file of its head alone
    for held, reason in (
        (content[: len(content) // 2], "incomplete metadata"),
        (b"", "header too small"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer.*run git lfs pull"),
    ):
        shards[0].write_bytes(held)
        with pytest.raises(
            ValueError, match=rf"cannot read .*{shards[0].name} of the teacher: .*{reason}.*fetch or save it again"
        ):
            check_checkpoint(str(folder), "teacher")
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(
        ValueError, match=rf"{shards[0].name} lacks \d+ tensor\(s\) that model\.safetensors\.index\.json names"
    ):
        check_checkpoint(str(folder), "teacher")
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*index\.json of the teacher: it holds no weight_map"):
        check_checkpoint(str(folder), "teacher")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"the folder has no config\.json"),
        ("{", "JSON"),
        ('{"model_type": "no_such_model"}', "no_such_model"),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', r"family 'llama' \(LlamaForCausalLM\) is not known"),
        ('{"model_type": "llava", "text_config": {"num_hidden_layers": "three"}}', "num_hidden_layers"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', "cannot load the student"),
    ],
)  # fmt: skip
def test_check_checkpoint__config_missing_or_broken__one_sentence(
    llava: Pair, tmp_path: Path, content: str | None, message: str
) -> None:
    folder = Path(copied(llava.student, tmp_path / "m"))
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        check_checkpoint(str(folder), "student")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        r"modelopt \(FP8\).*scales transformers would leave out",
    ),
    "awq": ({"quant_method": "awq", "bits": 4}, r"awq.*package gptqmodel.*not installed"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"gptq.*package gptqmodel.*not installed"),
    "hqq": ({"quant_method": "hqq"}, r"hqq.*take the BF16 checkpoint"),
    "unnamed": ({"bits": 4}, r"unknown \(no quant_method\)"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_check_checkpoint__quantized__refused_by_method(llava: Pair, tmp_path: Path, name: str) -> None:
    quantization, message = QUANTIZED[name]
    folder = copied(llava.student, tmp_path / "m", quantization_config=quantization)
    for kind in ("resident", "cached", "offload"):
        with pytest.raises(ValueError, match=message):
            check_checkpoint(folder, "teacher", kind=kind)
    with pytest.raises(ValueError, match=r"the student .* is quantized with .*trains from unquantized weights"):
        check_checkpoint(folder, "student")


def test_check_checkpoint__quantization_of_the_decoder_or_of_modelopt__found(llava: Pair, tmp_path: Path) -> None:
    nested = copied(llava.student, tmp_path / "a", text_config={"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ValueError, match=r"the student .* is quantized with fp8"):
        check_checkpoint(nested, "student")
    beside = copied(llava.student, tmp_path / "b")
    (Path(beside) / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(ValueError, match=r"quantized with modelopt \(NVFP4\) \(says hf_quant_config\.json\)"):
        check_checkpoint(beside, "teacher")


def test_check_checkpoint__adapter_in_the_folder__refused(llava: Pair, tmp_path: Path) -> None:
    folder = Path(copied(llava.student, tmp_path / "m"))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')
    for role in ("student", "teacher"):
        with pytest.raises(
            ValueError, match=rf"the {role} .*adapter_config\.json next to its weights.*some/base.*remove"
        ):
            check_checkpoint(str(folder), role)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"is a PEFT adapter of some/base, not a model.*merge_and_unload"):
        check_checkpoint(str(folder), "student")


class Wrapped(nn.Module):
    """A linear as peft leaves it in a model: the layer itself, and an adapter of two matrices."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})


def test_check_model__adapter_marks__refused() -> None:
    model, _ = build("llava")
    check_model(model, "student")
    layer: Any = model.model.language_model.layers[0].self_attn
    layer.q_proj = Wrapped(layer.q_proj)
    with pytest.raises(
        ValueError, match=r"PEFT adapter \(for instance at .*layers\.0\.self_attn\.q_proj\).*merge_and_unload\(\)"
    ):
        check_model(model, "student")
    layer.q_proj = layer.q_proj.base_layer
    check_model(model, "teacher")
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="the teacher carries a PEFT adapter"):
        check_model(model, "teacher")


def test_check_model__weights_elsewhere__refused() -> None:
    with torch.device("meta"):
        model = type(build("llava")[0])(build("llava")[0].config)
    with pytest.raises(ValueError, match=r"weight\(s\) of the student are not in memory .*device_map"):
        check_model(model, "student")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_check_finite__one_value_of_many__named_and_counted(dtype: torch.dtype) -> None:
    weights = {
        "codes": torch.ones(3, dtype=torch.int8),
        "empty": torch.zeros(0),
        "plain": torch.linspace(-3, 3, 9).to(dtype),
    }
    check_finite(weights, "student")
    for value in (float("nan"),) if dtype == torch.float8_e4m3fn else (float("nan"), float("inf"), float("-inf")):
        bad = torch.linspace(-3, 3, 10)
        bad[7] = bad[2] = value
        with pytest.raises(
            ValueError, match=r"1 weight\(s\) of the student hold NaN or infinity \(bad: 2 of 10 values\)"
        ):
            check_finite(weights | {"bad": bad.to(dtype)}, "student")


def test_excerpt__long_or_broken_value__one_short_line() -> None:
    assert excerpt("a\n  b") == "a b"
    assert excerpt("x" * 500) == "x" * 200 + "..."
