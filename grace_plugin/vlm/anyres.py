"""LLaVA-NeXT and LLaVA-OneVision: an image as a base view and a grid of tiles, each line of the grid closed by a newline.

The grid is the best fitting resolution of `image_grid_pinpoints`, with the padding around the image cut away; where it holds
too many patches (OneVision) it is shrunk. `image_newline` is a learned vector, not a part of the image: it stands under the
image's token id and is not a visual token. In OneVision an image of a row with several images has its base view alone, and a
video has its frames pooled by two with one newline behind the last.

vLLM (0.32) cuts each image of a prompt with several into tiles and knows `anyres_max_9` alone; transformers does neither, so
rows with several images are trained as transformers lays them out and are best served one image at a time.

Sizes come from `image_sizes` ([I, 2], pixels), `batch_num_images` ([rows]) and the model's config.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from transformers.image_processing_utils import select_best_resolution

from grace_plugin.vlm.base import Batch, Family

__all__ = ["LlavaNext", "LlavaOnevision"]


class TileGrid(NamedTuple):
    """Placeholders of an image: `base` tokens, then `height` lines of `width` tokens and a newline."""

    base: int
    height: int
    width: int

    @property
    def placeholders(self) -> int:
        """How many placeholders the image owns."""
        return self.base + self.height * (self.width + 1)

    def true_tokens(self) -> list[bool]:
        """Which of them are visual tokens."""
        return [True] * self.base + ([True] * self.width + [False]) * self.height


class LlavaNext(Family):
    """`LlavaNextForConditionalGeneration`."""

    model_type = "llava_next"
    packs: ClassVar[bool] = True
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?vision_tower\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?multi_modal_projector\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def tile_grids(self, config: Any, batch: Batch, kind: str) -> list[TileGrid]:
        """The layout of each image (or video) of the batch, in order."""
        return [self.tile_grid(config, height, width) for height, width in batch["image_sizes"].tolist()]

    def tile_grid(self, config: Any, height: int, width: int) -> TileGrid:
        """The layout of an image of `height` x `width` pixels."""
        tile = config.vision_config.image_size
        side = tile // config.vision_config.patch_size
        best_height, best_width = select_best_resolution([height, width], config.image_grid_pinpoints)
        lines, columns = side * (best_height // tile), side * (best_width // tile)
        if width / height > columns / lines:
            lines -= 2 * ((lines - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (lines / height), 7))) // 2)
        return TileGrid(side * side, lines, columns)

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        return [tile_grid.placeholders for tile_grid in self.tile_grids(config, batch, kind)]

    def true_tokens(self, config: Any, batch: Batch, kind: str) -> list[list[bool]]:
        return [tile_grid.true_tokens() for tile_grid in self.tile_grids(config, batch, kind)]

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {
            "image_size": config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in config.image_grid_pinpoints],
        }


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`, images and videos."""

    model_type = "llava_onevision"
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
        return (
            TileGrid(base, int(lines // ratio), int(columns // ratio))
            if ratio > 1.1
            else TileGrid(base, lines, columns)
        )

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {**super().pixel_signature(config), "vision_aspect_ratio": config.vision_aspect_ratio}
