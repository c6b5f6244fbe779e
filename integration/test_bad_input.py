"""Bad input through `grace_plugin.train`: an error that names the offender and the way out, and nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import grace_plugin
from grace_plugin.upstream import active_session
from tests.pairs import Pair, pair, recipe_text, run
from tests.tiny import build, make_samples, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def llava(folder: Path) -> Pair:
    return pair("llava", folder / "pair")


def refused(pair: Pair, out: Path, message: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """The run is refused with this sentence; neither the checkpoint nor a half one nor a session is left."""
    with pytest.raises(error, match=message):
        run(pair, out, **options)
    left = [path.name for path in out.parent.iterdir()] if out.parent.exists() else []
    assert left == []
    assert not active_session().lifecycle.initialized_


def test_an_unknown_recipe_key(llava: Pair, tmp_path: Path) -> None:
    message = "^unknown key 'temperture' in distill; did you mean 'temperature'\\? known: enabled, temperature, alpha"
    refused(llava, tmp_path / "o/out", message, recipe=recipe_text(llava.teacher, distill={"temperture": 2.0}))
    refused(llava, tmp_path / "o/out", "^unknown key 'qantize' in GraceModifier; did you mean 'quantize'\\? known: ",
            recipe=recipe_text(llava.teacher, qantize=False))  # fmt: skip


def test_a_scheme_that_is_not_learned(llava: Pair, tmp_path: Path) -> None:
    refused(llava, tmp_path / "o/out", "use scheme: W4A16", recipe=recipe_text(llava.teacher, scheme="W8A8"))


def test_a_width_the_group_does_not_divide_lists_every_layer(folder: Path, tmp_path: Path) -> None:
    """Groups of 192 divide neither the width 256 (q, k, v, o, gate, up) nor 384 times an odd number."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 192}
    given = (
        pair("llava", folder / "narrow")
        if not (folder / "narrow").exists()
        else Pair("llava", folder / "narrow/student", folder / "narrow/teacher")
    )
    model = AutoModelForImageTextToText.from_pretrained(given.student, dtype=torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    recipe = recipe_text(given.teacher, scheme=None, config_groups={"g": {"targets": ["Linear"], "weights": weights}})
    with pytest.raises(ValueError, match="18 problem") as caught:
        grace_plugin.train(
            model, recipe=recipe, dataset=make_samples(2), output_dir=tmp_path / "o/out", max_steps=1, use_cpu=True
        )
    for layer in range(3):
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            assert f"layers.{layer}.{name}: input width 256 is not divisible by group_size 192" in str(caught.value)
        assert f"layers.{layer}.mlp.down_proj" not in str(caught.value)
    assert "To fix: choose another group_size" in str(caught.value)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)
    assert not (tmp_path / "o").exists()


def test_another_tokenizer(llava: Pair, tmp_path: Path) -> None:
    save(*build("llava", seed=1, words="other"), tmp_path / "t")
    refused(llava, tmp_path / "o/out", "teacher and student tokenizers differ on", recipe=recipe_text(tmp_path / "t"))


def test_another_patch_geometry(llava: Pair, tmp_path: Path) -> None:
    model, processor = build("llava", seed=1)
    save(model, processor, tmp_path / "t")
    config = tmp_path / "t" / "config.json"
    text = config.read_text()
    assert '"vision_feature_select_strategy": "default"' in text
    config.write_text(
        text.replace('"vision_feature_select_strategy": "default"', '"vision_feature_select_strategy": "full"')
    )
    refused(llava, tmp_path / "o/out", "see images differently.*'default' / 'full'", recipe=recipe_text(tmp_path / "t"))


def test_another_image_size_beside_the_teacher(llava: Pair, tmp_path: Path) -> None:
    model, processor = build("llava", seed=1)
    processor.image_processor.size = {"shortest_edge": 112}
    save(model, processor, tmp_path / "t")
    message = r"different image settings .*size: \{'shortest_edge': 56\} / \{'shortest_edge': 112\}"
    refused(llava, tmp_path / "o/out", message, recipe=recipe_text(tmp_path / "t"))


def test_no_teacher(llava: Pair, tmp_path: Path) -> None:
    refused(llava, tmp_path / "o/out", "none was given: set teacher.model in the recipe", recipe=recipe_text(None))


def test_a_teacher_that_is_not_there(llava: Pair, tmp_path: Path) -> None:
    refused(llava, tmp_path / "o/out", "cannot load the teacher '/no/where'", recipe=recipe_text("/no/where"))


def test_a_student_that_is_not_there(llava: Pair, tmp_path: Path) -> None:
    refused(llava, tmp_path / "o/out", "cannot load the student '/no/where'", model="/no/where")


@pytest.mark.parametrize(
    ("images", "message"),
    [(1, r"sample 3 has 1 image placeholder\(s\) and 0"), (0, r"sample 3 has 0 image placeholder\(s\) and 1")],
)
def test_a_sample_whose_images_do_not_match(llava: Pair, tmp_path: Path, images: int, message: str) -> None:
    sample = make_samples(1, images=images)[0]
    sample["images"] = [] if images else make_samples(1)[0]["images"]
    refused(llava, tmp_path / "o/out", message, dataset=[*make_samples(3), sample])


def test_no_samples(llava: Pair, tmp_path: Path) -> None:
    refused(llava, tmp_path / "o/out", "the dataset has no samples", dataset=[])


def test_a_missing_picture(llava: Pair, tmp_path: Path) -> None:
    sample = {**make_samples(1)[0], "images": ["/no/picture.png"]}
    refused(llava, tmp_path / "o/out", "cannot read image '/no/picture.png'", dataset=[sample, *make_samples(1)])


def test_truncation_that_would_cut_image_tokens(llava: Pair, tmp_path: Path) -> None:
    refused(llava, tmp_path / "o/out", r"tokens and max_length is 20; .*Raise max_length", max_length=20)


def test_an_argument_nobody_knows(llava: Pair, tmp_path: Path) -> None:
    refused(
        llava, tmp_path / "o/out", "'learning_rte' is not an argument of .*did you mean learning_rate", learning_rte=1.0
    )


def test_an_unknown_family(llava: Pair, tmp_path: Path) -> None:
    model, processor = build("llava")
    save(model, processor, tmp_path / "s")
    model.name_or_path, model.config.model_type = str(tmp_path / "s"), "no_family"
    refused(
        llava,
        tmp_path / "o/out",
        r"'no_family'.*Pass a subclass of Family to register_family .* or as grace_plugin/vlm/no_family\.py",
        model=model,
    )


@pytest.mark.parametrize("kind", ["file in it", "is a file"])
def test_a_destination_that_is_not_empty_is_refused_before_a_model_is_loaded(
    llava: Pair, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    target = out if kind == "is a file" else out / "notes.txt"
    target.parent.mkdir(exist_ok=True)
    target.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out exists and is not empty; choose another output_dir"):
        run(llava, out, model="/no/where")
    assert target.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_destination_is_taken(llava: Pair, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run(llava, tmp_path / "out", max_steps=1).verification["verified"]


def test_a_run_after_a_refused_one_is_the_run_it_would_have_been(llava: Pair, tmp_path: Path) -> None:
    first = run(llava, tmp_path / "a")
    refused(llava, tmp_path / "o/out", "set teacher.model", recipe=recipe_text(None))
    shutil.rmtree(tmp_path / "o", ignore_errors=True)
    again = run(llava, tmp_path / "b")
    left, right = (result.checkpoint / "model.safetensors" for result in (first, again))
    assert left.read_bytes() == right.read_bytes()
