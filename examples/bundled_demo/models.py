"""Define the bundled models: one tokenizer, one processor, two LLaVA configs.

Teacher and student share the tokenizer (one token per word, about 80 words) and the frozen CLIP vision tower, as LLaVA-1.5
7B and 13B do; their decoders differ in width. Every decoder width is a multiple of 128, so that W4A16 with group 128 fits
vLLM's INT4 kernels. An image of 96 x 96 pixels gives 9 visual tokens, one per cell; the image processor passes it unchanged.

Prompts: `<s><user><image>...question<assistant>answer</s>`; the tokenizer's normalizer lowers capital letters and drops ? , . !
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

from .images import CELL, GRID, SIZE
from .questions import vocabulary

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)
WORDS = (*SPECIAL, *vocabulary())
VISUAL_TOKENS = GRID * GRID
ROWS = -(-len(WORDS) // 32) * 32  # of the embedding table, padded to a multiple of 32 as in published checkpoints

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}<user>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% else %}<assistant>{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_processor() -> LlavaProcessor:
    """Return a word-level tokenizer with its chat template and an image processor that keeps 96 x 96 pixels."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex("[?,.!]"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
    )
    square = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def make_config(width: int, layers: int, inner: int, head: int) -> LlavaConfig:
    """Return the config of a LLaVA: decoder of `layers` layers, hidden size `width`, MLP size `inner`, heads of size `head`."""
    token = {word: index for index, word in enumerate(SPECIAL)}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=CELL,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=ROWS,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=width // head,
            num_key_value_heads=width // head,
            head_dim=head,
            max_position_embeddings=512,
            bos_token_id=token[BOS],
            eos_token_id=token[EOS],
            pad_token_id=token[PAD],
            tie_word_embeddings=False,
            initializer_range=0.04,
        ),
        image_token_index=token[IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=token[PAD],
    )


def save_model(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a BF16 checkpoint with its processor.

    Key names are those of the hub (`vision_tower.vision_model...`), because a LLaVA built from a config saves
    `vision_tower.encoder...`, which vLLM does not load.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    tokens = model.config.text_config
    model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    file, old, new = folder / "model.safetensors", "vision_tower.", "vision_tower.vision_model."
    tensors = load_file(file)
    renamed = {
        key.replace(old, new, 1) if old in key and new not in key else key: value for key, value in tensors.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
