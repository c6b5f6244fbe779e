"""The size of one image in pixels, for samples that set bounds of their own.

The fields are those of the Qwen models' `process_vision_info`: `min_pixels` and `max_pixels` bound the area, `resized_height`
and `resized_width` give both sides; each side is then rounded to a multiple of the side of a visual token. The image is resized
to that size (bicubic), and the processor, whose own bounds it must fit, leaves it unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["bounded_size"]


def bounded_size(image_processor: Any, size: tuple[int, int], asked: Mapping[str, int]) -> tuple[int, int]:
    """Return (height, width) of an image under a sample's own bounds.

    Args:
        image_processor: the student's.
        size: (height, width) of the image.
        asked: `min_pixels`, `max_pixels`, or `resized_height` and `resized_width`.

    Raises:
        ValueError: a processor without such bounds, or bounds of the sample outside the processor's.
    """
    own = dict(getattr(image_processor, "size", None) or {})
    patch, merge = getattr(image_processor, "patch_size", None), getattr(image_processor, "merge_size", None)
    # Each processor's module has a smart_resize of its own, which rounds as its model was trained.
    arithmetic = getattr(sys.modules[type(image_processor).__module__], "smart_resize", None)
    if arithmetic is None or patch is None or merge is None or not {"shortest_edge", "longest_edge"} <= set(own):
        raise ValueError(
            "the model's image processor takes no bounds for single images; set its size for all images (processor=), or "
            "resize the image beforehand"
        )
    side, least, most = patch * merge, own["shortest_edge"], own["longest_edge"]
    height, width = asked.get("resized_height", size[0]), asked.get("resized_width", size[1])
    if "resized_height" in asked:
        # both sides are given, so the bounds of the area must not apply: 1 and 4 times the area
        wanted = arithmetic(height, width, factor=side, min_pixels=1, max_pixels=max(most, height * width * 4))
    else:
        smallest, largest = asked.get("min_pixels", least), asked.get("max_pixels", most)
        if smallest > largest:
            raise ValueError(
                f"min_pixels {smallest} is above max_pixels {largest}, of which one is the processor's own; give both"
            )
        wanted = arithmetic(height, width, factor=side, min_pixels=smallest, max_pixels=largest)
    # The processor resizes again where its own bounds ask for another size; then the sample would not get what it asks for.
    if tuple(arithmetic(*wanted, factor=side, min_pixels=least, max_pixels=most)) != tuple(wanted):
        raise ValueError(
            f"the sample asks for an image of {wanted[1]} x {wanted[0]} pixels, outside the processor's own bounds of {least} "
            f"to {most} pixels; widen those (processor=)"
        )
    return int(wanted[0]), int(wanted[1])
