"""The same row without its pictures: what a model says from the text alone.

The image and video parts are taken out of the conversation, and the family's own chat template renders what is left; then the
row is tokenised as any row. So whatever the template writes for a picture goes with it (`<image>` and a line break in
LLaVA-1.5, the vision start and end tokens in the Qwen-VL families, the tags around tiles in SmolVLM and Idefics3), nothing
stands in its place, and the answer's tokens are the same. This holds for every family of the registry, because all of them
take conversations of text.

Refused for a row, with a sentence: a user turn that was only a picture, a template that cannot render the row without it,
answers that come out as other tokens, and a prompt in which image tokens are left over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grace_plugin.data import ConversationCollator, SampleError, check_sample
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.vlm import Family

__all__ = ["blind_row", "prompt_text"]


def _learned(batch: Mapping[str, Tensor]) -> list[int]:
    labels = batch["labels"][0, 1:]
    return labels[labels != IGNORE_INDEX].tolist()


def blind_row(
    row: Mapping[str, Any], number: int, collator: ConversationCollator, family: Family, config: Any
) -> dict[str, Any] | None:
    """The row without pictures, or None for a row that has none.

    Raises:
        SampleError: the row cannot be asked without its pictures; names the row and why.
    """
    checked = check_sample(row, number)
    if not checked.images and not checked.videos:
        return None
    messages = [
        {**turn, "content": [part for part in turn["content"] if part["type"] == "text"]} for turn in checked.messages
    ]
    blind = {"id": row.get("id"), "messages": messages, "images": [], "videos": [], "tools": list(checked.tools)}
    batch = collator([blind])
    left = sum(int((batch["input_ids"] == token).sum()) for token in family.token_ids(config).values())
    if left:
        raise SampleError(
            "template",
            f"{checked.name}: the chat template of family '{family.model_type}' writes {left} image token(s) also without an "
            "image; text-only damage cannot be measured on it",
        )
    if _learned(batch) != _learned(collator([row])):
        raise SampleError(
            "template", f"{checked.name}: without its pictures the chat template renders other answers than with them"
        )
    return blind


def prompt_text(row: Mapping[str, Any], collator: ConversationCollator) -> str:
    """The row's conversation as the chat template renders it, one placeholder for each picture, up to the first answer."""
    text = ""
    for segment in collator.segmenter.segments(check_sample(row)):
        if segment.learned:
            break
        text += segment.text
    return text
