"""Loss terms: the registry, the recipe's `terms` block, named sums, and a term that lives outside the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from examples.custom_loss_term import RECIPE, FeatureRecipe, FeatureTerm
from grace_plugin.objective import LossTerm, register_term
from grace_plugin.objective.terms import TERMS
from grace_plugin.objective.window import NamedSums
from grace_plugin.report.training import training
from tests.objective.parts import Set
from tests.pairs import Pair, mixed_samples, modifier_of, recipe_text, run
from tests.tiny import make_samples


def test_custom_term__recipe_block__trains_logs_and_is_charted(llava: Pair, tmp_path: Path) -> None:
    options = {"teacher": str(llava.teacher), "logging_steps": 1}
    built_in = RECIPE.replace("terms: {feature_mse: {weight: 0.1}}", "")
    plain = run(llava, tmp_path / "plain", mixed_samples(4), recipe=built_in, **options)
    found = run(llava, tmp_path / "out", mixed_samples(4), recipe=RECIPE, **options)
    first = next(entry for entry in found.history if "loss_feature_mse" in entry)
    without = next(entry for entry in plain.history if "loss_ce" in entry)
    assert first["loss_feature_mse"] > 0.1
    assert first["loss"] == pytest.approx(without["loss"] + 0.1 * first["loss_feature_mse"], rel=1e-5)
    metrics = [json.loads(line) for line in (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss_feature_mse"] == first["loss_feature_mse"]
    shown = {value["name"] for value in training(tmp_path / "out")["values"]}
    assert "Loss term feature_mse: loss_feature_mse" in shown and "Cross-entropy: CE" in shown
    saved = yaml.safe_load((found.checkpoint / "recipe.yaml").read_text())
    assert '"terms": {"feature_mse": {"weight": 0.1}}' in json.dumps(saved)


def test_custom_term__window_cut_in_micro_batches__same_value() -> None:
    batches = (make_samples(2), make_samples(2, seed=7))
    whole = Set(terms=[FeatureTerm(FeatureRecipe(weight=2.0))])
    cut = Set(terms=[FeatureTerm(FeatureRecipe(weight=2.0))])
    _, one = whole.step(whole.collate([*batches[0], *batches[1]]))
    loss, two = cut.step(*map(cut.collate, batches))
    assert one.metrics["loss_feature_mse"] == pytest.approx(two.metrics["loss_feature_mse"], rel=1e-5)
    expected = two.ce + 0.5 * two.gdkd + cut.grace.terms[1].weight(0) * two.rcka + 2.0 * two.metrics["loss_feature_mse"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_terms__unknown_name__error_says_how_to_register() -> None:
    with pytest.raises(ValueError, match=r"terms: 'no_such' is no registered loss term .*feature_mse.*register_term"):
        modifier_of(recipe_text("t", terms={"no_such": {}}))


@pytest.mark.parametrize("name", ["distill", "relational"])
def test_terms__built_in_name__refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has a block of its own"):
        modifier_of(recipe_text("t", terms={name: {}}))


def test_terms__bad_value__error_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"terms\.feature_mse: weight must be .*greater than or equal to 0, got -1"):
        modifier_of(recipe_text("t", terms={"feature_mse": {"weight": -1}}))


def test_register_term__name_taken__refused() -> None:
    class Other(FeatureTerm):
        pass

    with pytest.raises(ValueError, match=r"'feature_mse' is registered by examples\.custom_loss_term"):
        register_term(Other)
    assert TERMS["feature_mse"] is FeatureTerm


def test_objective__two_terms_with_one_sum__refused() -> None:
    class Other(FeatureTerm):
        name = "other"

    terms: list[LossTerm] = [FeatureTerm(FeatureRecipe()), Other(FeatureRecipe())]
    with pytest.raises(ValueError, match="the loss term feature_mse and other both declare 'visual_tokens'"):
        Set(terms=terms)


def test_objective__one_term_twice__refused() -> None:
    with pytest.raises(ValueError, match="the loss term feature_mse is given twice"):
        Set(terms=[FeatureTerm(FeatureRecipe()), FeatureTerm(FeatureRecipe())])


def test_named_sums__add__by_name_in_float32() -> None:
    sums = NamedSums(("a", "b"), torch.device("cpu"))
    sums.add(a=torch.tensor(2, dtype=torch.int64), b=0.5)
    sums.add(b=torch.tensor(0.25, dtype=torch.float64))
    assert sums.values.tolist() == [2.0, 0.75] and sums.values.dtype == torch.float32
    assert sums["b"] == 0.75
    with pytest.raises(KeyError):
        sums.add(c=1.0)


def test_deprecated_methods__old_names__warn_and_work() -> None:
    made = Set()
    batch = made.collate(make_samples(1))
    with pytest.warns(FutureWarning, match=r"GraceObjective\.window is now begin_step"):
        made.grace.window([batch])
    with pytest.warns(FutureWarning, match=r"GraceObjective\.loss is now compute_loss"):
        loss = made.grace.loss(made.student, batch)
    with pytest.warns(FutureWarning, match=r"GraceObjective\.measure is now reduce_metrics"):
        record = made.grace.measure()
    with pytest.warns(FutureWarning, match=r"GraceObjective\.step is now end_step"):
        made.grace.step(1.0)
    assert made.grace.steps == 1 and record.finite and loss.item() > 0.0
