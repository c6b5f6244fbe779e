"""`oneshot(pipeline="grace")`: the same objective over upstream's calibration loader.

The pipeline trains for the epochs and rate of the recipe's `oneshot` block with the same Trainer as `train`. A loader without
labels supervises every text token. Other modifiers of the recipe run their own pipelines, in the recipe's order.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

from torch import nn

from grace_plugin.artifact.save import install_save
from grace_plugin.modifier import GraceModifier
from grace_plugin.run.train import grace_modifier, recipe_hash
from grace_plugin.run.trainer import GraceTrainer
from grace_plugin.upstream import CalibrationPipeline, active_session

__all__ = ["GracePipeline", "oneshot", "register_pipeline"]


class GracePipeline(CalibrationPipeline):
    """Calibration pipeline registered as `grace`."""

    @staticmethod
    def __call__(model: nn.Module, dataloader: Any, dataset_args: Any) -> None:
        """Run every modifier of the active recipe, GRACE with training steps.

        Raises:
            ValueError: no calibration data, or a recipe without exactly one GraceModifier.
        """
        recipe = active_session().lifecycle.recipe
        grace_modifier(recipe)
        if dataloader is None:
            raise ValueError("GRACE trains on calibration data and none was given; pass dataset= to oneshot")
        modifiers = list(recipe.modifiers)
        try:
            for modifier in modifiers:
                recipe.modifiers = [modifier]
                if isinstance(modifier, GraceModifier):
                    _train(model, dataloader, modifier)
                else:
                    CalibrationPipeline.from_modifiers([modifier])(model, dataloader, dataset_args)
        finally:
            recipe.modifiers = modifiers


def _train(model: nn.Module, dataloader: Any, modifier: GraceModifier) -> None:
    from transformers import TrainingArguments

    asked = modifier.oneshot
    per_epoch = math.ceil(len(dataloader) / asked.gradient_accumulation_steps)
    total_steps = max(1, math.ceil(asked.epochs * per_epoch))
    with tempfile.TemporaryDirectory(prefix="grace-oneshot-") as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=total_steps, learning_rate=asked.learning_rate,
            lr_scheduler_type=asked.scheduler, warmup_steps=round(asked.warmup_share * total_steps),
            gradient_accumulation_steps=asked.gradient_accumulation_steps, weight_decay=asked.weight_decay,
            max_grad_norm=asked.max_grad_norm, seed=asked.seed, save_strategy="no", report_to="none",
            remove_unused_columns=False, label_names=["labels"], logging_nan_inf_filter=False, logging_steps=10,
        )  # fmt: skip
        modifier.teacher_to(arguments.device)
        trainer = GraceTrainer(
            model=model, args=arguments, train_loader=dataloader, objective=modifier.begin(total_steps),
            train_dataset=dataloader.dataset,
            scale_rate=modifier.scales.learning_rate_multiplier, recipe_hash=recipe_hash(modifier),
        )  # fmt: skip
        trainer.train()
    install_save(model, modifier)


def register_pipeline() -> None:
    """Make `oneshot(pipeline="grace")` find this pipeline; a second call changes nothing."""
    if "grace" not in CalibrationPipeline.registered_names():
        CalibrationPipeline.register_value(GracePipeline, "grace")


def oneshot(**arguments: Any) -> nn.Module:
    """llm-compressor's `oneshot` with `pipeline="grace"`; every argument is upstream's.

    Raises:
        ValueError: what the recipe asks for cannot be done.
    """
    from llmcompressor import oneshot as upstream_oneshot

    return upstream_oneshot(**{"pipeline": "grace"} | arguments)
