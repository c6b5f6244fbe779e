"""Supervised tokens: generation blocks and turns rendered one by one give the same ids and labels on every template."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from examples.bundled_demo.models import make_processor
from grace_plugin.data import ConversationCollator, SampleError, check_sample
from grace_plugin.data.segments import Segmenter
from tests.tiny import EVERY, build, make_samples
from tests.tiny_text import QWEN2_TEMPLATE, QWEN3_TEMPLATE, SENTENCES

PROCESSORS = {family: build(family)[1] for family in EVERY} | {"demo": make_processor()}
MARKED = ("llava", "llava_next", "qwen3_vl", "qwen3_vl_moe", "demo")
PUBLISHED_LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""How LLaVA-1.5's checkpoints write a conversation: a space behind each turn, and nothing that ends it."""


def marked(template: str) -> str:
    """A template with generation marks around what an assistant says, its end mark included."""
    if template == QWEN2_TEMPLATE:
        return QWEN3_TEMPLATE
    if "{% generation %}" in template:
        return template
    head, _, rest = template.partition("{{ m['role'] }}: ")
    turn, _, tail = rest.partition("\n{% endfor %}{% if add_generation_prompt %}")
    both = (
        "{% if m['role'] == 'assistant' %}{% generation %}"
        + turn
        + "{% endgeneration %}{% else %}"
        + turn
        + "{% endif %}"
    )
    return f"{head}{{{{ m['role'] }}}}: {both}{{{{ '\\n' }}}}{{% endfor %}}{{% if add_generation_prompt %}}{tail}"


def talk(*texts: str, images: int = 0) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        content = [*[{"type": "image"}] * (images if number == 0 else 0), {"type": "text", "text": text}]
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return {"messages": messages, "images": [r["images"][0] for r in make_samples(images, seed=2)]}


@pytest.mark.parametrize("family", [*EVERY, "demo"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_segments__blocks_and_single_turns__agree(family: str, images: int) -> None:
    """Every family's template, with marks (its own, or put in) and by turns rendered apart."""
    processor = copy.copy(PROCESSORS[family])
    sample = talk(
        "what is the shape", "a red square", "assistant: and </s> left?\n", "<|im_end|> blue  ", images=images
    )
    apart = ConversationCollator(processor)
    assert apart.segmenter.has_marks == (family in MARKED)
    apart.segmenter.marks = False
    two = apart([sample])
    processor.chat_template = marked(apart.segmenter.template)
    by_marks = ConversationCollator(processor)
    assert by_marks.segmenter.has_marks
    one = by_marks([sample])
    assert one.keys() == two.keys()
    assert bool((one["labels"] != -100).any())
    for key in ("input_ids", "labels"):
        assert torch.equal(one[key], two[key])


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("marks", [True, False])
def test_segments__llavas_published_template__as_by_hand(scheme: str, marks: bool) -> None:
    """Prompts are cut as they are served, the space behind an answer is not supervised, and the end of text is."""
    processor = metaspace(scheme)
    processor.chat_template = PUBLISHED_LLAVA
    sample = talk("what is the shape?", "a red square", "which colour?", "blue", images=1)
    collator = ConversationCollator(processor)
    collator.segmenter.marks = marks
    batch = collator([sample])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    name = processor.tokenizer.convert_ids_to_tokens
    assert name([label for label in labels if label != -100]) == ["▁a", "▁red", "▁square", "▁blue", "</s>"]
    for turn in (1, 3):
        served = processor(
            text=[processor.apply_chat_template(sample["messages"][:turn], add_generation_prompt=True, tokenize=False)],
            images=sample["images"],
            add_special_tokens=False,
            return_tensors="pt",
        )["input_ids"][0].tolist()
        assert ids[: len(served)] == served
        assert labels[len(served) - 1] == -100
        assert labels[len(served)] != -100


def test_segments__template_writes_eos__not_added_again() -> None:
    """An end mark inside or behind the marks is the template's to teach."""
    _, processor = build("qwen3_vl")
    for template in (
        QWEN3_TEMPLATE,
        QWEN3_TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
    ):
        processor.chat_template = template
        batch = ConversationCollator(processor)([talk("say", "red")])
        ends = batch["input_ids"][0].tolist().count(processor.tokenizer.eos_token_id)
        assert ends == 2  # the user's and the assistant's
    assert processor.tokenizer.decode([i for i in batch["labels"][0].tolist() if i != -100]) == "red"


def test_segments__image_after_a_spelled_placeholder__one_image() -> None:
    """A tokenizer that marks the start of words is given what stands before a piece; a spelled <image> must not be among it."""
    content = [{"type": "text", "text": "not <image> but "}, {"type": "image"}, {"type": "text", "text": "this"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    processor = metaspace("first")
    processor.chat_template = processor.chat_template.replace("<image>\n", "<image>")
    batch = ConversationCollator(processor)([{"messages": messages, "images": make_samples(1)[0]["images"]}])
    assert int((batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum()) == 16


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_segments__text_only__agrees_with_the_tokenizers_mask(family: str) -> None:
    """transformers computes its mask from characters of the whole text; segments must mark the same tokens."""
    processor = PROCESSORS[family]
    sample = talk("what is the shape?", "a red square", "which colour stands left?", "blue")
    batch = ConversationCollator(processor)([sample])
    flat = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in sample["messages"]]
    own = processor.tokenizer.apply_chat_template(
        flat, chat_template=processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    length = batch["input_ids"].shape[1]
    assert batch["input_ids"][0].tolist() == own["input_ids"][:length]
    assert (batch["labels"][0] != -100).int().tolist() == own["assistant_masks"][:length]
    assert sum(own["assistant_masks"][length:]) == 0


def test_segments__generation_blocks__only_they_are_supervised() -> None:
    """A template that marks the last turn alone is believed."""
    _, processor = build("qwen3_vl")
    processor.chat_template = QWEN3_TEMPLATE.replace(
        "m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last"
    )
    batch = ConversationCollator(processor)([talk("say", "red", "say", "blue")])
    supervised = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(supervised) == "blue<|im_end|>"


def test_segments__template_drops_images__refused() -> None:
    _, processor = build("qwen2_vl")
    processor.chat_template = processor.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    with pytest.raises(SampleError, match=r"has 1 image\(s\) and the chat template writes 0 placeholder\(s\)"):
        ConversationCollator(processor)([talk("q", "a", images=1)])


def test_segments__template_raises__error_of_the_sample() -> None:
    _, processor = build("llava")
    processor.chat_template = "{{ raise_exception('no such talk') }}"
    with pytest.raises(SampleError, match=r"sample 'r': the chat template cannot render it: no such talk") as caught:
        Segmenter(processor).segments(check_sample({**talk("q", "a"), "id": "r"}))
    assert caught.value.reason == "template"


def test_segments__empty_generation_blocks__refused() -> None:
    _, processor = build("llava")
    processor.chat_template = (
        "{% for m in messages %}{{ m['content'][0]['text'] }}"
        "{% if false %}{% generation %}x{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(SampleError, match=r"marks nothing of it as supervised") as caught:
        Segmenter(processor).segments(check_sample(talk("q", "a")))
    assert caught.value.reason == "no_supervised_tokens"


def metaspace(scheme: str) -> LlavaProcessor:
    """LLaVA with a tokenizer of the SentencePiece kind, which marks the start of words before a text."""
    _, processor = build("llava")
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = [chr(c) for c in range(33, 127)] + ["\n"]
    core.train_from_iterator(
        SENTENCES["plain"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    return LlavaProcessor(
        processor.image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=processor.chat_template,
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("images", [0, 1])
def test_tokens__piece_inside_a_sample__no_word_start_added(scheme: str, images: int) -> None:
    """Ids are those of the whole rendered text, as SentencePiece tokenizers cut it in one go."""
    processor = metaspace(scheme)
    sample = talk("what is the shape?", "a red square", "which colour stands left?", "blue", images=images)
    batch = ConversationCollator(processor)([sample])
    text = processor.apply_chat_template(sample["messages"], tokenize=False)
    whole = processor(
        text=[text], **({"images": sample["images"]} if images else {}), add_special_tokens=False, return_tensors="pt"
    )
    assert batch["input_ids"][0].tolist() == whole["input_ids"][0].tolist()
    supervised = [t for t in batch["labels"][0].tolist() if t != -100]
    assert processor.tokenizer.decode(supervised).replace(" ", "") == "aredsquare</s>blue</s>"
