"""Student and teacher checkpoints, recipes and mixed samples for the tests, made from tests/tiny.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch.optim.optimizer import _global_optimizer_post_hooks

from tests.tiny import build, make_samples, save

__all__ = ["Pair", "loaded", "mixed_samples", "modifier_of", "pair", "recipe_text", "run", "structure"]


class Pair(NamedTuple):
    """Folders of a student and of a wider, deeper teacher whose head is padded to more rows."""

    family: str
    student: Path
    teacher: Path


def pair(
    family: str, folder: Path, *, student: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None
) -> Pair:
    """Write both checkpoints under `folder`; `student` and `teacher` are further arguments of `tests.tiny.build`."""
    save(*build(family, **({"seed": 0} | (student or {}))), folder / "student")
    bigger = {"seed": 1, "hidden": 512, "layers": 4, "vocab_rows": 400}
    save(*build(family, **(bigger | (teacher or {}))), folder / "teacher")
    return Pair(family, folder / "student", folder / "teacher")


def recipe_text(model: Path | str | None, **blocks: Any) -> str:
    """A recipe as a user writes it: W4A16 and the teacher at `model`, with blocks replaced or added (None leaves one out)."""
    asked: dict[str, Any] = {"scheme": "W4A16"}
    if model is not None:
        asked["teacher"] = {"model": str(model), "dtype": "float32"}
    asked = {key: value for key, value in (asked | blocks).items() if value is not None}
    return yaml.safe_dump({"grace_stage": {"grace_modifiers": {"GraceModifier": asked}}})


def mixed_samples(count: int = 8) -> list[dict[str, Any]]:
    """Samples of different length: one picture, two pictures, one without; answers from two words to three sentences."""
    mixed = make_samples(count - 3, seed=3) + make_samples(2, seed=4, images=2) + make_samples(1, seed=5, images=0)
    for number, sample in enumerate(mixed[: count - 3]):
        text = sample["messages"][-1]["content"][0]
        text["text"] = " ".join([text["text"]] * (1 + number % 3))
    return mixed


def run(pair: Pair, output_dir: Path, dataset: Any = None, *, recipe: Any = None, **options: Any) -> Any:
    """`grace_plugin.train` on the CPU, quiet, two steps of two samples unless told otherwise."""
    import grace_plugin

    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True,
        "model": str(pair.student),
    }  # fmt: skip
    dataset = make_samples(4) if dataset is None else dataset
    recipe = recipe_text(pair.teacher) if recipe is None else recipe
    return grace_plugin.train(recipe=recipe, dataset=dataset, output_dir=output_dir, **(defaults | options))


def modifier_of(text: str) -> Any:
    """The GraceModifier a recipe text resolves to."""
    from grace_plugin.run.inputs import grace_modifier, read_recipe

    return grace_modifier(read_recipe(text))


def equal_frozen(left: dict[str, tuple[torch.Tensor, torch.Tensor]], right: dict[str, Any]) -> bool:
    """Whether two runs ended with the same codes and scales, bit for bit."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name][part], right[name][part]) for name in left for part in (0, 1)
    )


def loaded(pair: Pair) -> Any:
    """The student as a caller loads it, in float32."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(pair.student, dtype=torch.float32)


def structure(model: Any) -> dict[str, Any]:
    """What can hang on a model beside the values of its weights, and what waits for any optimizer to step.

    Not: what a forward pass in transformers and Trainer leave on every model (hooks that collect outputs, two marks).
    """
    others = {"training", "_is_accelerate_prepared", "_output_capturing_hooks_installed"}
    modules = {}
    for name, module in model.named_modules():
        hooks = [hook for key, held in vars(module).items() if key.endswith("_hooks") for hook in held.values()]
        foreign = [hook for hook in hooks if not hook.__module__.startswith("transformers.")]
        parts = [sorted(vars(module).keys() - others), sorted(module._parameters), sorted(module._buffers)]
        modules[name] = (type(module), *parts, foreign)
    parameters = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    return {"modules": modules, "parameters": parameters, "optimizer hooks": len(_global_optimizer_post_hooks)}
