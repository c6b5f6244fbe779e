"""Tiny random vision-language models with their processors, built from config without any hub.

Every family of the registry, each a real transformers class of 2 to 4 million parameters whose decoder widths are
multiples of 128, so that group sizes 32 and 128 both fit. `hidden`, `layers` and `vocab_rows` make a bigger teacher or
one with a padded vocabulary; `words="other"` gives the same family another tokenizer, for refusals. LLaVA and Qwen3-VL
chat templates carry `{% generation %}` marks, the others do not. Embeddings are tied in Qwen2.5-VL, SmolVLM and Gemma 3. A
build takes well under two seconds; weights are drawn wide (std 0.08) so that an untrained model does not repeat one
token when it is greedy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests import tiny_deepseek, tiny_idefics, tiny_llava
from tests.tiny_text import LLAVA_TEMPLATE, QWEN2_TEMPLATE, QWEN3_TEMPLATE, make_samples, make_tokenizer

__all__ = ["EVERY", "FAMILIES", "build", "make_samples", "make_tokenizer", "save"]

FAMILIES = ("llava", "qwen2_vl", "qwen3_vl")
"""One family of each kind; tests that are not about families go over these."""
HEAD_DIM, KV_HEADS = 64, 2


def build(
    family: str,
    *,
    seed: int = 0,
    hidden: int = 256,
    layers: int = 3,
    vocab_rows: int | None = None,
    words: str = "plain",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random float32 model in eval mode and its processor.

    hidden: decoder width, a multiple of 256 (MLP: 1.5 times as wide). layers: decoder depth. vocab_rows: rows of the
    embedding and the head, at least the tokenizer's length, which is the default. words: "plain" or "other" tokenizer.
    The global random state is left as it was.
    """
    if hidden % 256:
        raise ValueError(f"hidden={hidden} is not a multiple of 256")
    tokenizer = make_tokenizer(family, words)
    vocab = vocab_rows or len(tokenizer)
    if vocab < len(tokenizer):
        raise ValueError(f"vocab_rows={vocab} is below the tokenizer's {len(tokenizer)}")
    make = _BUILDERS.get(family) or _UNREGISTERED[family]
    text = dict(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 3 // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM, head_dim=HEAD_DIM, num_key_value_heads=KV_HEADS, max_position_embeddings=2048,
        initializer_range=0.08, rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = make(tokenizer, text)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model.eval(), processor


def save(model: PreTrainedModel, processor: ProcessorMixin, path: str | Path, dtype: Any = torch.bfloat16) -> Path:
    """Write model and processor under `path` as a hub checkpoint of that family would stand there; returns `path`.

    Parameters are cast one by one (buffers such as rotary frequencies stay float32), in place.
    """
    path = Path(path)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(path)
    processor.save_pretrained(path)
    _hub_key_names(path / "model.safetensors")
    return path


def _llava(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    side, patch = 56, 14
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer, patch_size=patch, vision_feature_select_strategy="default", chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=side,
            patch_size=patch, projection_dim=128, initializer_range=0.05,
        ),
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
             "vision_end": "<|vision_end|>"}  # fmt: skip
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _qwen2_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = dict(patch_size=14, temporal_patch_size=2, merge_size=2)
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size, **vision), tokenizer, Qwen2VLVideoProcessor(size=size, **vision),
        chat_template=QWEN2_TEMPLATE,
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    del text["head_dim"]
    config = Qwen2VLConfig(
        text_config=dict(text, rope_parameters=rope),
        vision_config=dict(
            depth=2, embed_dim=128, hidden_size=text["hidden_size"], mlp_ratio=2, num_heads=4, in_channels=3,
            patch_size=14, spatial_merge_size=2, temporal_patch_size=2, initializer_range=0.05,
        ),
        tie_word_embeddings=False, **_qwen_ids(tokenizer),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config), processor


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = dict(patch_size=16, temporal_patch_size=2, merge_size=2)
    size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=size, **vision, **half), tokenizer,
        Qwen3VLVideoProcessor(size=size, **vision, **half), chat_template=QWEN3_TEMPLATE,
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=dict(text, rope_parameters=rope),
        vision_config=dict(
            depth=3, hidden_size=128, intermediate_size=256, num_heads=4, in_channels=3, patch_size=16,
            spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=text["hidden_size"],
            num_position_embeddings=64, deepstack_visual_indexes=[0, 1], initializer_range=0.05,
        ),
        tie_word_embeddings=False, **_qwen_ids(tokenizer),
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config), processor


def _qwen3_vl_moe(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen3-VL with four experts in each layer, two of them chosen for a token."""
    dense, processor = _qwen3_vl(tokenizer, text)
    dense_text = dense.config.text_config
    experts = dict(
        moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, norm_topk_prob=True
    )
    config = Qwen3VLMoeConfig(
        text_config=text | experts | {"rope_parameters": dict(dense_text.rope_parameters)},
        vision_config={k: v for k, v in dense.config.vision_config.to_dict().items() if k != "model_type"},
        tie_word_embeddings=False, **_qwen_ids(tokenizer),
    )  # fmt: skip
    model = Qwen3VLMoeForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.normal_(std=0.5)  # experts are told apart, not drawn by rounding
    return model, processor


def _qwen25_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Window attention in the tower, tied embeddings as in the 3B model."""
    vision = dict(patch_size=14, temporal_patch_size=2, merge_size=2)
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size, **vision), tokenizer, Qwen2VLVideoProcessor(size=size, **vision),
        chat_template=QWEN2_TEMPLATE,
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    del text["head_dim"]
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope, "tie_word_embeddings": True},
        vision_config=dict(
            depth=2, hidden_size=128, intermediate_size=256, out_hidden_size=text["hidden_size"], num_heads=4,
            in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=56,
            fullatt_block_indexes=[1], tokens_per_second=2, initializer_range=0.05,
        ),
        tie_word_embeddings=True, **_qwen_ids(tokenizer),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), processor


_BUILDERS = {
    "llava": _llava, "llava_next": tiny_llava.llava_next, "llava_onevision": tiny_llava.llava_onevision,
    "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen25_vl, "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "internvl": tiny_llava.internvl, "smolvlm": tiny_idefics.smolvlm, "idefics3": tiny_idefics.idefics3,
    "gemma3": tiny_llava.gemma3, "mistral3": tiny_llava.mistral3, "pixtral": tiny_llava.pixtral,
}  # fmt: skip
_UNREGISTERED = {"deepseek_vl": tiny_deepseek.deepseek_vl}  # of examples/custom_family.py
EVERY = tuple(_BUILDERS)
"""Every architecture; `pixtral` is LLaVA's class around another tower."""


def _hub_key_names(weights: Path) -> None:
    """Published keys of CLIP and SigLIP towers say `vision_tower.vision_model.`; a model built from config omits it."""
    tensors = load_file(weights)
    if not any(".post_layernorm." in name for name in tensors):  # another tower
        return
    old, new = "vision_tower.", "vision_tower.vision_model."
    named = {new + k[len(old) :] if k.startswith(old) and not k.startswith(new) else k: v for k, v in tensors.items()}
    if named.keys() != tensors.keys():
        save_file(named, weights, metadata={"format": "pt"})
