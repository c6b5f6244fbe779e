"""A row looked at once: whether it can be used, and how many tokens it becomes, without running the image processor on it.

Images are decoded in full, so a truncated file is found before training. Their tokens are counted from their size: the
processor is run on blank images of the first sizes, and where its own arithmetic of sizes gives the same numbers up to a
constant, that is used from then on; a family without it has every distinct size run once. A row with videos is run
through the collator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from PIL import Image

from grace_plugin.data.collate import IGNORE_INDEX, ConversationCollator
from grace_plugin.data.conversation import Row, check_row, read_row, row_name
from grace_plugin.data.faults import RowError
from grace_plugin.data.media import decode_image, image_size

__all__ = ["Entry", "Measure"]


class Entry(NamedTuple):
    """What was found of a row: tokens it becomes, how many of them are visual and how many learned, or why it is not used.

    mark: digest of its id, digest: of its whole content ("" for a row without an id).
    """

    tokens: int = 0
    visual: int = 0
    supervised: int = 0
    pictures: int = 0
    reason: str = ""
    message: str = ""
    mark: str = ""
    digest: str = ""


def _content(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_content).encode()).hexdigest()[:24]


@dataclass
class Measure:
    """Callable (row, number) -> Entry for one collator; never raises for a row.

    decode: decode every image; False reads headers only, and a truncated file is found when it is used.
    """

    collator: ConversationCollator
    decode: bool = True

    def __post_init__(self) -> None:
        self._extra: dict[tuple[int, int], tuple[int, int]] = {}
        self._probes: list[int] = []

    def __call__(self, row: Any, number: int) -> Entry:
        name = row_name(row, number)
        mark = digest = ""
        try:
            checked = check_row(row, number)
            if row.get("id") is not None:
                mark = _digest(row["id"])
                digest = _digest(dict(row))
            apart = not checked.videos and (not checked.images or self.additive)
            found = self._count(checked) if apart else self._run(row, number)
            return found._replace(mark=mark, digest=digest)
        except RowError as fault:
            text = str(fault)
            return Entry(
                reason=fault.reason, message=text if text.startswith(name) else f"row {number}: {text}", mark=mark
            )

    def _count(self, row: Row) -> Entry:
        sizes = [image_size(image, row.name, self.collator.max_pixels) for image in row.images]
        if self.decode:
            for image in row.images:
                decode_image(image, row.name, self.collator.max_pixels)
        extra = [self._image(size, row.name) for size in sizes]
        tokens = self.collator.segment_tokens(row)
        supervised = sum(count for count, learned in tokens if learned)
        total = sum(count for count, _ in tokens) + sum(more for more, _ in extra)
        return Entry(total, sum(visual for _, visual in extra), supervised, len(sizes))

    def _run(self, given: Mapping[str, Any], number: int) -> Entry:
        """A row through the collator itself."""
        collator = self.collator
        row = read_row(given, number, max_pixels=collator.max_pixels)
        if row.videos and getattr(collator.processor, "video_processor", None) is None:
            raise RowError(
                "video_unsupported", f"{row.name} has a video and the model's processor takes none; drop the row"
            )
        limit, collator.max_length = collator.max_length, None
        try:
            batch = collator.encode([row])
        except ValueError as error:
            if isinstance(error, RowError):
                raise
            raise RowError(
                "unreadable_video", f"{row.name}: the model's processor refuses its video: {error}"
            ) from error
        finally:
            collator.max_length = limit
        ids = batch["input_ids"][0]
        visual = sum(int((ids == token).sum()) for token in self._visual_ids())
        learned = int((batch["labels"][0] != IGNORE_INDEX).sum())
        return Entry(len(ids), visual, learned, len(row.images) + len(row.videos))

    def _visual_ids(self) -> set[int]:
        """Ids that stand for visual tokens once the processor has expanded the placeholders."""
        tokenizer, processor = self.collator.processor.tokenizer, self.collator.processor
        found = set()
        for kind in ("image", "video"):
            own, name = getattr(processor, f"{kind}_token_id", None), getattr(processor, f"{kind}_token", None)
            if own is None and isinstance(name, str):
                own = tokenizer.convert_tokens_to_ids(name)
            found |= {own} if isinstance(own, int) else set()
        return found

    @cached_property
    def additive(self) -> bool:
        """Whether an image adds the same tokens beside any text and beside another image.

        It does not where a processor writes line breaks around an image (they merge with the row's own) or shows several images
        of a row in less detail than one; rows of such a family are run through the collator.
        """
        mark, side = self.collator.segmenter.placeholders["image"], 224
        if not mark:
            return True
        texts = ["{0}", "\n\n{0}\n\n", "x {0} x", "{0}{0}", "{0}\n{0}"]
        try:
            extra = {self._expanded(text, mark, (side, side))[0] / text.count("{0}") for text in texts}
        except Exception:  # processors raise what they like; rows will say it
            return False
        return len(extra) == 1

    def _expanded(self, text: str, mark: str, size: tuple[int, int]) -> tuple[int, int]:
        """(tokens beyond those of the unexpanded text, visual tokens) of text with blank images."""
        processor, blank = self.collator.processor, Image.new("RGB", (size[1], size[0]))
        written = text.format(mark)
        given = dict(
            text=[written], images=[[blank] * text.count("{0}")], add_special_tokens=False, return_tensors="pt"
        )
        ids = processor(**given)["input_ids"][0]
        alone = len(processor.tokenizer(written, add_special_tokens=False)["input_ids"])
        return len(ids) - alone, sum(int((ids == token).sum()) for token in self._visual_ids())

    def _image(self, size: tuple[int, int], name: str) -> tuple[int, int]:
        """(tokens beyond those of the unexpanded placeholder, visual tokens) of an image of (height, width)."""
        if size not in self._extra:
            try:
                self._extra[size] = self._measured(size)
            except RowError:
                raise
            except Exception as error:  # processors raise what they like
                raise RowError(
                    "image_shape",
                    f"{name}: the model's processor refuses an image of {size[1]} x {size[0]} pixels: {error}",
                ) from error
        return self._extra[size]

    def _measured(self, size: tuple[int, int]) -> tuple[int, int]:
        count = getattr(self.collator.processor, "_get_num_multimodal_tokens", None)
        stated = None
        if count is not None:
            stated = int(count(image_sizes=[list(size)])["num_image_tokens"][0])
            if len(self._probes) >= 3 and len(set(self._probes)) == 1:
                return stated + self._probes[0], stated
        more, visual = self._expanded("{0}", self.collator.segmenter.placeholders["image"], size)
        if stated is not None and stated == visual:
            self._probes.append(more - stated)
        return more, visual
