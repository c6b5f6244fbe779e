"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos at their own resolution, `t * h * w / merge^2` visual tokens each.

The grid of each image and video comes from the processor (`image_grid_thw`, `video_grid_thw`, [I, 3] in patches). The merger
(and Qwen3-VL's deepstack mergers) is the projector; it trains, the tower below it is frozen. In Qwen3-VL a video's tokens are
interrupted by time stamps; its split counts them over the whole video.
"""

from __future__ import annotations

from typing import Any, ClassVar

from grace_plugin.vlm.base import Batch, Family

__all__ = ["Qwen2VL", "Qwen3VL", "Qwen25VL"]


class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration`."""

    model_type = "qwen2_vl"
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?visual\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?visual\.merger\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.video_token_id}

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        grid = batch[f"{kind}_grid_thw"]
        return (grid.prod(dim=-1) // config.vision_config.spatial_merge_size**2).tolist()

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        return {
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }


class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`."""

    model_type = "qwen2_5_vl"


class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration` (deepstack)."""

    model_type = "qwen3_vl"
    projector: ClassVar[tuple[str, ...]] = (
        r"re:(.*\.)?visual\.merger\..*",
        r"re:(.*\.)?visual\.deepstack_merger_list\..*",
    )
