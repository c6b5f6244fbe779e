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
            found = self._count(checked) if not checked.videos else self._run(row, number)
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
        if getattr(collator.processor, "video_processor", None) is None:
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
        tokenizer, processor = self.collator.processor.tokenizer, self.collator.processor
        names = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
        return {tokenizer.convert_tokens_to_ids(name) for name in names if isinstance(name, str)}

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
        processor, segmenter = self.collator.processor, self.collator.segmenter
        text = segmenter.placeholders["image"]
        blank = Image.new("RGB", (size[1], size[0]))
        ids = processor(text=[text], images=[[blank]], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        alone = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        visual = sum(int((ids == token).sum()) for token in self._visual_ids())
        if stated is not None and stated == visual:
            self._probes.append(len(ids) - alone - stated)
        return len(ids) - alone, visual
