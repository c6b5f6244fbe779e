"""The text-only sample: a sample without its images and videos, to see what a model answers from the text alone.

Image and video parts are removed from the conversation and the model's own chat template renders the rest, so whatever the
template writes for an image (line breaks, start and end tokens, tags of tiles) is removed with it. The supervised tokens
must stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grace_plugin.data import ConversationCollator, SampleError, check_sample
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.vlm import Family


def _supervised(batch: Mapping[str, Tensor]) -> list[int]:
    # the first token is never predicted
    labels = batch["labels"][0, 1:]
    return labels[labels != IGNORE_INDEX].tolist()


def text_only_sample(
    sample: Mapping[str, Any], number: int, collator: ConversationCollator, family: Family, config: Any
) -> dict[str, Any] | None:
    """Return the sample without images and videos, or None for a sample that has none.

    Raises:
        SampleError: a user turn was only an image, the chat template writes image tokens without an image, or it renders
            other answers.
    """
    checked = check_sample(sample, number)
    if not checked.images and not checked.videos:
        return None
    messages = [
        {**turn, "content": [part for part in turn["content"] if part["type"] == "text"]} for turn in checked.messages
    ]
    text_only = {"id": sample.get("id"), "messages": messages, "images": [], "videos": [], "tools": list(checked.tools)}
    batch = collator([text_only])
    left = sum(int((batch["input_ids"] == token).sum()) for token in family.token_ids(config).values())
    if left:
        raise SampleError(
            "template",
            f"{checked.name}: the chat template of family '{family.model_type}' writes {left} image token(s) also without an "
            "image, so the text-only sample cannot be formed",
        )
    if _supervised(batch) != _supervised(collator([sample])):
        raise SampleError(
            "template", f"{checked.name}: without its images the chat template renders other answers than with them"
        )
    return text_only


def prompt_text(sample: Mapping[str, Any], collator: ConversationCollator) -> str:
    """Return the conversation as the chat template renders it up to the first answer, one placeholder for each image."""
    text = ""
    for segment in collator.segmenter.segments(check_sample(sample)):
        if segment.supervised:
            break
        text += segment.text
    return text
