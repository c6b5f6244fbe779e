"""Inspect one sample: whether it can be used, and how many tokens it becomes, without running the image processor on it.

Images are decoded in full, so that a truncated file is found before training. What the processor writes for an image depends
on its size and on whether the text has other images, so it is read from blank images once per size (`image_layout.py`); the
sample's text with that in it is tokenized as a batch would be. A sample with videos is run through the collator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image

from grace_plugin.data.collate import IGNORE_INDEX, ConversationCollator, highest_id
from grace_plugin.data.conversation import Sample, check_sample, read_sample, sample_name
from grace_plugin.data.errors import SampleError
from grace_plugin.data.image_layout import Layout
from grace_plugin.data.media import decode_image, image_size
from grace_plugin.data.shown import shortened
from grace_plugin.data.video import DecoderMissingError

__all__ = ["Entry", "Measure"]


class Entry(NamedTuple):
    """The result of inspecting a sample: its numbers of tokens, or why it is not used.

    Attributes:
        tokens, visual, supervised: all tokens, those of images and videos, those that carry loss.
        media: images and videos.
        reason, message: why the sample is not used; "" otherwise.
        mark, digest: hashes of the id and of the whole content; "" for a sample without an id.
        stamp: hash of size and time of the files it names; "" for none.
        video_frames: frames of the longest video, 0 for none.
        highest: largest token id.
        unused, spelled: fields that nothing reads, and special tokens that stay text, one a line.
        content: hash of the content as stored, which an index compares.
    """

    tokens: int = 0
    visual: int = 0
    supervised: int = 0
    media: int = 0
    reason: str = ""
    message: str = ""
    mark: str = ""
    digest: str = ""
    stamp: str = ""
    video_frames: int = 0
    highest: int = -1
    unused: str = ""
    spelled: str = ""
    content: str = ""


def _content(value: Any) -> Any:
    if isinstance(value, Image.Image):
        # of decoded pixels: two PIL images of one file compare equal whatever they were opened from
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_content).encode()).hexdigest()[:24]


@dataclass
class Measure:
    """Callable (sample, number) -> Entry for one collator; never raises for a sample, only where no video can be decoded at
    all.

    decode: decode every image; False reads headers only, and a truncated file is found when it is used.
    """

    collator: ConversationCollator
    decode: bool = True

    def __post_init__(self) -> None:
        self.layout = Layout(self.collator.processor, self.collator.segmenter.placeholders["image"])

    def __call__(self, sample: Any, number: int) -> Entry:
        name = sample_name(sample, number)
        mark = ""
        try:
            checked = check_sample(sample, number)
            if sample.get("id") is not None:
                mark = _digest(sample["id"])
            found = self._run(sample, number) if checked.videos else self._count(checked)
            # of images that are decoded by now
            digest = _digest(dict(sample)) if mark else ""
            spelled = [part.text for part in self.collator.segments(checked) if part.literal]
            return found._replace(
                mark=mark,
                digest=digest,
                unused="\n".join(checked.unused),
                spelled="\n".join(filter(str.isprintable, spelled)),
            )
        except SampleError as error:
            text = str(error)
            return Entry(
                reason=error.reason, message=text if text.startswith(name) else f"sample {number}: {text}", mark=mark
            )
        except DecoderMissingError:  # an error of the environment, not of the sample
            raise
        except Exception as error:  # fields of unforeseen types: one sample must not end the check of all
            return Entry(
                reason="malformed",
                message=f"{name} cannot be read: {type(error).__name__}: {shortened(error)}; correct or drop it",
                mark=mark,
            )

    def _count(self, sample: Sample) -> Entry:
        sizes = [image_size(image, sample.name, self.collator.max_pixels) for image in sample.images]
        bounds = sample.bounds if sizes else []
        sizes = [
            self.collator.bounded_size(size, asked, sample.name) for size, asked in zip(sizes, bounds, strict=True)
        ]
        for size in sizes:
            self.collator.processed_sizes.check(size, sample.name)
        if self.decode:
            for image in sample.images:
                decode_image(image, sample.name, self.collator.max_pixels)
        pieces = self.collator.pieces(0, replace(sample, images=tuple(sizes)))
        shown = [
            [self.layout.written(size, len(piece.images) == 1, sample.name) for size in piece.images]
            for piece in pieces
        ]
        counts = self.collator.count_tokens(pieces, [[one.text for one in own] for own in shown])
        counts = [count + sum(one.cut for one in own) for count, own in zip(counts, shown, strict=True)]
        supervised = sum(count for count, piece in zip(counts, pieces, strict=True) if piece.supervised)
        highest = max((highest_id(piece.ids["input_ids"]) for piece in pieces), default=-1)
        visual = sum(one.visual for own in shown for one in own)
        return Entry(sum(counts), visual, supervised, len(sizes), highest=highest)

    def _run(self, given: Mapping[str, Any], number: int) -> Entry:
        """Run a sample through the collator."""
        collator = self.collator
        sample = read_sample(given, number, max_pixels=collator.max_pixels)
        if sample.videos and getattr(collator.processor, "video_processor", None) is None:
            raise SampleError(
                "video_unsupported", f"{sample.name} has a video and the model's processor takes none; drop the sample"
            )
        # lengths and ids are checked against the run's limits afterwards: an entry outlives them in the index
        limits = collator.max_length, collator.context, collator.vocabulary
        collator.max_length = collator.context = collator.vocabulary = None
        try:
            batch = collator.encode([sample])
        except SampleError:
            raise
        except Exception as error:  # processors raise what they like, here of a video that was decoded
            raise SampleError(
                "video_unsupported",
                f"{sample.name}: the model's processor refuses its video: {shortened(error)}; drop the sample",
            ) from error
        finally:
            collator.max_length, collator.context, collator.vocabulary = limits
        ids = batch["input_ids"][0]
        visual = {token: int((ids == token).sum()) for token in self.layout.visual_ids()}
        supervised = int((batch["labels"][0] != IGNORE_INDEX).sum())
        frames = max((len(video.frames) for video in sample.videos), default=0)
        images = len(sample.images) + len(sample.videos)
        return Entry(len(ids), sum(visual.values()), supervised, images, video_frames=frames, highest=highest_id(ids))
