"""How many pixels a model's image processor makes of an image, known before it makes them.

The limit on an image's own pixels says nothing of what becomes of it: a processor that resizes the shorter side to 336 makes
336 x 336,000,000 pixels of an image of 1 x 1,000,000, a file of 2 kB. The processor is run on a tensor of PyTorch's "meta"
device, which has a shape and no memory, and the largest tensor on the way is noted: that holds for resizing, for padding to a
square and for tiles, whatever the processor, in some milliseconds. Images of common shapes are not tried: nothing that is
at most `_COMMON` times as long as wide is made much larger than the processor's own size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grace_plugin.data.errors import SampleError
from grace_plugin.data.media import DEFAULT_MAX_PIXELS
from grace_plugin.data.shown import shortened

__all__ = ["ProcessedSizes"]

_COMMON = 8
_LONGEST = 200  # times the short side, for processors that cannot be run on the meta device


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor without memory."""

    elements = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
        self.elements = max(self.elements, *made, 0)
        return out


class ProcessedSizes:
    """Pixels that one image processor makes of images, remembered by size.

    Args:
        image_processor: a transformers image processor, or None where the processor has none.
        max_pixels: the run's limit on an image's own pixels. What is made of an image may always have 64 million, which are
            768 MB in float32; None for no limit.
    """

    def __init__(self, image_processor: Any, max_pixels: int | None) -> None:
        self.image_processor = image_processor
        self.limit = None if max_pixels is None else max(max_pixels, DEFAULT_MAX_PIXELS)
        self._known: dict[tuple[int, int], int | str | None] = {}

    def check(self, size: tuple[int, int], name: str) -> None:
        """Refuse an image of `size` (height, width) of which too many pixels would be made.

        Raises:
            SampleError: names the sample, both sizes and how to fix it.
        """
        short, long = sorted(size)
        if self.limit is None or self.image_processor is None or long <= _COMMON * short:
            return
        if size not in self._known:
            self._known[size] = self._made(size)
        made = self._known[size]
        if isinstance(made, str):
            raise SampleError(
                "image_shape",
                f"{name}: the model's processor refuses an image of {size[1]} x {size[0]} pixels: {made}",
            )
        if made is None and long > _LONGEST * short:
            raise SampleError(
                "image_shape",
                f"{name}: an image of {size[1]:,} x {size[0]:,} pixels has a side over {_LONGEST} times as long as the other, "
                "and how much the model's processor makes of it is not known; crop it",
            )
        if made is not None and made > self.limit:
            raise SampleError(
                "image_too_large",
                f"{name}: of an image of {size[1]:,} x {size[0]:,} pixels the model's processor makes {made:,} pixels and the "
                f"limit is {self.limit:,}; crop the image, or raise max_pixels (--max_pixels)",
            )

    def _made(self, size: tuple[int, int]) -> int | str | None:
        """Pixels of the largest image on the way; why the size is refused; None where the processor needs more than shapes."""
        blank = torch.empty(3, *size, dtype=torch.uint8, device="meta")
        largest = _Largest()
        try:
            with largest:
                self.image_processor(images=[blank], input_data_format="channels_first", return_tensors="pt")
        except ValueError as error:
            return None if "meta" in str(error) else shortened(error)
        except Exception:  # NotImplementedError and others of kernels without a form for shapes alone
            return None
        return largest.elements // 3
