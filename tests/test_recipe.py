"""Every default of the recipe is the method's decision, unknown keys are refused, and a saved recipe is the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from grace_plugin import recipe as blocks
from grace_plugin.recipe import ControllerRecipe
from grace_plugin.run.inputs import check_modifiers, grace_modifier, read_recipe
from grace_plugin.upstream import ModifierFactory, Recipe
from tests.conftest import Finished
from tests.pairs import modifier_of, recipe_text


def asked(modifier: Any) -> dict[str, Any]:
    """All that a recipe asks for."""
    return modifier.model_dump(exclude={"index", "initialized_", "finalized_", "started_", "ended_"})


METHOD = {
    "distill": {"enabled": True, "temperature": 2.0, "alpha": 1.0, "beta": 4.0, "gate_sharpness": 1.0},
    "relational": {"enabled": True, "weight": 3.0, "warmup_steps": 400, "warmup_share": 0.05},
    "controller": {
        "enabled": False, "beta_min": 0.1, "beta_max": 1.0, "beta_start": 0.5, "ema_decay": 0.99, "tau": 3.0, "eta": 0.003,
    },
    "scales": {"learning_rate_multiplier": 10.0, "candidates": 20, "search_low": 0.3, "search_high": 1.2},
}  # fmt: skip
BLOCKS = ("teacher", "distill", "relational", "controller", "scales", "training", "oneshot")


@pytest.mark.parametrize("block", METHOD)
def test_defaults__no_block_given__the_methods(block: str) -> None:
    found = getattr(modifier_of(recipe_text("teacher")), block).model_dump()
    assert {key: found[key] for key in METHOD[block]} == METHOD[block]


def test_scheme__w4a16__four_bit_symmetric_groups_of_128() -> None:
    modifier = modifier_of(recipe_text("teacher"))
    (scheme,) = modifier.resolved_config.config_groups.values()
    weights = scheme.weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 128, True)
    assert scheme.input_activations is None


@pytest.mark.parametrize("block", BLOCKS)
def test_recipe__unknown_key_in_a_block__refused_by_name(block: str) -> None:
    given = {"model": "t", "temprature": 1} if block == "teacher" else {"temprature": 1}
    known = ", ".join(type(getattr(modifier_of(recipe_text("t")), block)).model_fields)
    nearest = "did you mean 'temperature'? " if block == "distill" else ""
    with pytest.raises(ValueError, match="unknown key 'temprature'") as refused:
        read_recipe(recipe_text("t", **{block: given}))
    assert str(refused.value) == f"unknown key 'temprature' in {block}; {nearest}known: {known}"


def test_recipe__unknown_key_at_the_top__refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown key 'distil'") as refused:
        read_recipe(recipe_text("t", distil={"temperature": 2.0}))
    said = str(refused.value)
    assert said.startswith("unknown key 'distil' in GraceModifier; did you mean 'distill'? known: ")
    assert "\n" not in said and "initialized_" not in said and "scheme" in said


def test_unknown_key_at_the_top__only_keys_that_are_accepted_are_listed() -> None:
    with pytest.raises(ValueError, match="unknown key 'strt'") as refused:
        read_recipe(recipe_text("t", strt=0))
    listed = str(refused.value).split("known: ")[1].split(", ")
    assert "did you mean" not in str(refused.value) and {"scheme", "config_groups", "targets", "teacher"} <= set(listed)
    values = {"start": 0.0, "end": 1.0, "update": 1.0, "kv_cache_scheme": {}, "observer": {}, "weight_observer": "minmax",
              "input_observer": "minmax", "output_observer": "minmax"}  # fmt: skip
    for name, value in values.items():
        with pytest.raises(ValueError, match=name):
            read_recipe(recipe_text("t", **{name: value}))
        assert name not in listed


def test_recipe__dtype_inferred__written_back(finished: Finished) -> None:
    saved = yaml.safe_load((finished.folder / "recipe.yaml").read_text())
    (stage,) = [value for key, value in saved.items() if key.endswith("_stage")]
    (group,) = [value for key, value in stage.items() if key.endswith("_modifiers")]
    assert group["GraceModifier"]["scales"]["stored_dtype"] == "bfloat16"


def test_blocks__assignment__refused() -> None:
    block = blocks.DistillRecipe()
    with pytest.raises(ValidationError, match=r"frozen"):
        block.temperature = 3.0  # type: ignore[misc]
    assert block.temperature == 2.0


@pytest.mark.parametrize(
    ("block", "values", "message"),
    [
        ("distill", {"alpha": 4.0, "beta": 4.0}, "distill.beta .4.0. must exceed distill.alpha"),
        ("distill", {"temperature": 0.0}, "greater than 0"),
        ("distill", {"chunk": 0}, "greater than or equal to 1"),
        ("distill", {"temperature": float("inf")}, "finite number"),
        ("controller", {"enabled": True, "beta_start": 1.5}, "beta_start .1.5. must lie in"),
        ("controller", {"enabled": True, "beta_start": 0.05}, "beta_start .0.05. must lie in"),
        ("controller", {"ema_decay": 1.0}, "less than 1"),
        ("controller", {"enabled": True, "tau": "automatic"}, "controller.tau must be a number, got 'automatic'"),
        ("controller", {"enabled": True, "tau": "auto"}, "controller.tau must be a number; 'auto' was removed"),
        ("controller", {"tau": 0.7}, "controller.tau has an effect with controller.enabled: true alone"),
        ("controller", {"beta_max": 2.0, "eta": 0.1}, "drop beta_max, eta for the constant weight beta_start"),
        ("scales", {"search_low": 1.2}, "search_low .1.2. must be below"),
        ("scales", {"candidates": 1}, "greater than or equal to 2"),
        ("scales", {"stored_dtype": "float32"}, "bfloat16"),
        ("training", {"max_nonfinite_steps": -1}, "greater than or equal to 0"),
        ("training", {"master_weights": "bfloat16"}, "float32"),
        ("training", {"method": "adapter"}, "scales"),
        ("training", {"lora": {}}, "training.lora is given but training.method is 'full'"),
        ("training", {"method": "scales", "lora": {"rank": 8}}, "training.method is 'scales'"),
        (
            "training",
            {"method": "lora", "lora": {"r": 8}},
            "unknown key 'r' in training.lora; known: rank, alpha, targets, seed",
        ),
        ("training", {"method": "lora", "lora": {"rank": 0}}, "greater than or equal to 1"),
        ("training", {"method": "lora", "lora": {"alpha": 0}}, "greater than 0"),
        ("relational", {"weight": -1.0}, "greater than or equal to 0"),
        ("oneshot", {"epochs": 0}, "greater than 0"),
    ],
)
def test_recipe__value_out_of_range__refused(block: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe_text("t", **{block: values}))


@pytest.mark.parametrize(
    ("block", "values"),
    [
        ("controller", {"beta_start": 4.0}),
        ("controller", {"enabled": True, "beta_start": 0.1}),
        ("controller", {"enabled": True, "beta_start": 1.0}),
        ("controller", {"enabled": True, "tau": 0.7, "eta": 1e-3}),
    ],
)
def test_recipe__value_at_a_bound__taken(block: str, values: dict[str, float]) -> None:
    found = getattr(modifier_of(recipe_text("t", **{block: values})), block)
    assert {key: getattr(found, key) for key in values} == values


def test_training__lora__default_block_written_in() -> None:
    assert blocks.TrainingRecipe().model_dump() | {"freeze": []} == {
        "method": "full", "norms": False, "lora": None, "freeze": [], "master_weights": "float32", "max_nonfinite_steps": 10,
    }  # fmt: skip
    written = modifier_of(recipe_text("t", training={"method": "lora"})).model_dump()["training"]["lora"]
    assert written == {"rank": 16, "alpha": 32.0, "targets": [], "seed": 0}


def test_training__scales_without_quantization__refused() -> None:
    with pytest.raises(ValueError, match=r"training\.method 'scales' learns scales; it needs quantize: true"):
        read_recipe(recipe_text("t", scheme=None, quantize=False, training={"method": "scales"}))


def test_read_recipe__path_text_and_modifier__same_recipe(tmp_path: Path) -> None:
    text = recipe_text("t", distill={"temperature": 3.0})
    file = tmp_path / "r.yaml"
    file.write_text(text)
    by_text, by_path, by_string = (grace_modifier(read_recipe(r)) for r in (text, file, str(file)))
    by_modifier = grace_modifier(read_recipe(modifier_of(text)))
    assert asked(by_text) == asked(by_path) == asked(by_string) == asked(by_modifier)
    assert asked(by_text) != asked(modifier_of(recipe_text("t", distill={"temperature": 2.5})))


def test_upstream_reader__grace_modifier__resolved() -> None:
    modifiers = Recipe.create_instance(recipe_text("t")).modifiers
    assert [type(m).__name__ for m in modifiers] == ["GraceModifier"]


def test_registration__twice__same_result() -> None:
    import importlib

    import grace_plugin
    from grace_plugin.upstream import CalibrationPipeline

    before = grace_plugin.GraceModifier
    importlib.reload(grace_plugin)
    grace_plugin.run.pipeline.register_pipeline()
    assert grace_plugin.GraceModifier is before
    assert CalibrationPipeline.registered_names().count("grace") == 1
    ModifierFactory.refresh()
    assert [type(m).__name__ for m in Recipe.create_instance(recipe_text("t")).modifiers] == ["GraceModifier"]


def test_read_recipe__missing_file__named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe at .*missing.yaml"):
        read_recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize("names", [["QuantizationModifier"], ["GraceModifier", "GraceModifier"]])
def test_read_recipe__none_or_two_grace_modifiers__refused(names: list[str]) -> None:
    stages = {f"s{i}_stage": {"s_modifiers": {name: {"scheme": "W4A16"}}} for i, name in enumerate(names)}
    message = rf"holds {names.count('GraceModifier')} GraceModifier.*{names[0]}.*needs exactly one"
    with pytest.raises(ValueError, match=message):
        read_recipe(yaml.safe_dump(stages))


LANGUAGE = r"re:.*language_model.*proj$"
ALONGSIDE: dict[str, dict[str, object]] = {
    "QuantizationModifier": {"scheme": "W8A16", "targets": ["re:.*multi_modal_projector.*"]},
    "GPTQModifier": {"scheme": "W4A16", "targets": ["Linear"]},
    "SmoothQuantModifier": {},
    "QuIPModifier": {},
    "SparseGPTModifier": {"sparsity": 0.5, "targets": [LANGUAGE]},
    "WandaPruningModifier": {"sparsity": 0.5, "targets": [LANGUAGE]},
    "MagnitudePruningModifier": {
        "init_sparsity": 0.0,
        "final_sparsity": 0.5,
        "start": 0.0,
        "end": 1.0,
        "targets": [LANGUAGE],
    },
}


def with_modifier(name: str, arguments: dict[str, object], *, first: bool) -> str:
    both: list[tuple[str, dict[str, object]]] = [("GraceModifier", {"scheme": "W4A16"}), (name, arguments)]
    return yaml.safe_dump({"s_stage": {"s_modifiers": dict(reversed(both) if first else both)}}, sort_keys=False)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ALONGSIDE)
def test_read_recipe__another_modifier_of_upstream__refused_by_name(name: str, first: bool) -> None:
    with pytest.raises(ValueError, match=rf"GraceModifier and {name} cannot be in one recipe: GRACE quantizes alone"):
        read_recipe(with_modifier(name, ALONGSIDE[name], first=first))


def test_read_recipe__constant_pruning__trains_alongside_but_not_in_oneshot() -> None:
    """Its masks follow the events of training steps, which `oneshot` gives to GRACE alone."""
    read = read_recipe(with_modifier("ConstantPruningModifier", {"targets": [LANGUAGE], "start": 0.0}, first=True))
    with pytest.raises(ValueError, match="GraceModifier and ConstantPruningModifier cannot be in one recipe"):
        check_modifiers(read, oneshot=True)


def test_teacher__plain_name__is_the_model() -> None:
    text = yaml.safe_dump({"s_stage": {"s_modifiers": {"GraceModifier": {"scheme": "W4A16", "teacher": "some/where"}}}})
    assert modifier_of(text).teacher == blocks.TeacherRecipe(model="some/where")


def test_saved_recipe__read_again__same_recipe() -> None:
    modifier = modifier_of(
        recipe_text("t", distill={"temperature": 3.0}, training={"freeze": ["re:.*mlp.*"], "method": "lora"})
    )
    text = Recipe.from_modifiers(modifier).yaml()
    assert "!!python" not in text
    assert asked(modifier_of(text)) == asked(modifier)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"kind": "cached", "model": "t"}, "cached needs teacher.cache, the folder that `grace teacher cache` wrote"),
        ({"cache": "c", "model": "t"}, "teacher.cache is read by kind: cached alone, not by resident"),
        ({"kind": "self", "model": "t"}, "self takes the student's own weights and cannot take teacher.model"),
        ({"kind": "elsewhere"}, "'resident', 'offload', 'cached' or 'self'"),
        ({"kind": "cached", "cahce": "c"}, "cahce"),
    ],
)
def test_teacher__contradicting_keys__refused(block: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        blocks.TeacherRecipe(**block)  # type: ignore[arg-type]
    assert told in str(refused.value)


def test_teacher__no_kind__resident() -> None:
    assert blocks.TeacherRecipe().model_dump() == {
        "kind": "resident", "model": None, "revision": "main", "dtype": "auto", "cache": None, "check_cache": True,
    }  # fmt: skip


def test_preset_paper__alone__published_constants() -> None:
    modifier = modifier_of(recipe_text("t", preset="paper"))
    assert modifier.controller == ControllerRecipe(enabled=True, tau=3.0, eta=0.003)
    assert modifier.distill.gate_sharpness == 1.0
    assert modifier.relational.weight == 3.0


def test_preset_paper__with_own_keys__own_keys_win() -> None:
    modifier = modifier_of(recipe_text("t", preset="paper", controller={"tau": 0.35}, relational={"weight": 10.0}))
    assert (modifier.controller.enabled, modifier.controller.tau, modifier.controller.eta) == (True, 0.35, 0.003)
    assert (modifier.relational.weight, modifier.relational.warmup_steps) == (10.0, 400)


def test_preset__saved_and_read_again__same_recipe() -> None:
    modifier = modifier_of(recipe_text("t", preset="paper", controller={"enabled": False}))
    again = type(modifier)(**asked(modifier))
    assert asked(again) == asked(modifier)
    assert not again.controller.enabled


def test_preset__unknown__refused_by_name() -> None:
    with pytest.raises(ValueError, match="preset 'papers' is unknown; known: paper"):
        read_recipe(recipe_text("t", preset="papers"))


def test_copy__list_changed_in_place_and_preset_overridden__kept() -> None:
    modifier = modifier_of(recipe_text("t", preset="paper"))
    modifier.ignore.append("re:.*lm_head")
    modifier.controller = ControllerRecipe(beta_start=0.7)
    copy = modifier.copied()
    assert "re:.*lm_head" in copy.ignore
    assert copy.controller == ControllerRecipe(beta_start=0.7)
    assert asked(copy) == asked(modifier)


def test_preset__not_a_name__refused() -> None:
    with pytest.raises(ValueError, match="preset"):
        read_recipe(recipe_text("t", preset=["paper"]))
