"""The text-only sample of every family: the supervised tokens stay, every image token goes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoProcessor

from grace_plugin.data import ConversationCollator, SampleError, draw_samples
from grace_plugin.report.answers import accepted, answer_start
from grace_plugin.report.checkpoints import read_pair
from grace_plugin.report.compare import _text_only
from grace_plugin.report.text_only import prompt_text, text_only_sample
from grace_plugin.vlm import family_of
from tests.pairs import Pair
from tests.tiny import EVERY, build, make_samples


def supervised(collator: ConversationCollator, sample: dict[str, Any]) -> list[int]:
    labels = collator([sample])["labels"]
    return labels[labels != -100].tolist()


@pytest.mark.parametrize("name", EVERY)
def test_text_only_sample__every_family__no_image_token_and_the_same_answer(name: str) -> None:
    model, processor = build(name)
    collator, family = ConversationCollator(processor), family_of(model)
    for sample in make_samples(1, seed=3) + make_samples(1, seed=4, images=2):
        text_only = text_only_sample(sample, 0, collator, family, model.config)
        assert text_only is not None
        batch = collator([text_only])
        assert "pixel_values" not in batch
        assert len(family.visual_tokens(model.config, batch).index) == 0
        assert supervised(collator, text_only) == supervised(collator, sample)
        placeholder = collator.segmenter.placeholders["image"]
        with_images, without = prompt_text(sample, collator), prompt_text(text_only, collator)
        assert placeholder in with_images and placeholder not in without
        assert "what is the shape" in without
    assert text_only_sample(make_samples(1, images=0)[0], 0, collator, family, model.config) is None


def test_text_only_samples__turn_of_an_image_alone__refused_and_the_others_kept(llava: Pair, int4: Any) -> None:
    bare = make_samples(1, seed=9)[0]
    bare["messages"][0]["content"] = [{"type": "image"}]
    pair = read_pair(llava.student, int4)
    collator = ConversationCollator(pair.a.processor)
    samples = draw_samples([bare, *make_samples(2)], 3, 0)
    text_only, with_images, said = _text_only(samples, [0, 1, 2], collator, pair)
    assert (set(text_only), with_images, said["refused"]) == ({1, 2}, {0, 1, 2}, 1)
    assert "a user turn is empty" in said["first_refusal"]


ALWAYS_AN_IMAGE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'user' %}<image>{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ANOTHER_ANSWER = (
    "{% set ns = namespace(seen='no') %}{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{% set ns.seen = 'yes' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ ns.seen }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (ALWAYS_AN_IMAGE, r"family 'llava' writes 1 image token\(s\) also without an image"),
        (ANOTHER_ANSWER, "without its images the chat template renders other answers"),
    ],
)
def test_text_only_sample__template_that_needs_the_image__refused(llava: Pair, template: str, sentence: str) -> None:
    processor = AutoProcessor.from_pretrained(llava.student)
    processor.chat_template = template
    model, _ = build("llava")
    with pytest.raises(SampleError, match=sentence):
        text_only_sample(make_samples(1)[0], 0, ConversationCollator(processor), family_of(model), model.config)


def test_answer_start__two_answers__start_of_the_last() -> None:
    import torch

    assert answer_start(torch.tensor([-100, -100, 5, 6, -100, -100, 7, 8, -100])) == 6
    assert answer_start(torch.tensor([3, 4])) == 0
    assert accepted({"accept": [" yes ", "no", 3]}) == ["yes", "no"]
    assert accepted({"accept": "yes"}) == ["yes"] and accepted({}) == []
