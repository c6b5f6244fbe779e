"""InternVL3, SmolVLM, Idefics3 and Gemma 3: an image as tiles of one size, each with a fixed number of visual tokens.

The batch does not say how many tiles an image has; the text does. In InternVL an image is one span of its token, and a video
one span per frame under the image's token; the batch entry `VISUAL_SPANS` says how many spans a video has. In SmolVLM and
Idefics3 each tile is a span after a tag, and the view of the whole image comes last. In Gemma 3 the image and each
pan-and-scan crop have begin and end tokens around them and count as images of their own.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, ClassVar

from grace_plugin.vlm.family import VISUAL_SPANS, Batch, Family, image_token_spans
from grace_plugin.vlm.registry import register_family

__all__ = ["Gemma3", "Idefics3", "InternVL", "SmolVLM"]


@register_family
class InternVL(Family):
    """`InternVLForConditionalGeneration`."""

    model_type = "internvl"
    packs: ClassVar[bool] = True
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?vision_tower\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?multi_modal_projector\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def takes_videos(self, config: Any) -> bool:
        return True

    def tokens_per_tile(self, config: Any) -> int:
        """Return the number of visual tokens of one tile."""
        vision = config.vision_config
        return int((vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio) ** 2)

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        per_tile, tiles = self.tokens_per_tile(config), batch["pixel_values"].shape[0]
        # `visual_tokens` then refuses the batch: its tokens were truncated
        if total != per_tile * tiles:
            return [per_tile] * tiles
        lengths = image_token_spans(batch, config.image_token_id)[0]
        counts = batch.get(VISUAL_SPANS) or [1] * len(lengths)
        found = iter(lengths)
        return [sum(islice(found, count)) for count in counts]

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        return {
            "image_size": tuple(vision.image_size),
            "patch_size": tuple(vision.patch_size),
            "downsample_ratio": config.downsample_ratio,
        }


@register_family
class Gemma3(Family):
    """`Gemma3ForConditionalGeneration`."""

    model_type = "gemma3"
    packs: ClassVar[bool] = True
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?vision_tower\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?multi_modal_projector\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        return [config.mm_tokens_per_image] * batch["pixel_values"].shape[0]

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {"image_size": config.vision_config.image_size, "mm_tokens_per_image": config.mm_tokens_per_image}


@register_family
class Idefics3(Family):
    """`Idefics3ForConditionalGeneration`."""

    model_type = "idefics3"
    packs: ClassVar[bool] = True
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?vision_model\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?connector\..*",)
    decoder: ClassVar[str] = "model.text_model"

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        vision = config.vision_config
        per_tile = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
        lengths, tags = image_token_spans(batch, config.image_token_id)
        tiles = len(lengths)
        if batch.get("pixel_attention_mask") is not None:  # tiles that pad the batch have an empty mask
            tiles = int(batch["pixel_attention_mask"].flatten(2).any(dim=-1).sum())
        if lengths != [per_tile] * tiles:
            return [per_tile] * tiles
        images = [0]
        # The config does not name the tag of the whole-image view, which ends an image; the batch's last span has it.
        for last in (tags == tags[-1]).tolist():
            images[-1] += per_tile
            images += [0] if last else []
        return images[:-1]

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        return {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "scale_factor": config.scale_factor,
        }


@register_family
class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`."""

    model_type = "smolvlm"
