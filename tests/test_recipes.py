"""Every recipe of recipes/ is read by upstream's own reader, says what its name says, and stands in the README."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from grace_plugin.run.inputs import grace_modifier, read_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
LAUNCHES = {"one_gpu": (1, 1), "one_node": (1, 8), "several_nodes": (2, 16)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses(path: Path) -> None:
    modifier = grace_modifier(read_recipe(path))
    assert modifier.teacher.model
    assert modifier.quantize
    assert [scheme.weights.num_bits for scheme in modifier.resolved_config.config_groups.values()] == [4]
    assert ("oneshot:" in path.read_text()) == path.stem.endswith("_oneshot")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_its_row(path: Path) -> None:
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.stem.endswith("_oneshot")], ids=lambda path: path.stem)
def test_train_and_oneshot_forms_differ_in_the_run_alone(path: Path) -> None:
    train = grace_modifier(read_recipe(path))
    oneshot = grace_modifier(read_recipe(path.with_stem(f"{path.stem}_oneshot")))
    own = {"index", "initialized_", "finalized_", "started_", "ended_", "oneshot"}
    assert train.model_dump(exclude=own) == oneshot.model_dump(exclude=own)


def test_the_pairs_of_the_issue_are_there() -> None:
    names = {path.stem for path in RECIPES}
    wanted = (
        "llava_1_5_7b",
        "qwen2_vl_2b",
        "qwen2_5_vl_3b",
        "qwen3_vl_2b",
        "qwen3_vl_4b",
        "internvl3_2b",
        "smolvlm2_2_2b",
    )
    assert {f"{name}_w4a16{form}" for name in wanted for form in ("", "_oneshot")} <= names


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_reads_its_configs(name: str) -> None:
    config = load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == LAUNCHES[name]
    assert str(config.distributed_type).endswith("MULTI_GPU" if name != "one_gpu" else "NO")
