"""Relational alignment of visual tokens (RCKA).

omega * sum (1 - CKA) / I        I: images of the window that can be compared
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from grace_plugin.controller import warm_up
from grace_plugin.losses.relational import countable_images, relational_loss
from grace_plugin.objective.terms.base import Chart, LossTerm
from grace_plugin.objective.window import AccumulationWindow, MicroBatch, NamedSums
from grace_plugin.recipe import RelationalRecipe
from grace_plugin.vlm import Capture

__all__ = ["VisualRelationTerm"]


class VisualRelationTerm(LossTerm):
    """1 - CKA between the visual tokens of student and teacher, with a linear warm-up of its weight."""

    name = "relational"
    recipe = RelationalRecipe
    has_own_block = True
    counts = ("countable_images",)
    sums = ("visual_distance", "images_skipped")
    charts = (Chart("Relation of visual tokens", "1 - CKA, mean over images", {"loss_rcka": "RCKA"}),)

    def __init__(self, config: RelationalRecipe) -> None:
        super().__init__(config)
        self.enabled = self.needs_teacher = self.reads_visual_states = config.enabled

    def prepare(self, micro_batch: MicroBatch, counts: NamedSums) -> None:
        """Count the images whose visual tokens can be compared, by the teacher's states."""
        if micro_batch.teacher is not None:
            found = countable_images(micro_batch.teacher.visual, micro_batch.visual.sizes)
            counts.add(countable_images=found.sum())

    def weight(self, step: int) -> float:
        """Return omega, warm-up included."""
        if not self.enabled:
            return 0.0
        asked = self.config
        return asked.weight * warm_up(step, self.context.total_steps, asked.warmup_steps, asked.warmup_share)

    def loss(self, micro_batch: MicroBatch, states: Capture, window: AccumulationWindow, weight: float) -> Tensor:
        """Return the micro-batch's share; an exact, differentiable zero without images."""
        assert states.penultimate is not None and micro_batch.teacher is not None
        hidden = states.penultimate.flatten(0, 1).index_select(0, micro_batch.visual.index)
        out = relational_loss(hidden, micro_batch.teacher.visual, micro_batch.visual.sizes)
        window.sums.add(visual_distance=out.loss_sum, images_skipped=out.skipped)
        # divided by the teacher's count of all ranks, known before the student ran; an image that only the student makes
        # degenerate contributes 0 to the sum
        return weight * out.loss_sum / window.counts["countable_images"].clamp(min=1.0)

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the mean over countable images, and how many images were compared and skipped.

        Skipped are images with fewer than 4 visual tokens or with a degenerate centred norm.
        """
        images = totals["countable_images"]
        return {
            "loss_rcka": totals["visual_distance"] / max(images, 1.0),
            "images": int(images),
            "images_skipped": int(totals["images_skipped"]),
        }

    def logs(self, step: int) -> dict[str, float]:
        """Return the weight of the next step."""
        return {"omega": self.weight(step)}
