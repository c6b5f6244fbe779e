"""Students and teachers through whole runs: those that cannot be used leave nothing, the others give the right bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import grace_plugin
from grace_plugin.data import ConversationCollator
from grace_plugin.recipe import TeacherRecipe
from grace_plugin.run.inputs import load_processor, load_student
from grace_plugin.teacher import build_cache, load_teacher, open_teacher
from grace_plugin.upstream import oneshot as upstream_oneshot
from tests.conftest import Finished
from tests.pairs import Pair, mixed_samples, pair, recipe_text, run
from tests.teacher.caches import ask, same
from tests.tiny import make_samples

OFF = {"enabled": False}


def refused(made: Pair, out: Path, match: str, **options: Any) -> str:
    """`train` refuses and leaves no file; returns the message, one line."""
    with pytest.raises(ValueError, match=match) as caught:
        run(made, out / "checkpoint", **options)
    assert not out.exists() or not any(out.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_train__student_and_teacher_without_a_head__refused_before_samples_are_checked(
    llava: Pair, tmp_path: Path
) -> None:
    broken = shutil.copytree(llava.student, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "lm_head" not in k}, broken / "model.safetensors", {"format": "pt"})
    missing = r"1 weight\(s\) are missing \(lm_head\.weight\)"
    refused(llava._replace(student=broken), tmp_path / "a", rf"the student .*{missing}", dataset=[{}])
    refused(llava._replace(teacher=broken), tmp_path / "b", rf"the teacher .*{missing}", dataset=[{}])


def test_train__own_checkpoint_as_student__names_its_source(finished: Finished, tmp_path: Path) -> None:
    made = finished.pair._replace(student=finished.folder)
    said = refused(made, tmp_path / "o", "is a finished GRACE checkpoint, quantized with compressed-tensors")
    assert "train from the BF16 checkpoint that it was made of" in said
    loaded = AutoModelForImageTextToText.from_pretrained(finished.folder)
    refused(made, tmp_path / "o", "the student is quantized with compressed-tensors", model=loaded)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_train__weights_that_are_not_finite__named_before_a_step(llava: Pair, tmp_path: Path, value: float) -> None:
    broken = shutil.copytree(llava.student, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    named = r"hold NaN or infinity \(model\.language_model\.layers\.1\.mlp\.up_proj\.weight: 1 of 98304 values\)"
    refused(llava._replace(student=broken), tmp_path / "a", rf"1 weight\(s\) of the student {named}")
    refused(llava._replace(teacher=broken), tmp_path / "b", rf"1 weight\(s\) of the teacher {named}")


def test_load_student__loaded_from_a_partial_folder__warned(
    llava: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = shutil.copytree(llava.student, tmp_path / "broken")
    load_student(AutoModelForImageTextToText.from_pretrained(broken))
    assert not caplog.records
    weights = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "lm_head" not in k}, broken / "model.safetensors", {"format": "pt"})
    student = AutoModelForImageTextToText.from_pretrained(broken)
    caplog.clear()
    assert load_student(student) is student
    assert "its weights in memory are trained, but: " in caplog.text and "missing (lm_head.weight)" in caplog.text


# ---- quantized teachers -----------------------------------------------------------------------------------------------------


def as_fp8(teacher: Path, folder: Path) -> Path:
    """The teacher's decoder in FP8 with a scale for each block of 128 x 128, and next to it what it stands for, in BF16."""
    dense, written = {}, {}
    for name, weight in load_file(teacher / "model.safetensors").items():
        dense[name] = written[name] = weight
        if "layers" in name and name.endswith("proj.weight") and name.startswith("language_model"):
            blocks = weight.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            scales = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            written[name] = codes.flatten(2).flatten(0, 1)
            written[f"{name}_scale_inv"] = scales
            dense[name] = (codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1).bfloat16()
    for part, weights in (("fp8", written), ("dense", dense)):
        shutil.copytree(teacher, folder / part)
        save_file(
            {k: v.contiguous() for k, v in weights.items()}, folder / part / "model.safetensors", {"format": "pt"}
        )
    config = json.loads((teacher / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "vision_tower", "multi_modal_projector"],
    }  # fmt: skip
    (folder / "fp8" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def quantized(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers by method; "dense" holds the weights that the FP8 one stands for."""
    folder = as_fp8(finished.pair.teacher, tmp_path_factory.mktemp("quantized"))
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForImageTextToText.from_pretrained(
        finished.pair.teacher, quantization_config=asked, dtype="bfloat16"
    )
    shutil.copytree(finished.pair.teacher, folder / "nf4")
    model.save_pretrained(folder / "nf4")
    return {"int4": finished.folder, **{part: folder / part for part in ("fp8", "dense", "nf4")}}


def states(folder: Path, kind: str = "resident", dtype: str = "float32") -> Any:
    teacher = open_teacher(TeacherRecipe(model=str(folder), kind=kind, dtype=dtype), torch.nn.Module(), None, None)
    return ask(teacher, ConversationCollator(load_processor(str(folder)))(mixed_samples(4)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int4", "fp8"])
def test_open_teacher__quantized_weights__dense_and_alike_for_every_kind(
    quantized: dict[str, Path], method: str
) -> None:
    wanted = states(quantized[method])
    assert same(states(quantized[method], "offload"), wanted)
    if method == "fp8":
        assert same(states(quantized["dense"]), wanted)


def test_open_teacher__own_checkpoint__computes_with_the_saved_codes(finished: Finished) -> None:
    """float32 arithmetic over the BF16 values that the run saved: what the run's own model computes with."""
    model: Any = load_teacher(str(finished.folder), dtype="float32")
    frozen = AutoModelForImageTextToText.from_pretrained(finished.folder, dtype="auto")
    frozen(input_ids=torch.zeros(1, 1, dtype=torch.long))  # the first pass makes packed layers dense
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(names) > 20
    for name in names:
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.float32 and torch.equal(weight, frozen.get_submodule(name).weight.float())
        assert type(model.get_submodule(name)._parameters) is dict, "a trainer moves it, so it is held plainly"


@pytest.mark.slow
def test_open_teacher__nf4_offloaded__computes_with_the_dequantized_weights(quantized: dict[str, Path]) -> None:
    dense = AutoModelForImageTextToText.from_pretrained(quantized["nf4"], dtype="auto").dequantize().float()
    processor = load_processor(str(quantized["nf4"]))
    given = open_teacher(TeacherRecipe(dtype="float32"), torch.nn.Module(), dense, None)
    assert same(states(quantized["nf4"], "offload"), ask(given, ConversationCollator(processor)(mixed_samples(4))))
    resident = load_teacher(str(quantized["nf4"]))
    assert {p.dtype for p in resident.parameters()} == {torch.uint8, torch.bfloat16}, "resident, it stays small"


def test_open_teacher__quantized_model_passed__refused_where_it_cannot_be_streamed(finished: Finished) -> None:
    given = AutoModelForImageTextToText.from_pretrained(finished.folder)
    with pytest.raises(
        ValueError, match=r"passed is quantized with compressed-tensors.*pass its folder as teacher\.model"
    ):
        open_teacher(TeacherRecipe(kind="offload"), torch.nn.Module(), given, None)
    teacher = open_teacher(TeacherRecipe(), torch.nn.Module(), given, None)
    batch = ConversationCollator(load_processor(str(finished.folder)))(mixed_samples(4))
    assert same(ask(teacher, batch), states(finished.folder, dtype="auto"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resident", "offload", "cached"])
def test_train__int4_teacher__every_kind_ends_verified(
    quantized: dict[str, Path], llava: Pair, tmp_path: Path, kind: str
) -> None:
    block: dict[str, Any] = {"model": str(quantized["int4"]), "kind": kind}
    if kind == "cached":
        asked = TeacherRecipe(model=str(quantized["int4"]))
        build_cache(
            str(llava.student), teacher=asked, dataset=make_samples(4), output_dir=tmp_path / "cache", batch_size=2
        )
        block["cache"] = str(tmp_path / "cache")
    done = run(llava, tmp_path / "out", recipe=recipe_text(None, teacher=block), max_steps=1)
    assert done.verification["verified"]


@pytest.mark.slow
def test_train__nf4_teacher_resident__ends_verified(quantized: dict[str, Path], llava: Pair, tmp_path: Path) -> None:
    block = {"model": str(quantized["nf4"])}
    assert run(llava, tmp_path / "out", recipe=recipe_text(None, teacher=block), max_steps=1).verification["verified"]


@pytest.mark.parametrize("method", ["fp8", "nf4", "int4"])
def test_train__quantized_student__refused_by_method(
    quantized: dict[str, Path], llava: Pair, tmp_path: Path, method: str
) -> None:
    shown = {"fp8": "fp8", "nf4": "bitsandbytes", "int4": "compressed-tensors"}[method]
    refused(llava._replace(student=quantized[method]), tmp_path / "o", rf"the student .* quantized with {shown}")


def test_build_cache__head_quantized__refused(llava: Pair, tmp_path: Path) -> None:
    teacher = shutil.copytree(llava.teacher, tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    head = weights.pop("language_model.lm_head.weight")
    codes = {
        "weight_packed": torch.zeros(head.shape[0], head.shape[1] // 8, dtype=torch.int32),
        "weight_scale": head[:, :4],
    }
    weights |= {f"language_model.lm_head.{name}": part.contiguous() for name, part in codes.items()}
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    config = json.loads((teacher / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (teacher / "config.json").write_text(json.dumps(config))
    from grace_plugin.teacher.checkpoint import open_checkpoint

    with pytest.raises(ValueError, match=r"the head of the teacher .* is quantized .*teacher\.kind: resident"):
        open_checkpoint(str(teacher)).head("auto")


# ---- decoders of one layer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair("llava", tmp_path_factory.mktemp("shallow"), student={"layers": 1}, teacher={"layers": 1})


@pytest.mark.slow
def test_train__one_layer_without_relation__ends_verified(shallow: Pair, tmp_path: Path) -> None:
    recipe = recipe_text(shallow.teacher, relational=OFF)
    assert run(shallow, tmp_path / "a", recipe=recipe, max_steps=1).verification["verified"]
    asked = TeacherRecipe(model=str(shallow.teacher), dtype="float32")
    made = {"dataset": make_samples(4), "output_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match=r"the teacher's decoder has 1 layer\(s\)"):
        build_cache(str(shallow.student), teacher=asked, **made)  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()
    build_cache(str(shallow.student), teacher=asked, visual=False, **made)  # type: ignore[arg-type]
    block = {"model": str(shallow.teacher), "dtype": "float32", "kind": "cached", "cache": str(tmp_path / "cache")}
    done = run(shallow, tmp_path / "b", recipe=recipe_text(None, teacher=block, relational=OFF), max_steps=1)
    assert done.verification["verified"]


def test_train__one_layer_with_relation__refused_before_a_step(shallow: Pair, llava: Pair, tmp_path: Path) -> None:
    recipe = recipe_text(llava.teacher)
    refused(
        shallow, tmp_path / "a", r"the student's decoder has 1 layer\(s\); the relational term needs", recipe=recipe
    )
    refused(llava, tmp_path / "b", r"the teacher's decoder has 1 layer\(s\)", recipe=recipe_text(shallow.teacher))
    student = AutoModelForImageTextToText.from_pretrained(shallow.student)
    with (
        pytest.raises(ValueError, match="the student's decoder has 1 layer"),
        grace_plugin.grace_session(student, recipe, total_steps=1),
    ):
        pass


# ---- other modifiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_upstreams_oneshot__another_quantization_modifier__refused_before_a_step(
    llava: Pair, tmp_path: Path, first: bool
) -> None:
    """Upstream reads the recipe there; the other's schemes may be on the model before GRACE is asked."""
    both = yaml.safe_load(recipe_text(llava.teacher))["grace_stage"]["grace_modifiers"]
    both = {"QuantizationModifier": {"scheme": "W8A16", "targets": ["re:.*multi_modal_projector.*"]}, **both}
    both = both if first else dict(reversed(both.items()))
    recipe = yaml.safe_dump({"grace_stage": {"grace_modifiers": both}}, sort_keys=False)
    collator = ConversationCollator(load_processor(str(llava.student)))
    data: Any = DataLoader(make_samples(4), batch_size=2, collate_fn=collator)  # type: ignore[arg-type]
    student = AutoModelForImageTextToText.from_pretrained(llava.student)
    shown = (
        r"carry another modifier's quantization scheme" if first else r"QuantizationModifier cannot be in one recipe"
    )
    with pytest.raises(ValueError, match=shown):
        upstream_oneshot(
            model=student, recipe=recipe, dataset=data, pipeline="grace", output_dir=str(tmp_path / "o" / "out")
        )
    assert not any(hasattr(module, "weight_log_scale") for module in student.modules())
    assert not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match="GraceModifier and QuantizationModifier cannot be in one recipe"):
        grace_plugin.oneshot(llava.student, recipe=recipe, dataset=make_samples(4), output_dir=tmp_path / "o" / "out")


@pytest.mark.slow
def test_train__constant_pruning_alongside__zeros_stay_and_verify(llava: Pair, tmp_path: Path) -> None:
    sparse, layer = shutil.copytree(llava.student, tmp_path / "sparse"), "model.layers.0.mlp.gate_proj.weight"
    weights = load_file(sparse / "model.safetensors")
    weights[f"language_model.{layer}"][:, ::2] = 0
    save_file(weights, sparse / "model.safetensors", {"format": "pt"})
    recipe = yaml.safe_load(recipe_text(llava.teacher))
    pruning = {"targets": ["re:.*language_model.layers.0.mlp.gate_proj$"], "start": 0.0}
    recipe["grace_stage"]["grace_modifiers"]["ConstantPruningModifier"] = pruning
    made = llava._replace(student=sparse)
    done = run(made, tmp_path / "out", recipe=yaml.safe_dump(recipe), max_steps=2, learning_rate=1e-2)
    saved: Any = load_teacher(str(tmp_path / "out"))
    weight = saved.get_submodule("model.language_model.layers.0.mlp.gate_proj").weight
    assert done.verification["verified"]
    assert not weight[:, ::2].any() and float((weight[:, 1::2] != 0).float().mean()) > 0.5
