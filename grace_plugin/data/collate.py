"""Samples to batches, with labels on assistant turns only.

A sample is cut into segments (`segments.py`), each segment is tokenized alone, and the pieces are joined. So prompts have the
tokens they have when served, whatever the chat template, and no merge crosses the seam between a prompt and its answer. Nothing
is truncated: a sample longer than `max_length` is an error.

Images are decoded here, so in the workers of a DataLoader whose `collate_fn` this is. Conversations and texts that repeat are
rendered and tokenized once, so the processor must not be changed after a collator was made of it.

Packed, the samples of a batch are one sequence without padding: positions begin at 0 with each sample and there is no attention
mask, from which transformers keeps the samples apart (a block-diagonal mask for SDPA and eager, variable lengths for flash
attention). That is exact for families with one position per token; `Family.packs` says which.

Legend: B batch, S longest sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data.conversation import Sample, read_sample
from grace_plugin.data.errors import SampleError
from grace_plugin.data.image_layout import ProcessedSizes
from grace_plugin.data.key import SAMPLE_KEY, sample_key
from grace_plugin.data.media import DEFAULT_MAX_PIXELS
from grace_plugin.data.segments import Segment, Segmenter
from grace_plugin.data.shown import shown
from grace_plugin.data.tokens import IGNORE_INDEX, Piece, Recent, Tokens, visual_spans
from grace_plugin.vlm import VISUAL_SPANS, bounded_size

__all__ = ["IGNORE_INDEX", "ConversationCollator", "Piece"]

# pixels of a batch up to which its images of one size are processed as one tensor: faster as long as they fit a CPU cache,
# slower above (measured; transformers groups always or never)
TOGETHER = 2**21


_NONE = torch.zeros(0)


class ConversationCollator:
    """Callable that turns samples into a right-padded batch.

    Args:
        processor: a transformers processor with a chat template; not to be changed from then on.
        max_length: longest sample in tokens, visual tokens included; None for no limit.
        max_pixels: largest image in pixels; None for no limit.
        keys: put each sample's `sample_key` into the batch, a list of strings that no model takes.
        packed: one sequence for all samples, with `position_ids` instead of `attention_mask`.
        special_tokens: special tokens that samples may write; any other that a sample spells stays text.
        vocabulary: token ids that may be used, 0 to `vocabulary` - 1; None for all that the tokenizer has.
        context: tokens that the model takes, None for no limit.

    Raises:
        ValueError: no chat template, or `special_tokens` that the tokenizer does not have.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        max_pixels: int | None = DEFAULT_MAX_PIXELS,
        *,
        keys: bool = False,
        packed: bool = False,
        special_tokens: Sequence[str] = (),
        vocabulary: int | None = None,
        context: int | None = None,
    ) -> None:
        if getattr(processor, "chat_template", None) is None and processor.tokenizer.chat_template is None:
            raise ValueError("the processor has no chat template; set processor.chat_template to the model's own")
        self.processor = processor
        self.max_length, self.max_pixels, self.keys, self.packed = max_length, max_pixels, keys, packed
        self.vocabulary, self.context = vocabulary, context
        self.segmenter = Segmenter(processor, special_tokens=_token_list(special_tokens))
        self._tokens = Tokens(self.segmenter)
        self._recent: Recent[list[Segment]] = Recent()
        pad = processor.tokenizer.pad_token_id
        self.processed_sizes = ProcessedSizes(getattr(processor, "image_processor", None), max_pixels)
        # attention masks padding, but every model looks its id up: one that only the student has would fail in the teacher
        known = pad is not None and (vocabulary is None or pad < vocabulary)
        self._pad = {"input_ids": pad if known else 0, "labels": IGNORE_INDEX}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels (int64 [B, S]), the family's pixel entries, and keys if asked for.

        Packed: input_ids, position_ids, labels, int64 [1, sum of the samples' lengths].

        Raises:
            ValueError: a sample that cannot be used, named.
        """
        batch = self.encode([read_sample(sample, max_pixels=self.max_pixels) for sample in samples])
        if self.keys:
            batch[SAMPLE_KEY] = [sample_key(sample, special_tokens=self.segmenter.special_tokens) for sample in samples]
        return batch

    def encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate checked samples; the processor is called once for all pieces with media, the tokenizer for the others."""
        samples = [self._bounded(sample) for sample in samples]
        for sample in samples:  # of a stream or a sequence that was not checked, an image could ask for any memory here
            for image in sample.images:
                self.processed_sizes.check((image.height, image.width), sample.name)
        text = [self.pieces(number, sample) for number, sample in enumerate(samples)]
        waiting = [piece for own in text for piece in own if not piece.ids]
        with_media = [piece for piece in waiting if piece.images or piece.videos]
        plain = [piece for piece in waiting if not (piece.images or piece.videos)]
        batch: dict[str, Any] = {}
        if with_media:
            batch |= self._tokens.with_images(with_media, self._pixels(with_media))
            if (
                any(piece.videos for piece in with_media) and "pixel_values_videos" not in batch
            ):  # frames written as images
                batch[VISUAL_SPANS] = visual_spans(with_media, self.segmenter.placeholders)
        if plain:
            self._tokens.plain(plain)
        for own, sample in zip(text, samples, strict=True):
            self.check_length(sample.name, sum(len(piece.ids["input_ids"]) for piece in own))
        keys = [
            "input_ids",
            *(["mm_token_type_ids"] if "mm_token_type_ids" in self.processor.model_input_names else []),
            # segments that are all zero say nothing; where they mark images, attention inside an image reads them
            *(["token_type_ids"] if any(p.ids.get("token_type_ids", _NONE).any() for p in with_media) else []),
        ]
        for key in keys:
            batch[key] = self._join(
                [[p.ids.get(key, torch.zeros_like(p.ids["input_ids"])) for p in own] for own in text], key
            )
        if self.vocabulary is not None and highest_id(batch["input_ids"]) >= self.vocabulary:
            for own, sample in zip(text, samples, strict=True):
                self.check_ids(sample.name, max(highest_id(piece.ids["input_ids"]) for piece in own))
        labels = [[piece.labels() for piece in own] for own in text]
        if self.packed:
            # the first token of a packed sample would be predicted from the last one of the sample before
            labels = [[torch.cat(own).index_fill(0, torch.tensor([0]), IGNORE_INDEX)] for own in labels]
            batch["position_ids"] = torch.cat([torch.arange(sum(map(len, own))) for own in labels])[None]
        else:
            batch["attention_mask"] = self._join([[torch.ones_like(part) for part in own] for own in labels], "mask")
        batch["labels"] = self._join(labels, "labels")
        return batch

    def check_length(self, name: str, length: int) -> None:
        """Refuse a sample of more than `max_length` tokens, or of more than the model's context.

        Raises:
            SampleError: names the sample and both lengths.
        """
        if self.max_length is not None and length > self.max_length:
            raise SampleError(
                "too_long",
                f"{name} has {length} tokens and max_length is {self.max_length}; cutting it would shift or cut its image "
                "tokens or its answer. Raise max_length, lower the image resolution, or drop the sample",
            )
        if self.context is not None and length > self.context:
            raise SampleError(
                "too_long",
                f"{name} has {length} tokens and the model's context is {self.context} (max_position_embeddings); shorten the "
                "sample, lower the image resolution, or set rope scaling in the model's config",
            )

    def check_ids(self, name: str, highest: int) -> None:
        """Refuse a sample with a token id that the models do not have; `highest` is its largest.

        Raises:
            SampleError: names the sample, the token and the limit.
        """
        if self.vocabulary is not None and highest >= self.vocabulary:
            token = self.processor.tokenizer.convert_ids_to_tokens(highest)
            raise SampleError(
                "outside_vocabulary",
                f"{name} has the token {shown(token)} with id {highest}; the student's ids, or those that it shares with its "
                f"teacher, end at {self.vocabulary - 1}. Remove that text, or take the token out of the tokenizer",
            )

    def _bounded(self, sample: Sample) -> Sample:
        """Return the sample with those images resized whose parts ask for a size of their own."""
        bounds = sample.bounds if sample.images else []
        if not any(bounds):
            return sample
        images = [
            image.resize(self.bounded_size((image.height, image.width), asked, sample.name)[::-1]) if asked else image
            for image, asked in zip(sample.images, bounds, strict=True)
        ]
        return replace(sample, images=tuple(images))

    def bounded_size(self, size: tuple[int, int], asked: Mapping[str, int], name: str) -> tuple[int, int]:
        """Return (height, width) of an image of `size` whose part asks for bounds of its own.

        Raises:
            SampleError: the processor takes none for single images, or the bounds are outside its own.
        """
        if not asked:
            return size
        try:
            return bounded_size(getattr(self.processor, "image_processor", None), size, asked)
        except ValueError as error:
            raise SampleError("unknown_field", f"{name} gives {', '.join(asked)} for an image: {error}") from error

    def count_tokens(self, pieces: Sequence[Piece], written: Sequence[Sequence[str]]) -> list[int]:
        """Return the number of tokens of each piece, with `written` in place of its images."""
        mark = self.segmenter.placeholders["image"]
        for piece, images in zip(pieces, written, strict=True):
            if images:
                parts = piece.text.split(mark)
                piece.text = parts[0] + "".join(image + part for image, part in zip(images, parts[1:], strict=True))
        waiting = [piece for piece in pieces if not piece.ids]
        if waiting:
            self._tokens.plain(waiting)
        return [len(piece.ids["input_ids"]) for piece in pieces]

    def _join(self, samples: list[list[Tensor]], key: str) -> Tensor:
        """Join the samples: padded on the right, or packed into one sequence."""
        joined = [torch.cat(parts) for parts in samples]
        if self.packed:
            return torch.cat(joined)[None]
        return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=self._pad.get(key, 0))

    def _pixels(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return the processor's arguments for the pieces' images and videos; frames are not sampled again."""
        videos = [video for piece in pieces for video in piece.videos]
        # which text an image belongs to is part of some formats
        images: list[Any] = [piece.images for piece in pieces]
        if videos:
            images = [image for own in images for image in own]
        given: dict[str, Any] = {"images": images} if any(piece.images for piece in pieces) else {}
        if sum(image.width * image.height for piece in pieces for image in piece.images) <= TOGETHER:
            given["disable_grouping"] = False
        if videos:
            given["videos"] = [video.frames for video in videos]
            # by default video processors sample the frames again, at a rate of their own
            given["do_sample_frames"] = False
            given["video_metadata"] = [
                {"fps": v.fps, "total_num_frames": v.total, "frames_indices": list(v.indices)} for v in videos
            ]
        return given

    def segments(self, sample: Sample) -> list[Segment]:
        """Return the sample's segments, remembered by what the sample says."""
        # repr is the cache key: messages are nested dicts, and JSON would refuse values that templates accept
        said = repr((sample.messages, len(sample.images), len(sample.videos), sample.tools))
        found = self._recent.get(said)
        if found is None:
            found = self.segmenter.segments(sample)
            self._recent.put(said, found, len(said))
        return found

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer puts before a text."""
        return list(self.processor.tokenizer("")["input_ids"])

    def pieces(self, number: int, sample: Sample) -> list[Piece]:
        """Return the pieces of a sample; the first gets the tokens that the tokenizer puts before a text, if any."""
        images, videos = list(sample.images), list(sample.videos)
        pieces: list[Piece] = []
        before = ""
        for segment in self.segments(sample):
            piece = Piece(number, segment.text, segment.supervised, before=before)
            if segment.literal:
                piece.ids = {"input_ids": torch.tensor(self.segmenter.literal_ids(segment.text), dtype=torch.int64)}
            else:
                counts = [
                    self.segmenter.count(segment.text, kind) if left else 0
                    for kind, left in (("image", images), ("video", videos))
                ]
                piece.images, images = images[: counts[0]], images[counts[0] :]
                piece.videos, videos = videos[: counts[1]], videos[counts[1] :]
            # what a literal spells is cut to words; a special token at its end is none
            before = segment.text[-1:] if segment.literal else segment.text
            pieces.append(piece)
        opening = self.processor.tokenizer.bos_token
        if not (opening and pieces[0].text.startswith(opening)):
            pieces[0].prefix = self._start
            if self._start and pieces[0].ids:
                pieces.insert(0, Piece(number, "", False, ids={"input_ids": torch.tensor(self._start)}))
        return pieces


def highest_id(ids: Tensor) -> int:
    """Return the largest of some token ids; -1 for none."""
    return int(ids.max()) if ids.numel() else -1


def _token_list(given: Sequence[str]) -> tuple[str, ...]:
    """Return `special_tokens` as a tuple; one string is taken for one token."""
    listed = isinstance(given, (list, tuple, set, frozenset))
    tokens = (given,) if isinstance(given, str) else tuple(sorted(given, key=str)) if listed else ()
    if not (listed or isinstance(given, str)) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"special_tokens is {shown(given)}; give a list of texts")
    return tokens
