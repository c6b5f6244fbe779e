"""LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama decoder; every image owns the same number of tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from grace_plugin.vlm.base import Batch, Family

__all__ = ["Llava"]


class Llava(Family):
    """`LlavaForConditionalGeneration`."""

    model_type = "llava"
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?vision_tower\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?multi_modal_projector\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        images = batch["pixel_values"].shape[0]
        return [total // images] * images

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {
            "image_size": config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
