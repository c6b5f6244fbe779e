"""Add a loss term to GRACE: the mean squared error between the visual tokens of student and teacher.

    python -m examples.custom_loss_term STUDENT TEACHER SAMPLES.jsonl OUTPUT_DIR

Its sums are reduced with those of the other terms; `loss_feature_mse` is in the log, metrics.jsonl and the training report.
"""

import sys

import torch
from torch.nn.functional import layer_norm

import grace_plugin
from grace_plugin.objective import LossTerm, register_term
from grace_plugin.recipe import Block, NonNegative

RECIPE = """
grace_stage:
  grace_modifiers:
    GraceModifier:
      scheme: W4A16
      terms: {feature_mse: {weight: 0.1}}
"""


class FeatureRecipe(Block):
    weight: NonNegative = 0.1


@register_term
class FeatureTerm(LossTerm):
    """weight * sum |P t - s|^2 / (tokens * width) over visual tokens, normalized, P a fixed random projection."""

    name, recipe = "feature_mse", FeatureRecipe
    counts, sums = ("visual_tokens",), ("feature_distance",)
    needs_teacher = reads_visual_states = True

    def prepare(self, micro_batch, counts):
        counts.add(visual_tokens=sum(micro_batch.visual.sizes))

    def loss(self, micro_batch, states, window, weight):
        student = states.penultimate.flatten(0, 1).index_select(0, micro_batch.visual.index).float()
        teacher = micro_batch.teacher.visual.float()
        widths = teacher.shape[-1], student.shape[-1]
        projection = (
            torch.randn(widths, generator=torch.Generator().manual_seed(0)).to(student.device) / widths[0] ** 0.5
        )
        student, teacher = layer_norm(student, widths[1:]), layer_norm(teacher @ projection, widths[1:])
        distance = (student - teacher).square().mean(-1).sum()
        window.sums.add(feature_distance=distance)
        return weight * distance / window.counts["visual_tokens"].clamp(min=1.0)

    def metrics(self, totals):
        return {"loss_feature_mse": totals["feature_distance"] / max(totals["visual_tokens"], 1.0)}


if __name__ == "__main__":
    model, teacher, dataset, output_dir = sys.argv[1:]
    grace_plugin.train(model, teacher=teacher, recipe=RECIPE, dataset=dataset, output_dir=output_dir, max_steps=100)
