"""LLaVA-NeXT and LLaVA-OneVision: an image as a base view and a grid of tiles, with a newline after each line of the grid.

The grid is the best fitting resolution of `image_grid_pinpoints` without the padding around the image; with too many patches
(OneVision) it is shrunk. `image_newline` is a learned vector under the image's token id, and is not a visual token. In
OneVision an image of a sample with several images has its base view alone, and a video has its frames pooled by two with one
newline at its end. Sizes come from `image_sizes` ([I, 2], pixels), `batch_num_images` ([samples]) and the model's config.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from transformers.image_processing_utils import select_best_resolution

from grace_plugin.vlm.family import Batch, Family
from grace_plugin.vlm.registry import register_family

__all__ = ["LlavaNext", "LlavaOnevision"]


class TileGrid(NamedTuple):
    """Placeholders of an image: `base` tokens, then `height` lines of `width` tokens and one newline."""

    base: int
    height: int
    width: int

    @property
    def placeholders(self) -> int:
        """Return the number of placeholders of the image."""
        return self.base + self.height * (self.width + 1)

    def true_tokens(self) -> list[bool]:
        """Return which placeholders are visual tokens."""
        return [True] * self.base + ([True] * self.width + [False]) * self.height


@register_family
class LlavaNext(Family):
    """`LlavaNextForConditionalGeneration`."""

    model_type = "llava_next"
    packs: ClassVar[bool] = True
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?vision_tower\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?multi_modal_projector\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def tile_grids(self, config: Any, batch: Batch, kind: str) -> list[TileGrid]:
        """Return the grid of each image (or video) of the batch, in order."""
        return [self.tile_grid(config, height, width) for height, width in batch["image_sizes"].tolist()]

    def tile_grid(self, config: Any, height: int, width: int) -> TileGrid:
        """Return the grid of an image of `height` x `width` pixels."""
        tile = config.vision_config.image_size
        side = tile // config.vision_config.patch_size
        best_height, best_width = select_best_resolution([height, width], config.image_grid_pinpoints)
        lines, columns = side * (best_height // tile), side * (best_width // tile)
        # transformers rounds to 7 decimals before it truncates (processing_llava_next.py), and so must this
        if width / height > columns / lines:
            lines -= 2 * ((lines - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (lines / height), 7))) // 2)
        return TileGrid(side * side, lines, columns)

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        return [grid.placeholders for grid in self.tile_grids(config, batch, kind)]

    def true_tokens(self, config: Any, batch: Batch, kind: str) -> list[list[bool]]:
        return [grid.true_tokens() for grid in self.tile_grids(config, batch, kind)]

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {
            "image_size": config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in config.image_grid_pinpoints],
        }


@register_family
class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`, images and videos."""

    model_type = "llava_onevision"
    # vLLM 0.32 tiles each image of a prompt with several and supports anyres_max_9 alone; transformers does neither.
    served_images: ClassVar[int | None] = 1

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.video_token_id}

    def tile_grids(self, config: Any, batch: Batch, kind: str) -> list[TileGrid]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        if kind == "video":
            videos, frames = batch["pixel_values_videos"].shape[:2]
            return [TileGrid(frames * math.ceil(side / 2) ** 2, 1, 0)] * videos
        found = super().tile_grids(config, batch, kind)
        counts = batch.get("batch_num_images")
        if counts is None:
            return found
        alone = [count == 1 for count in counts.tolist() for _ in range(count)]
        return [one if single else TileGrid(side * side, 1, 0) for one, single in zip(found, alone, strict=True)]

    def tile_grid(self, config: Any, height: int, width: int) -> TileGrid:
        base, lines, columns = super().tile_grid(config, height, width)
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(lines * columns / (most * base))
        if ratio > 1.1:  # transformers' pack_image_features shrinks only above this ratio
            lines, columns = int(lines // ratio), int(columns // ratio)
        return TileGrid(base, lines, columns)

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {**super().pixel_signature(config), "vision_aspect_ratio": config.vision_aspect_ratio}
