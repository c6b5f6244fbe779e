"""Test the demo's scoring: whole answers, in the order of the samples, and margins over the steps of each answer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from examples.bundled_demo.methods import STUDENT, load_model
from examples.bundled_demo.models import ASSISTANT, EOS, PAD, WORDS, make_config
from examples.bundled_demo.scenes import heldout_samples
from examples.bundled_demo.score import LONGEST_ANSWER, answer_margins, encode_questions, greedy_answers, is_right
from tests.chains import speak

TOKEN = {word: index for index, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(STUDENT)


def speaker(*words: str) -> Any:
    """A model that answers every question with these tokens, whatever it sees."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(make_config(128, 1, 128, 32))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = TOKEN[EOS], TOKEN[PAD]
    return speak(model, dict(pairwise(TOKEN[word] for word in (ASSISTANT, *words))))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("cat", True),
        ("dog", True),
        ("c", False),
        ("ca", False),
        ("cat dog", False),
        ("cats", False),
        ("", False),
        ("Cat", False),
        ("at", False),
    ],
)
def test_is_right__one_of_the_accepted_answers__and_the_whole_of_it(answer: str, right: bool) -> None:
    assert is_right({"accept": ["dog", "cat"]}, answer) is right


def test_greedy_answers__known_model__words_up_to_the_end_of_turn(processor: Any) -> None:
    encoded = encode_questions(processor, list(heldout_samples(5)), batch_size=2)
    assert greedy_answers(speaker("dog", "cat", EOS, "car", EOS), processor, encoded) == ["dog cat"] * 5
    assert greedy_answers(speaker(EOS), processor, encoded) == [""] * 5
    endless = greedy_answers(speaker("dog", "cat", "dog"), processor, encoded)
    assert endless == [" ".join(["dog", "cat"] * 3)] * 5 and LONGEST_ANSWER == 6


def test_greedy_answers__batches_by_type__in_the_order_of_the_samples(processor: Any) -> None:
    samples, model, done = list(heldout_samples(12)), load_model(STUDENT), []
    encoded = encode_questions(processor, samples, batch_size=5)
    assert sorted(sample for batch in encoded for sample in batch.indices) == list(range(12))
    assert [len(batch.indices) for batch in encoded] == [5, 5, 2]
    types = [samples[sample]["type"] for batch in encoded for sample in batch.indices]
    assert types == sorted(types) and types != [sample["type"] for sample in samples]
    together = greedy_answers(model, processor, encoded, lambda *progress: done.append(progress))
    alone = [greedy_answers(model, processor, encode_questions(processor, [sample]))[0] for sample in samples]
    assert together == alone and len(set(together)) > 2
    assert done == [(number, 3) for number in range(1, 4)]


def test_answer_margins__steps_of_the_answer__smallest_gap_by_forward_passes(processor: Any) -> None:
    model = load_model(STUDENT).float()
    for sample in list(heldout_samples(4)):
        inputs = encode_questions(processor, [sample])[0].inputs
        (margin,) = answer_margins(model, inputs)
        ids, gaps = inputs["input_ids"], []
        for _ in range(LONGEST_ANSWER):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1].double()
            first, second = torch.log_softmax(logits, -1).sort(descending=True).values[:2]
            gaps.append(float(first - second))
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
            if int(logits.argmax()) == TOKEN[EOS]:
                break
        assert margin == pytest.approx(min(gaps), rel=1e-4, abs=1e-4)
