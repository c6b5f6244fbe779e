"""Configs of the released checkpoints that recipes/ name, as published, to build their models without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

__all__ = ["RELEASED", "on_meta"]


def _text(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, tied: bool = False) -> dict[str, Any]:
    return dict(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip


def _llava(**text: Any) -> PreTrainedModel:
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=LlamaConfig(**text)))


QWEN_IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)


def _qwen2_vl(**text: Any) -> PreTrainedModel:
    tower = dict(depth=32, embed_dim=1280, hidden_size=text["hidden_size"], num_heads=16, mlp_ratio=4, patch_size=14)
    config = Qwen2VLConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=text["tie_word_embeddings"], **QWEN_IDS
    )
    return Qwen2VLForConditionalGeneration(config)


def _qwen25_vl(**text: Any) -> PreTrainedModel:
    tower = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=text["hidden_size"], patch_size=14,
        window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=text["tie_word_embeddings"], **QWEN_IDS
    )
    return Qwen2_5_VLForConditionalGeneration(config)


SMALL_TOWER = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
BIG_TOWER = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])


def _qwen3_vl(tower: dict[str, Any], **text: Any) -> PreTrainedModel:
    seen = dict(
        tower, num_heads=16, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=2304,
        out_hidden_size=text["hidden_size"],
    )  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text | {"head_dim": 128}, vision_config=seen, tie_word_embeddings=text["tie_word_embeddings"],
        **QWEN_IDS,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config)


def _internvl3(**text: Any) -> PreTrainedModel:
    tower = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=[448, 448],
        patch_size=[14, 14], attention_bias=True,
    )  # fmt: skip
    config = InternVLConfig(
        text_config=Qwen2Config(**text), vision_config=tower, image_token_id=151667, image_seq_length=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)


def _smolvlm2(**text: Any) -> PreTrainedModel:
    tower = dict(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    config = SmolVLMConfig(
        text_config=LlamaConfig(**text, head_dim=64), vision_config=tower, scale_factor=3, image_token_id=49190,
        tie_word_embeddings=False,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


#: hub id -> (billions of parameters as its page says, the model without weights)
RELEASED: dict[str, tuple[float, Callable[[], PreTrainedModel]]] = {
    "llava-hf/llava-1.5-7b-hf": (7.06, lambda: _llava(**_text(4096, 11008, 32, 32, 32, 32064))),
    "llava-hf/llava-1.5-13b-hf": (13.4, lambda: _llava(**_text(5120, 13824, 40, 40, 40, 32064))),
    "Qwen/Qwen2-VL-2B-Instruct": (2.21, lambda: _qwen2_vl(**_text(1536, 8960, 28, 12, 2, 151936, True))),
    "Qwen/Qwen2-VL-7B-Instruct": (8.29, lambda: _qwen2_vl(**_text(3584, 18944, 28, 28, 4, 152064))),
    "Qwen/Qwen2.5-VL-3B-Instruct": (3.75, lambda: _qwen25_vl(**_text(2048, 11008, 36, 16, 2, 151936, True))),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8.29, lambda: _qwen25_vl(**_text(3584, 18944, 28, 28, 4, 152064))),
    "Qwen/Qwen3-VL-2B-Instruct": (2.13, lambda: _qwen3_vl(SMALL_TOWER, **_text(2048, 6144, 28, 16, 8, 151936, True))),
    "Qwen/Qwen3-VL-4B-Instruct": (4.44, lambda: _qwen3_vl(SMALL_TOWER, **_text(2560, 9728, 36, 32, 8, 151936, True))),
    "Qwen/Qwen3-VL-8B-Instruct": (8.77, lambda: _qwen3_vl(BIG_TOWER, **_text(4096, 12288, 36, 32, 8, 151936))),
    "OpenGVLab/InternVL3-2B-hf": (2.09, lambda: _internvl3(**_text(1536, 8960, 28, 12, 2, 151674))),
    "OpenGVLab/InternVL3-8B-hf": (7.94, lambda: _internvl3(**_text(3584, 18944, 28, 28, 4, 151674))),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (2.25, lambda: _smolvlm2(**_text(2048, 8192, 24, 32, 32, 49280))),
}


def on_meta(name: str) -> PreTrainedModel:
    """The model of a hub id on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return RELEASED[name][1]()
