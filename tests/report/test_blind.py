"""A row without its pictures, in every family: the answer's tokens stay, every image token goes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoProcessor

from grace_plugin.data import ConversationCollator, SampleError
from grace_plugin.report.answers import accepted, answer_start
from grace_plugin.report.blind import blind_row, prompt_text
from grace_plugin.report.compare import _blind, _Drawn
from grace_plugin.report.pair import read_pair
from grace_plugin.vlm import family_of
from tests.pairs import Pair
from tests.tiny import EVERY, build, make_samples


def learned(collator: ConversationCollator, row: dict[str, Any]) -> list[int]:
    labels = collator([row])["labels"]
    return labels[labels != -100].tolist()


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_asked_without_pictures(name: str) -> None:
    model, processor = build(name)
    collator, family = ConversationCollator(processor), family_of(model)
    for row in make_samples(1, seed=3) + make_samples(1, seed=4, images=2):
        blind = blind_row(row, 0, collator, family, model.config)
        assert blind is not None
        batch = collator([blind])
        assert "pixel_values" not in batch
        assert len(family.visual_tokens(model.config, batch).index) == 0
        assert learned(collator, blind) == learned(collator, row)
        placeholder = collator.segmenter.placeholders["image"]
        with_pictures, without = prompt_text(row, collator), prompt_text(blind, collator)
        assert placeholder in with_pictures and placeholder not in without
        assert "what is the shape" in without
    assert blind_row(make_samples(1, images=0)[0], 0, collator, family, model.config) is None


def test_a_turn_that_was_only_a_picture_is_refused_and_the_others_stand(llava: Pair, int4: Any) -> None:
    bare = make_samples(1, seed=9)[0]
    bare["messages"][0]["content"] = [{"type": "image"}]
    pair = read_pair(llava.student, int4)
    collator = ConversationCollator(pair.a.processor)
    blind, pictured, said = _blind(_Drawn([bare, *make_samples(2)], None, 0), [0, 1, 2], collator, pair)
    assert (set(blind), pictured, said["refused"]) == ({1, 2}, {0, 1, 2}, 1)
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
        (ANOTHER_ANSWER, "without its pictures the chat template renders other answers"),
    ],
)
def test_a_template_that_needs_the_picture_is_refused(llava: Pair, template: str, sentence: str) -> None:
    processor = AutoProcessor.from_pretrained(llava.student)
    processor.chat_template = template
    model, _ = build("llava")
    with pytest.raises(SampleError, match=sentence):
        blind_row(make_samples(1)[0], 0, ConversationCollator(processor), family_of(model), model.config)


def test_the_prompt_ends_where_the_last_answer_starts() -> None:
    import torch

    assert answer_start(torch.tensor([-100, -100, 5, 6, -100, -100, 7, 8, -100])) == 6
    assert answer_start(torch.tensor([3, 4])) == 0
    assert accepted({"accept": [" yes ", "no", 3]}) == ["yes", "no"]
    assert accepted({"accept": "yes"}) == ["yes"] and accepted({}) == []
