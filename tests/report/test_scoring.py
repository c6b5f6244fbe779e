"""The report's scoring: which answers are accepted, intervals by hand, and sums over rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from grace_plugin.data import ConversationCollator
from grace_plugin.report.answers import accepted, answer_start, answers
from grace_plugin.report.samples import SampleComparison
from grace_plugin.report.summary import Z95, by_modality, by_type, interval, overall, paired_difference
from tests.chains import speak
from tests.tiny import build, make_samples


@pytest.mark.parametrize(
    ("correct", "questions", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_interval__published_wilson_intervals__equal(correct: int, questions: int, low: float, high: float) -> None:
    assert interval(correct, questions) == pytest.approx((low, high), abs=6e-5)


def test_z95__normal_distribution__two_and_a_half_percent_in_each_tail() -> None:
    assert torch.special.ndtr(torch.tensor(Z95, dtype=torch.float64)).item() == pytest.approx(0.975, abs=1e-8)


def test_paired_difference__five_samples__mean_and_1_96_standard_errors_by_hand() -> None:
    """Differences 1, 0, -1, 1, 0: mean 0.2, variance (0.64 + 0.04 + 1.44 + 0.64 + 0.04) / 4 = 0.7."""
    found = paired_difference([1, 1, 0, 1, 0], [0, 1, 1, 0, 0])
    half = 1.959964 * (0.7 / 5) ** 0.5
    assert found == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-9)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["a", " b "], ["a", "b"]),
        ("cat ", ["cat"]),
        (None, []),
        ([], []),
        ([1, "x", None], ["x"]),
        (("u", "v"), ["u", "v"]),
    ],
)
def test_accepted__what_a_sample_says__strings_without_white_space_around(given: Any, wanted: list[str]) -> None:
    assert accepted({"accept": given}) == wanted


@pytest.mark.parametrize(
    ("labels", "start"), [([-100, -100, 5, 6], 2), ([-100, 5, -100, -100, 7, 8, -100], 4), ([3, 4], 0)]
)
def test_answer_start__several_supervised_spans__the_last_one(labels: list[int], start: int) -> None:
    assert answer_start(torch.tensor(labels)) == start


@pytest.mark.slow
def test_answers__two_models__each_its_own_whole_answer_by_sample() -> None:
    collator = ConversationCollator(build("llava", seed=1)[1])
    given = [
        {**sample, "accept": ["yes"]}
        for sample in (*make_samples(3, seed=3), *make_samples(1, seed=5, images=0), *make_samples(1, seed=7))
    ]
    batches = [collator([sample]) for sample in given]
    starts = {number: answer_start(batch["labels"][0]) for number, batch in enumerate(batches)}
    last = {int(batch["input_ids"][0, start - 1]) for batch, start in zip(batches, starts.values(), strict=True)}
    assert len(last) == 1  # every prompt ends with the same token
    tokenizer = collator.processor.tokenizer
    end = tokenizer.eos_token_id
    one, other = list(
        dict.fromkeys(i for i in batches[0]["input_ids"][0, starts[0] :].tolist() if i not in (*last, end))
    )[:2]
    models = [
        speak(build("llava", seed=1)[0], dict(pairwise((*last, *tokens, end)))) for tokens in ((one,), (other, one))
    ]
    found = answers(models, collator, given, {number: starts[number] for number in (4, 0, 3)}, batch_size=2)
    texts = [tokenizer.decode(tokens).strip() for tokens in ([one], [other, one])]
    assert found == {number: texts for number in (0, 3, 4)} and texts[0] != texts[1]


def record(number: int, right: list[bool], **more: Any) -> SampleComparison:
    values: dict[str, Any] = {"kl": 1.0, "agree": 2, "right_a": 3, "right_b": 1, "nll_a": 4.0, "nll_b": 6.0}
    values |= {"tokens": 4, "has_images": True, "start": 1, "right": right, **more}
    return SampleComparison(number, **values)


def test_overall__samples_with_and_without_accepted_answers__accuracy_of_those_that_have_them() -> None:
    """Of five samples with accepted answers A has four right and B two: three lost, one gained, one right in both."""
    records = [
        record(0, [True, False], kl=3.0, agree=4),
        record(1, [True, True], tokens=2),
        record(2, [False, True]),
        record(3, [True, False], nll_b=1.0),
        record(4, []),
        record(5, [True, False]),
    ]
    found = overall(records)
    assert (found["samples"], found["tokens"], found["questions"]) == (6, 22, 5)
    assert found["kl"] == pytest.approx(8 / 22) and found["agreement"] == pytest.approx(14 / 22)
    assert (found["token_accuracy_a"], found["token_accuracy_b"]) == pytest.approx((18 / 22, 6 / 22))
    assert (found["nll_a"], found["nll_b"]) == pytest.approx((24 / 22, 31 / 22))
    assert (found["accuracy_a"], found["accuracy_b"], found["lost"], found["gained"]) == (0.8, 0.4, 3, 1)
    assert found["interval_a"] == list(interval(4, 5)) and found["interval_b"] == list(interval(2, 5))
    half = 1.959964 * ((3 * 0.6**2 + 0.4**2 + 1.4**2) / 4 / 5) ** 0.5  # differences -1, 0, 1, -1, -1 around -0.4
    assert found["difference"] == pytest.approx([-0.4, -0.4 - half, -0.4 + half])
    both = overall(
        [record(0, [True, True]), record(1, [True, True]), record(2, [False, False]), record(3, [False, True])]
    )
    assert (both["lost"], both["gained"]) == (0, 1)
    assert overall([]) == {"samples": 0, "tokens": 0}
    assert "questions" not in overall([record(0, [])]) and overall([record(0, [True, True])])["difference"] is None


def test_by_modality__samples_compared_without_their_images__kl_per_token_of_both() -> None:
    records = [
        record(0, [], kl=4.0, kl_text_only=1.0),
        record(1, [], kl=1.0, kl_text_only=2.0, tokens=2),
        record(2, []),
        record(3, [], has_images=False),
    ]
    found = by_modality(records)
    assert (found["image"]["samples"], found["text"]["samples"], found["compared_samples"]) == (3, 1, 2)
    assert (found["kl_image_conditioned"], found["kl_text_only"]) == pytest.approx((5 / 6, 3 / 6))
    mean, low, high = found["difference"]  # 0.75 and -0.5
    assert mean == pytest.approx(0.125) and high - low == pytest.approx(2 * 1.959964 * 0.625, rel=1e-6)
    assert "difference" not in by_modality([record(2, [])])
    assert by_modality([record(0, [], kl_text_only=0.0)])["kl_text_only"] == 0.0


def test_by_type__groups__largest_divergence_first_then_by_name() -> None:
    records = [
        record(0, [True, True], group="b"),
        record(1, [False, True], group="a"),
        record(2, [], group="c", kl=9.0),
        record(3, [True, False], group="a", kl=1.0),
    ]
    found = by_type(records)
    assert [(one["type"], one["samples"]) for one in found] == [("c", 1), ("a", 2), ("b", 1)]
    assert (found[1]["accuracy_a"], found[1]["accuracy_b"], found[2]["accuracy_b"]) == (0.5, 0.5, 1.0)
