"""Tiny builders of the families with a LLaVA layout: LLaVA-NeXT, LLaVA-OneVision, Pixtral, Mistral 3, InternVL3, Gemma 3.

Each takes the tokenizer and the decoder's config values from `tests.tiny.build` and returns a random model and its processor.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.tiny_text import LLAVA_TEMPLATE, chat_template

__all__ = ["gemma3", "internvl", "llava_next", "llava_onevision", "mistral3", "pixtral"]

Built = tuple[PreTrainedModel, ProcessorMixin]
SIDE, PATCH = 56, 14
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
TOWER: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
    initializer_range=0.05,
)  # fmt: skip


def _mark(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def llava_next(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Built:
    """CLIP tower, Llama decoder, a tile_grid of up to four tiles."""
    square = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=PINPOINTS)
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(projection_dim=128, **(TOWER | {"num_hidden_layers": 3})),
        text_config=LlamaConfig(**text), image_token_index=_mark(tokenizer, "<image>"), image_grid_pinpoints=PINPOINTS,
        image_seq_length=(SIDE // PATCH) ** 2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Built:
    """SigLIP tower, Qwen2 decoder, a tile_grid of up to four tiles; videos."""
    square = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS), tokenizer,
        LlavaOnevisionVideoProcessor(size=square), num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full", chat_template=chat_template("<image>\n", "<video>\n"),
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **TOWER), text_config=Qwen2Config(**_headless(text)),
        image_token_index=_mark(tokenizer, "<image>"), video_token_index=_mark(tokenizer, "<video>"),
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), processor


def _headless(text: dict[str, Any]) -> dict[str, Any]:
    """Qwen2's attention derives the width of a head itself."""
    return {key: value for key, value in text.items() if key != "head_dim"}


def _pixtral_processor(tokenizer: PreTrainedTokenizerFast, merge: int) -> ProcessorMixin:
    images = PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size={"height": PATCH, "width": PATCH})
    return PixtralProcessor(
        images, tokenizer, patch_size=PATCH, spatial_merge_size=merge, chat_template=chat_template("[IMG]", end="</s>")
    )


def pixtral(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Built:
    """LLaVA's class around a Pixtral tower: images of their own resolution."""
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**(TOWER | {"image_size": 2 * SIDE})), text_config=MistralConfig(**text),
        image_token_index=_mark(tokenizer, "[IMG]"), vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), _pixtral_processor(tokenizer, 1)


def mistral3(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Built:
    """Pixtral tower, two by two patches merged, Mistral decoder."""
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**(TOWER | {"image_size": 2 * SIDE})), text_config=MistralConfig(**text),
        image_token_index=_mark(tokenizer, "[IMG]"), vision_feature_layer=-1, spatial_merge_size=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(config), _pixtral_processor(tokenizer, 2)


def internvl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Built:
    """InternViT tower with pixel shuffle, Qwen2 decoder, up to three tiles and a thumbnail."""
    square = {"height": SIDE, "width": SIDE}
    per_tile = (SIDE // PATCH // 2) ** 2
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=3), tokenizer,
        InternVLVideoProcessor(size=square), image_seq_length=per_tile,
        chat_template=chat_template("<IMG_CONTEXT>\n", "<video>\n"),
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "attention_bias": True},
        text_config=Qwen2Config(**_headless(text)), image_token_id=_mark(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=per_tile, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), processor


def gemma3(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Built:
    """SigLIP tower, sixteen tokens an image, tied embeddings, local and global attention layers."""
    per_image = (SIDE // PATCH) ** 2
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer, image_seq_length=per_image,
        chat_template=chat_template("<start_of_image>", end="<eos>"),
    )  # fmt: skip
    tied = text | {"tie_word_embeddings": True}
    config = Gemma3Config(
        text_config=dict(tied, sliding_window=64, query_pre_attn_scalar=text["head_dim"]),
        vision_config=SiglipVisionConfig(vision_use_head=False, **TOWER), mm_tokens_per_image=per_image,
        image_token_index=_mark(tokenizer, "<image_soft_token>"), boi_token_index=_mark(tokenizer, "<start_of_image>"),
        eoi_token_index=_mark(tokenizer, "<end_of_image>"), tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.1)  # born as zeros
    # tied, and multiplied by sqrt(width) on the way in: at 0.08 logits reach 16, where BF16 spaces them 0.125 apart
    model.model.language_model.embed_tokens.weight.data.mul_(0.5)
    return model, processor
