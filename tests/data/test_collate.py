"""Samples to batches: tokens are the chat template's own, labels stand on assistant turns only, nothing is cut silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grace_plugin.data import ConversationCollator
from tests.pairs import mixed_samples
from tests.tiny import FAMILIES, build, make_samples

PROCESSORS = {family: build(family)[1] for family in FAMILIES}
GENERATION_MARKS = ("llava", "qwen3_vl")
QUESTIONS = ("what is left?", "assistant: a red square", "ASSISTANT: yes </s> no", "user", "<|im_start|>assistant no")


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def conversation(*texts: str, system: str | None = None, images: int = 0) -> dict[str, Any]:
    """Question and answer in turn; the images stand in the first question."""
    messages = [turn("system", system)] if system else []
    for number, text in enumerate(texts):
        messages.append(turn("assistant" if number % 2 else "user", text, images if number == 0 else 0))
    return {"messages": messages, "images": [r["images"][0] for r in make_samples(images, seed=11)]}


def answers_by_text(processor: Any, sample: dict[str, Any]) -> list[str]:
    """What must be supervised: every assistant text with its end-of-turn mark."""
    end = "</s>" if "<image>" in processor.tokenizer.get_vocab() else "<|im_end|>"
    return [m["content"][-1]["text"] + end for m in sample["messages"] if m["role"] == "assistant"]


def supervised(processor: Any, ids: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """Labelled runs of a sample as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label == -100:
            runs.append([])
        else:
            assert token == label
            runs[-1].append(token)
    return [processor.tokenizer.decode(run).strip() for run in runs if run]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_collate__several_turns__labels_are_the_assistants_texts(family: str, images: int) -> None:
    processor = PROCESSORS[family]
    sample = conversation(
        "what is it?", "a red square", "and USER: assistant?", "no, two", system="answer in words", images=images
    )
    batch = ConversationCollator(processor)([sample])
    assert supervised(processor, batch["input_ids"][0], batch["labels"][0]) == answers_by_text(processor, sample)


@pytest.mark.parametrize("family", GENERATION_MARKS)
@pytest.mark.parametrize("question", QUESTIONS[:4])
def test_collate__template_with_generation_blocks__labels_are_its_mask(family: str, question: str) -> None:
    """The oracle is transformers' own mask from the template's generation marks, on text.

    Byte-level BPE cuts a turn's text alone as it cuts it inside the whole conversation as long as the seam between prompt
    and answer is no merge; the marks stand at the same seam.
    """
    processor = PROCESSORS[family]
    sample = conversation(question, "a red square", "which colour stands left", "blue no")
    batch = ConversationCollator(processor)([sample])
    tokenizer = processor.tokenizer
    rendered = tokenizer.apply_chat_template(
        [{"role": m["role"], "content": m["content"][0]["text"]} for m in sample["messages"]],
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    expected = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m])
    found = batch["labels"][0]
    assert tokenizer.decode(found[found != -100]) == expected
    assert tokenizer.decode(batch["input_ids"][0]).rstrip() == tokenizer.decode(ids).rstrip()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_collate__prompt__tokens_are_those_when_served(family: str, images: int) -> None:
    """Up to the last answer, ids are those of the processor's own chat template with a generation prompt."""
    processor = PROCESSORS[family]
    sample = conversation("what is the shape?", "a blue circle", images=images)
    batch = ConversationCollator(processor)([sample])
    messages = [dict(m, content=[dict(c) for c in m["content"]]) for m in sample["messages"][:-1]]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    served = processor(text=[text], **({"images": sample["images"]} if images else {}), return_tensors="pt")
    length = served["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], served["input_ids"])
    assert bool((batch["labels"][:, :length] == -100).all())
    assert bool((batch["labels"][:, length:] != -100).all())
    for key in ("pixel_values", "image_grid_thw"):
        assert (key in batch) == (key in served)
        if key in served:
            assert torch.equal(batch[key], served[key])


@pytest.mark.parametrize("family", FAMILIES)
def test_collate__ids__those_of_apply_chat_template(family: str) -> None:
    processor = PROCESSORS[family]
    sample = make_samples(1, seed=4)[0]
    batch = ConversationCollator(processor)([sample])
    messages = [dict(m, content=[dict(c) for c in m["content"]]) for m in sample["messages"]]
    messages[0]["content"][0]["image"] = sample["images"][0]
    out = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    decode = processor.tokenizer.decode
    assert decode(batch["input_ids"][0]) == decode(out["input_ids"][0]).rstrip("\n")
    assert torch.equal(batch["pixel_values"], out["pixel_values"])


@pytest.mark.parametrize("family", FAMILIES)
def test_collate__samples_of_two_lengths__padded_right_without_labels(family: str) -> None:
    processor = PROCESSORS[family]
    collator = ConversationCollator(processor)
    chosen = mixed_samples(6)
    batch = collator(chosen)
    alone = [collator([sample]) for sample in chosen]
    for number, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        for key, fill in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
            assert torch.equal(batch[key][number, :length], single[key][0])
            assert bool((batch[key][number, length:] == fill).all())
    assert len({single["input_ids"].shape[1] for single in alone}) > 1
    pixels = [single["pixel_values"] for single in alone if "pixel_values" in single]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    assert {key: len(value) for key, value in batch.items() if key in ("input_ids", "labels", "attention_mask")} == {
        "input_ids": 6,
        "labels": 6,
        "attention_mask": 6,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_collate__padding__logits_unchanged(family: str) -> None:
    model, processor = build(family)
    collator = ConversationCollator(processor)
    chosen = mixed_samples(6)
    batch = collator(chosen)
    with torch.no_grad():
        together = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        for number, sample in enumerate(chosen):
            single = collator([sample])
            alone = model(**{k: v for k, v in single.items() if k != "labels"}).logits[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, rtol=1e-5, atol=2e-5)


@given(
    words=st.lists(
        st.sampled_from(["red", "assistant", "USER:", "</s", "im_start", "\n", "a b", "é", "✓"]), min_size=1, max_size=6
    )
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize("family", FAMILIES)
def test_collate__any_user_text__never_a_label(family: str, words: list[str]) -> None:
    processor = PROCESSORS[family]
    sample = conversation(" ".join(words), "blue", " ".join(reversed(words)), "two")
    batch = ConversationCollator(processor)([sample])
    assert supervised(processor, batch["input_ids"][0], batch["labels"][0]) == answers_by_text(processor, sample)


@pytest.mark.parametrize("family", FAMILIES)
def test_collate__longer_than_max_length__refused_by_name(family: str) -> None:
    processor = PROCESSORS[family]
    sample = {**make_samples(1)[0], "id": "train-17"}
    length = ConversationCollator(processor)([sample])["input_ids"].shape[1]
    assert ConversationCollator(processor, max_length=length)([sample])["input_ids"].shape[1] == length
    with pytest.raises(
        ValueError, match=rf"sample 'train-17' has {length} tokens and max_length is {length - 1}; .*Raise max_length"
    ):
        ConversationCollator(processor, max_length=length - 1)([sample])


def test_collator__no_chat_template__refused() -> None:
    _, processor = build("llava")
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"the processor has no chat template"):
        ConversationCollator(processor)


def test_collate__template_rewrites_earlier_turns__refused() -> None:
    _, processor = build("llava")
    processor.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ValueError, match=r"sample 'x': the chat template rewrites earlier turns"):
        ConversationCollator(processor)([{**conversation("a", "b", "c", "d"), "id": "x"}])


def test_collate__bos_token__as_the_tokenizer_adds_it() -> None:
    """A tokenizer that puts a start token before every text puts it once before a sample."""
    from tokenizers.processors import TemplateProcessing

    _, processor = build("llava")
    plain = ConversationCollator(processor)([conversation("what is it?", "red", "and left?", "blue")])["input_ids"][
        0
    ].tolist()
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    found = ConversationCollator(processor)([conversation("what is it?", "red", "and left?", "blue")])["input_ids"][
        0
    ].tolist()
    assert found == [bos, *plain]
