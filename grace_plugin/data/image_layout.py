"""What a model's processor makes of an image, known from the image's size alone: the text it writes, and how many pixels.

`Layout` gives the text. It depends on the size and, for some families, on whether the text has other images. It is read off
the processor, called with a blank image and a tokenizer that records what it is asked to tokenize. Most processors also state
how many tokens an image of some size becomes; once that agrees for the first sizes, it is used for the others.

`ProcessedSizes` gives the pixels. A limit on an image's own pixels says nothing of them: a processor that resizes the shorter
side to 336 makes 336 x 336,000,000 pixels of an image of 1 x 1,000,000, a file of 2 kB. The processor is run on a tensor of
the "meta" device, which has no memory, and the largest tensor on the way counts.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grace_plugin.data.errors import SampleError
from grace_plugin.data.media import DEFAULT_MAX_PIXELS
from grace_plugin.data.shown import shortened

__all__ = ["Layout", "ProcessedSizes", "Written"]

# a noncharacter that no processor writes
_BETWEEN = "\ufdd3"
# an image that every processor takes
_SHOWN = (448, 448)
# sizes on which a processor's own arithmetic must agree before it is used for other sizes
_AGREEING = 3


class Written(NamedTuple):
    """`text` with every run of a visual token written once, `cut` tokens left out so, `visual` tokens there were."""

    text: str
    cut: int
    visual: int


class _Noting:
    """A tokenizer that keeps the texts it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self.texts = [text] if isinstance(text, str) else list(text)
        return self.tokenizer(text, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class Layout:
    """What one processor writes, remembered by size.

    placeholder: what the chat template writes for an image, "" when it takes none.
    """

    def __init__(self, processor: Any, placeholder: str) -> None:
        self.processor, self.placeholder = processor, placeholder
        self._known: dict[tuple[tuple[int, int], bool], Written] = {}
        self._alike: list[Written] = []
        self._disagreed = False

    def visual_ids(self) -> set[int]:
        """Return ids that stand for visual tokens: the one a processor repeats for an image, and its video token."""
        return {i for i in (self._image_id, self.video_id) if i is not None}

    @property
    def video_id(self) -> int | None:
        """Id of the visual tokens of a video, where it has one of its own."""
        found = getattr(self.processor, "video_token_id", None)
        return found if isinstance(found, int) else None

    @cached_property
    def _image_id(self) -> int | None:
        if not self.placeholder:
            return None
        ids = self.processor.tokenizer(self._expanded(_SHOWN, True), add_special_tokens=False)["input_ids"]
        return Counter(ids).most_common(1)[0][0]

    def written(self, size: tuple[int, int], alone: bool, name: str) -> Written:
        """Return what the processor writes for an image of `size` (height, width)."""
        alone = alone or not self._beside_others
        if (size, alone) not in self._known:
            try:
                self._known[size, alone] = (self._stated(size) if alone else None) or self._measured(size, alone)
            except Exception as error:  # processors raise what they like
                raise SampleError(
                    "image_shape",
                    f"{name}: the model's processor refuses an image of {size[1]} x {size[0]} pixels: {shortened(error)}",
                ) from error
        return self._known[size, alone]

    @cached_property
    def _beside_others(self) -> bool:
        """Whether an image is laid out otherwise when its text has another."""
        return self._expanded(_SHOWN, True) != self._expanded(_SHOWN, False)

    def _expanded(self, size: tuple[int, int], alone: bool) -> str:
        """Return the text that the processor writes for the first of one or two images of a size."""
        noting, processor = _Noting(self.processor.tokenizer), copy.copy(self.processor)
        processor.tokenizer = noting
        blank, count = Image.new("RGB", (size[1], size[0])), 1 if alone else 2
        processor(text=[_BETWEEN.join([self.placeholder] * count)], images=[[blank] * count], return_tensors="pt")
        return noting.texts[0].split(_BETWEEN)[0]

    def _measured(self, size: tuple[int, int], alone: bool) -> Written:
        text, tokenizer = self._expanded(size, alone), self.processor.tokenizer
        visual = tokenizer(text, add_special_tokens=False)["input_ids"].count(self._image_id)
        token = re.escape(tokenizer.convert_ids_to_tokens(self._image_id))
        short, runs = re.subn(f"({token})+", r"\1", text)
        found = Written(short, visual - runs, visual)
        if alone:
            self._alike.append(found)
            self._disagreed |= found.text != self._alike[0].text or self._states(size) != visual
        return found

    def _states(self, size: tuple[int, int]) -> int | None:
        """Return the number of visual tokens of an image by the processor's own arithmetic, where it has one."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        return None if count is None else int(count(image_sizes=[list(size)])["num_image_tokens"][0])

    def _stated(self, size: tuple[int, int]) -> Written | None:
        """Return the layout by the processor's arithmetic, once it was right for the first sizes; None before."""
        stated = None if self._disagreed or len(self._alike) < _AGREEING else self._states(size)
        if stated is None:
            return None
        first = self._alike[0]
        return Written(first.text, stated - (first.visual - first.cut), stated)


# images at most 8 times as long as wide are not tried: no processor makes them much larger than its own size
_COMMON = 8
# times the short side, for processors that cannot be run on the meta device
_LONGEST = 200


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
        """Refuse an image of `size` (height, width) of which too many pixels would be made."""
        short, long = sorted(size)
        if self.limit is None or self.image_processor is None or long <= _COMMON * short:
            return
        if size not in self._known:
            self._known[size] = self._made(size)
        made = self._known[size]
        if isinstance(made, str):
            raise SampleError(
                "image_shape", f"{name}: the model's processor refuses an image of {size[1]} x {size[0]} pixels: {made}"
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
        """Return the pixels of the largest tensor, or why the size is refused, or None if the processor needs values."""
        # the layout is stated below: processors otherwise infer it from the shape, which is ambiguous for sides of 1 or 3
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
