"""LLaVA-1.5 and Pixtral: a vision tower, a two-layer projector, a decoder, and one placeholder per visual token.

With a CLIP tower every image has the same number of tokens. With a Pixtral tower (and in Mistral 3, which merges patches)
an image keeps its own resolution, which the processor reports in `image_sizes`, [I, 2] in pixels; the tokens that end its lines
have ids of their own.
"""

from __future__ import annotations

from typing import Any, ClassVar

from grace_plugin.vlm.family import Batch, Family
from grace_plugin.vlm.registry import register_family

__all__ = ["Llava", "Mistral3"]


@register_family
class Llava(Family):
    """`LlavaForConditionalGeneration`."""

    model_type = "llava"
    packs: ClassVar[bool] = True
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?vision_tower\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?multi_modal_projector\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        if batch.get("image_sizes") is None:
            # From the count, not from the config: the number depends on the tower's class token and the select strategy.
            images = batch["pixel_values"].shape[0]
            return [total // images] * images
        cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        return (batch["image_sizes"] // cell).prod(dim=-1).tolist()

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {
            "image_size": config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        }


@register_family
class Mistral3(Llava):
    """`Mistral3ForConditionalGeneration`: a Pixtral tower whose patches are merged before the projector."""

    model_type = "mistral3"

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {**super().pixel_signature(config), "spatial_merge_size": config.spatial_merge_size}
