"""Token ids of the pieces of samples, each tokenized apart from the others.

Pieces with images or videos go through the processor in one call, since the text it writes for them depends on them. The others
go through the tokenizer in one call, and only those that were not tokenized lately: questions and answers repeat.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from grace_plugin.data.segments import Segmenter
from grace_plugin.data.video import Video

__all__ = ["IGNORE_INDEX", "Piece", "Recent", "Tokens", "visual_spans"]

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by key, of which the one unused for longest goes first.

    Copies and pickles are empty: what one process remembers is not sent to another.

    Args:
        entries: how many values are kept at most.
        longest: texts of more characters are not kept, which bounds the memory as well.
    """

    def __init__(self, entries: int = 4096, longest: int = 1000) -> None:
        self.entries, self.longest = entries, longest
        self._held: OrderedDict[Hashable, Value] = OrderedDict()

    def __reduce__(self) -> tuple[type[Recent[Value]], tuple[int, int]]:
        return type(self), (self.entries, self.longest)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> Value | None:
        """Return the value, or None where there is none; it must not be changed."""
        value = self._held.pop(key, None)
        if value is not None:
            self._held[key] = value
        return value

    def put(self, key: Hashable, value: Value, characters: int) -> None:
        """Keep the value of a key that holds so many characters."""
        if characters > self.longest:
            return
        self._held[key] = value
        while len(self._held) > self.entries:
            self._held.popitem(last=False)


def visual_spans(pieces: Sequence[Any], placeholders: Mapping[str, str]) -> list[int]:
    """Return 1 for an image and the number of frames for a video, in the order of the text.

    Args:
        pieces: of all samples, in order, each with its text and the `Video`s in it.
        placeholders: what the chat template writes for an image and for a video.
    """
    pattern = re.compile("|".join(re.escape(text) for text in placeholders.values() if text))
    found = []
    for piece in pieces:
        frames = iter([len(video.frames) for video in piece.videos])
        found += [next(frames) if m.group() == placeholders["video"] else 1 for m in pattern.finditer(piece.text)]
    return found


IGNORE_INDEX = -100
_ALONG_SEQUENCE = ("input_ids", "mm_token_type_ids", "token_type_ids")


@dataclass
class Piece:
    """A segment of a sample: tokenized apart, ids without padding. `before` is the text before it in the sample."""

    sample: int
    text: str
    supervised: bool
    images: list[Any] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    before: str = ""
    prefix: list[int] = field(default_factory=list)
    ids: dict[str, Tensor] = field(default_factory=dict)

    def labels(self) -> Tensor:
        """Return int64 [tokens of the piece]: the ids of an answer, IGNORE_INDEX in a prompt."""
        ids = self.ids["input_ids"]
        return ids if self.supervised else torch.full_like(ids, IGNORE_INDEX)

    def fill(self, ids: Mapping[str, Tensor]) -> None:
        """Take over the ids of the text, after those of the prefix."""
        self.ids = dict(ids)
        if self.prefix:
            start = torch.tensor(self.prefix)
            self.ids = {key: torch.cat([start * (key == "input_ids"), value]) for key, value in ids.items()}


@dataclass
class Tokens:
    """Ids of pieces for the segmenter's processor, which is not to change from then on."""

    segmenter: Segmenter
    recent: Recent[dict[str, Tensor]] = field(default_factory=Recent)

    def plain(self, pieces: Sequence[Piece]) -> None:
        """Fill the ids of pieces without images and videos."""
        asked = {(self._before(piece), piece.text): piece for piece in pieces}
        found = {key: ids for key in asked if (ids := self.recent.get(key)) is not None}
        new = [key for key in asked if key not in found]
        if new:
            anchors = [self._anchor(piece) for key, piece in asked.items() if key not in found]
            texts = [anchor + text for anchor, (_, text) in zip(anchors, new, strict=True)]
            out = self.segmenter.processor.tokenizer(text=texts, add_special_tokens=False)
            for number, (key, anchor) in enumerate(zip(new, anchors, strict=True)):
                skip = len(self.ids(anchor)) if anchor else 0
                found[key] = {
                    name: torch.tensor(out[name][number][skip:], dtype=torch.int64)
                    for name in _ALONG_SEQUENCE
                    if name in out
                }
                self.recent.put(key, found[key], len(key[1]))
        for piece in pieces:
            piece.fill(found[self._before(piece), piece.text])

    def with_images(self, pieces: Sequence[Piece], pixels: Mapping[str, Any]) -> dict[str, Tensor]:
        """Fill the ids of pieces with images and videos (padding and anchors taken off again); what belongs to the pixels."""
        # right padding: the pieces are cut at their length again, and positions inside a piece must not shift
        anchors = [self._anchor(piece) for piece in pieces]
        out = dict(
            self._padding_processor(
                text=[anchor + piece.text for anchor, piece in zip(anchors, pieces, strict=True)],
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                return_tensors="pt",
                **pixels,
            )
        )
        lengths = out.pop("attention_mask").sum(dim=1).tolist()
        along = {key: out.pop(key) for key in _ALONG_SEQUENCE if key in out}
        for number, (piece, length, anchor) in enumerate(zip(pieces, lengths, anchors, strict=True)):
            skip = len(self.ids(anchor)) if anchor else 0
            piece.fill({key: value[number, skip:length] for key, value in along.items()})
        return {key: value for key, value in out.items() if isinstance(value, Tensor)}

    @cached_property
    def _padding_processor(self) -> Any:
        """The processor, able to pad: its tensors need texts of one length, also where the tokenizer names no pad token.

        Which token pads does not matter, for what is padded is cut off again.
        """
        processor = self.segmenter.processor
        if processor.tokenizer.pad_token is not None:
            return processor
        # a copy: a pad token set on the run's tokenizer would be saved with the checkpoint
        able, tokenizer = copy.copy(processor), copy.deepcopy(processor.tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        able.tokenizer = tokenizer
        return able

    def ids(self, text: str) -> list[int]:
        """Return ids of a text, nothing added."""
        return self.segmenter.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _prefixes_space(self) -> bool:
        """Whether the tokenizer puts a word-start mark before any text, also one that is in the middle of a sample."""
        tokens = self.segmenter.processor.tokenizer.convert_ids_to_tokens(self.ids("a"))
        return bool(tokens) and tokens[0].startswith(("\u2581", "\u0120"))

    def _before(self, piece: Piece) -> str:
        """Return what of the text in front of a piece could be its anchor: a special token, or a character."""
        if not piece.before or not self._prefixes_space:
            return ""
        return self.segmenter.special.ending(piece.before) or piece.before[-1]

    def _anchor(self, piece: Piece) -> str:
        """Return text to tokenize in front of a piece, so that it gets no word-start mark it would not have in the sample.

        Only for tokenizers that add such a mark, and only where the anchor's tokens stay apart from the piece's.
        """
        anchor = self._before(piece)
        if not anchor:
            return ""
        alone = self.ids(anchor)
        return anchor if self.ids(anchor + piece.text)[: len(alone)] == alone else ""
