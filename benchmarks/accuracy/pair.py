"""Define teacher and student: a subword tokenizer, a LLaVA processor, and the shapes of both models.

The tokenizer is byte-level BPE with 1,024 ids, learned from the English of Python's own reference topics and the study's
sentences, and kept in tokenizer.json, so that every machine has the same (`python -m benchmarks.accuracy.pair` makes it again).
Both members see 36 visual tokens of 16 x 16 pixels through one frozen CLIP tower, as LLaVA-1.5's 7B and 13B do. All decoder
widths are multiples of 128.

Prompts: `<s><user><image>...question<assistant>answer</s>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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

from benchmarks.accuracy.scenes import CANVAS, sentences

__all__ = ["VISUAL", "VOCABULARY", "Shape", "build", "open_tokenizer", "save", "sequences"]

FILE = Path(__file__).with_name("tokenizer.json")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
VOCABULARY, PATCH = 1024, 16
VISUAL = (CANVAS // PATCH) ** 2
TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}<user>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% else %}<assistant>{% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Shape of a model's decoder; the vision tower is shared."""

    width: int
    layers: int
    inner: int
    head: int = 64
    tower_width: int = 128
    tower_layers: int = 2


def open_tokenizer() -> Tokenizer:
    """Return the stored tokenizer."""
    return Tokenizer.from_file(str(FILE))


def learn_tokenizer() -> Tokenizer:
    """Learn the tokenizer again; its text is the running Python's, so another version gives other ids."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    questions, answers = sentences()
    tokenizer.train_from_iterator([*topics.values(), *20 * (questions + answers)], trainer)
    return tokenizer


def processor() -> LlavaProcessor:
    """Return the tokenizer with its chat template and an image processor that keeps 96 x 96 pixels."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=open_tokenizer(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": CANVAS},
        crop_size={"height": CANVAS, "width": CANVAS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def sequences(asked: Sequence[str], answered: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids [Q * A, S] of every question with every answer, where the answer begins [Q * A], and its longest length.

    Row q * A + a is question q answered by a; rows are padded on the right to one length.
    """
    tokenizer = open_tokenizer()
    questions, answers = ([t.ids for t in tokenizer.encode_batch(part)] for part in (asked, answered))
    head = [BOS, USER, *[IMAGE] * VISUAL]
    longest = max(map(len, questions)) + max(map(len, answers)) + 2 + len(head)
    ids, first = torch.full((len(questions) * len(answers), longest), PAD), []
    for q, question in enumerate(questions):
        for a, answer in enumerate(answers):
            row = [*head, *question, ASSISTANT, *answer, EOS]
            ids[q * len(answers) + a, : len(row)] = torch.tensor(row)
            first.append(len(head) + len(question) + 1)
    return ids, torch.tensor(first), max(map(len, answers)) + 1


def config(shape: Shape) -> LlavaConfig:
    """Return the config of a model."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_width,
            intermediate_size=4 * shape.tower_width,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_width // 32,
            image_size=CANVAS,
            patch_size=PATCH,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // shape.head,
            num_key_value_heads=shape.width // shape.head,
            head_dim=shape.head,
            max_position_embeddings=256,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
            initializer_range=0.03,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL,
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )


def build(shape: Shape, seed: int) -> LlavaForConditionalGeneration:
    """Return an untrained model. Queries and keys start equal in half of the heads, so that attention by name forms sooner."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(shape))
    for layer in model.model.language_model.layers:
        query, key = layer.self_attn.q_proj.weight.data, layer.self_attn.k_proj.weight.data
        half = query.shape[0] // 2
        query[:half].normal_(0, 0.8 / query.shape[1] ** 0.5)
        key[:half] = query[:half]
    return model


def save(model: Any, folder: Path) -> None:
    """Write a BF16 checkpoint with its processor, under the key names of the hub, which vLLM knows."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    file, old, new = folder / "model.safetensors", "vision_tower.", "vision_tower.vision_model."
    tensors = load_file(file)
    renamed = {k.replace(old, new, 1) if old in k and new not in k else k: v for k, v in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})


if __name__ == "__main__":
    learn_tokenizer().save(str(FILE), pretty=False)
