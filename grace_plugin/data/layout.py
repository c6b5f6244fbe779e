"""What a model's processor writes in the place of an image, without preparing the image's pixels for every sample.

The text depends on the image's size and, for some families, on whether other images stand beside it. It is read off the
processor by giving it a blank image of that size and a tokenizer that notes what it is asked to tokenise. Most processors also
state how many tokens an image of some size becomes; where that agrees with the first sizes looked at, and they differ in
nothing else, it is believed for the others.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

from PIL import Image

from grace_plugin.data.errors import SampleError
from grace_plugin.data.shown import shortened

__all__ = ["Layout", "Written"]

_BETWEEN = "\ufdd3"  # a noncharacter that no processor writes
_SHOWN = (448, 448)  # an image that every processor takes
_BELIEVED = 3  # sizes on which a processor's own arithmetic must agree before it is believed


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
        self._doubted = False

    def visual_ids(self) -> set[int]:
        """Ids that stand for visual tokens: the one a processor repeats for an image, and its video token."""
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
        """What stands for an image of `size` (height, width).

        Raises:
            SampleError: the processor refuses such an image; `name` says whose.
        """
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
        """Whether an image is laid out otherwise when another stands in its text."""
        return self._expanded(_SHOWN, True) != self._expanded(_SHOWN, False)

    def _expanded(self, size: tuple[int, int], alone: bool) -> str:
        """The text that stands for the first of one or two images of a size."""
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
            self._doubted |= found.text != self._alike[0].text or self._states(size) != visual
        return found

    def _states(self, size: tuple[int, int]) -> int | None:
        """Visual tokens of an image by the processor's own arithmetic, where it has one."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        return None if count is None else int(count(image_sizes=[list(size)])["num_image_tokens"][0])

    def _stated(self, size: tuple[int, int]) -> Written | None:
        """The layout by arithmetic, once it was right for the first sizes and the text around the tokens was the same."""
        stated = None if self._doubted or len(self._alike) < _BELIEVED else self._states(size)
        if stated is None:
            return None
        first = self._alike[0]
        return Written(first.text, stated - (first.visual - first.cut), stated)
