"""Tiny builder of DeepSeek-VL, whose family is registered by `examples/custom_family.py`."""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from tests.tiny_text import chat_template

__all__ = ["deepseek_vl"]

SIDE, PATCH = 56, 14


def deepseek_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A SigLIP tower, an aligner and a Llama decoder; untied embeddings."""
    vision = dict(
        model_type="siglip_vision_model", hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, image_size=SIDE, patch_size=PATCH, initializer_range=0.05,
    )  # fmt: skip
    processor = DeepseekVLProcessor(
        DeepseekVLImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer,
        chat_template=chat_template("<image_placeholder>", end="</s>"), num_image_tokens=(SIDE // PATCH) ** 2,
    )  # fmt: skip
    config = DeepseekVLConfig(
        vision_config=vision, text_config=LlamaConfig(**text), tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return DeepseekVLForConditionalGeneration(config), processor
