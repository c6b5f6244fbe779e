"""Tiny builders of Idefics3 and SmolVLM: a tower over tiles and the whole image, a connector, a Llama decoder."""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.tiny_text import chat_template

__all__ = ["idefics3", "smolvlm"]

Built = tuple[PreTrainedModel, ProcessorMixin]
SIDE, PATCH, SHUFFLE = 56, 14, 2
TOWER: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
    initializer_range=0.05,
)  # fmt: skip
SIZES = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
TEMPLATE = chat_template("<image>", end="<end_of_utterance>")
PER_TILE = (SIDE // PATCH // SHUFFLE) ** 2


def _config(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> dict[str, Any]:
    return dict(
        vision_config=dict(TOWER), text_config=LlamaConfig(**text), scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def idefics3(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Built:
    """Untied embeddings."""
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**SIZES), tokenizer, image_seq_len=PER_TILE, chat_template=TEMPLATE
    )
    config = Idefics3Config(tie_word_embeddings=False, **_config(tokenizer, text))
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Built:
    """Tied embeddings."""
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**SIZES), tokenizer, SmolVLMVideoProcessor(**SIZES), image_seq_len=PER_TILE,
        chat_template=TEMPLATE,
    )  # fmt: skip
    config = SmolVLMConfig(tie_word_embeddings=True, **_config(tokenizer, text | {"tie_word_embeddings": True}))
    return SmolVLMForConditionalGeneration(config), processor
