"""Test that every file of recipes/ parses, fits the models that it names, and is described in recipes/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from torch import nn

from grace_plugin.recipe import OneshotRecipe
from grace_plugin.run.inputs import grace_modifier, read_recipe
from grace_plugin.vlm import check_pixels, family_of
from tests.released import RELEASED, on_meta

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PAIRS = [path for path in RECIPES if not path.stem.startswith("demo")]
LAUNCHES = {"one_gpu": (1, 1), "one_node": (1, 8), "several_nodes": (2, 16)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe__any__parses_with_oneshot_block(path: Path) -> None:
    modifier = grace_modifier(read_recipe(path))
    assert modifier.teacher.model
    assert modifier.quantize
    assert [scheme.weights.num_bits for scheme in modifier.resolved_config.config_groups.values()] == [4]
    assert modifier.oneshot.epochs == 1 and modifier.oneshot.learning_rate != OneshotRecipe().learning_rate


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe__any__is_in_the_table_of_the_readme(path: Path) -> None:
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


def test_recipes__released_families__each_has_one() -> None:
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
    assert {f"{name}_w4a16" for name in wanted} <= names


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_config__any__accelerate_parses_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == LAUNCHES[name]
    assert str(config.distributed_type).endswith("MULTI_GPU" if name != "one_gpu" else "NO")


def student_of(path: Path) -> str:
    """Return the hub id in the first line of a recipe."""
    return re.findall(r"Student: (?:--model )?(\S+)", path.read_text().splitlines()[0])[0]


@pytest.mark.parametrize("name", RELEASED)
def test_released_config__any__has_the_published_number_of_parameters(name: str) -> None:
    """A wrong config in tests/released.py would give another number of parameters."""
    count = sum(parameter.numel() for parameter in on_meta(name).parameters())
    assert count / 1e9 == pytest.approx(RELEASED[name][0], abs=0.006 if RELEASED[name][0] < 10 else 0.06)


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_recipe__released_shapes__fit(path: Path) -> None:
    """Every linear of the decoder and no other is quantized, in groups that divide it; vLLM's kernels take the shapes on one
    GPU and on two; student and teacher prepare images alike."""
    student = on_meta(student_of(path))
    modifier = grace_modifier(read_recipe(path))
    assert modifier.teacher.model is not None
    teacher = on_meta(modifier.teacher.model)
    family = family_of(student)
    modifier.ignore = family.quantization_ignore()
    for ranks in (1, 2):
        modifier.serving = modifier.serving.model_copy(update={"tensor_parallel_size": ranks})
        (layers,) = modifier._check_layers(student).values()
        decoder = family.text_model(student).layers
        inside = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
        assert {id(module) for module in layers.values()} == inside
        assert len(layers) == 7 * len(decoder)
    check_pixels(family, student.config, family_of(teacher), teacher.config)


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_readme__memory_of_a_recipe__follows_from_the_parameters(path: Path) -> None:
    """Bytes per parameter: student 16 with AdamW or 8 with Adafactor, teacher 2. With scales or LoRA: student 2, plus 2 for
    the copy of each quantized one, and 16 for each scale and each number of a low-rank update."""
    (row,) = [line for line in (FOLDER / "README.md").read_text().splitlines() if f"`{path.name}`" in line]
    hardware = row.split("|")[3]
    names = student_of(path), str(grace_modifier(read_recipe(path)).teacher.model)
    own, theirs = (sum(p.numel() for p in on_meta(name).parameters()) / 1e9 for name in names)
    said = re.findall(
        r"(\d+) GB,? with (`--set optim=adafactor`|AdamW) \((\d+) GB\)|(\d+) GB, (AdamW) \((\d+) GB[,)]", hardware
    )
    assert said
    training, quantized, learned = grace_modifier(read_recipe(path)).training, 0.0, 0.0
    if training.method != "full":
        student = on_meta(names[0])
        linears = [m for m in family_of(student).text_model(student).modules() if isinstance(m, nn.Linear)]
        quantized = sum(m.weight.numel() for m in linears) / 1e9
        rank = training.lora.rank if training.lora else 0
        learned = quantized / 128 + rank * sum(sum(m.weight.shape) for m in linears) / 1e9
    asks = "adafactor" if "adafactor" in hardware else "adamw_torch_fused"
    assert grace_modifier(read_recipe(path)).oneshot.optim == asks
    for parts in said:
        size, optimizer, figure = (part for part in parts if part)
        expected = own * (16 if optimizer == "AdamW" else 8) + theirs * 2
        if training.method != "full":
            expected = own * 2 + quantized * 2 + learned * 16 + theirs * 2
        assert abs(int(figure) - expected) <= 1.0
        assert int(figure) < int(size)
