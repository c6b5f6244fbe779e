"""Test the study's statistics against values computed by hand, and recorded tables and claims against the recorded rows."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy.blind import FILE, answer_blind, most_frequent
from benchmarks.accuracy.caption_work import TOLD
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.rows import RESULTS, Store, answers_of, scored
from benchmarks.accuracy.scenes import TYPES, Samples, draw
from benchmarks.accuracy.statistics import T975, Compared, Group, collect, compare, t_half_width
from benchmarks.accuracy.study import SIZES, Row, best_of
from benchmarks.accuracy.table import (
    BEGIN,
    CAPTIONS_BEGIN,
    CAPTIONS_END,
    END,
    SHORT_BEGIN,
    SHORT_END,
    captions_section,
    closed,
    label_of,
    missing_default,
    page_section,
    short_table,
    write_table,
)
from benchmarks.accuracy.work import TEST_SEED, TRAIN_SEED, Work

ROOT = Path(__file__).parents[2]
SETS = {"scenes": RESULTS, "captions": RESULTS / "captions"}


def shares(*right: int, of: int = 100) -> np.ndarray:
    """Right answers bool [seeds, questions]: of each seed so many, the first ones."""
    return np.stack([np.arange(of) < count for count in right])


def group(right: np.ndarray, method: str, seeds: tuple[int, ...] | None = None, **record: Any) -> Group:
    seeds = tuple(range(len(right))) if seeds is None else seeds
    return Group("w2g128", method, seeds, right, ({"by_type": {}, **record},) * len(right) if record else ())


@pytest.mark.parametrize(
    ("freedom", "published"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (20, 2.0860)]
)
def test_t_quantiles__published_values__equal(freedom: int, published: float) -> None:
    assert T975[freedom - 1] == pytest.approx(published, abs=6e-5)


@pytest.mark.parametrize("freedom", range(1, 21))
def test_t_quantiles__density_integrated__97_5_percent(freedom: int) -> None:
    """The integral of (1 + x^2 / v)^(-(v + 1) / 2) from 0 to the quantile is 95 % of half of the whole; x = sqrt(v) tan(a)."""
    assert len(T975) == 20
    edge = np.arctan(T975[freedom - 1] / np.sqrt(freedom))

    def area(upper: float) -> float:
        angle = (np.arange(200_000) + 0.5) * upper / 200_000
        return float((np.cos(angle) ** (freedom - 1)).sum() * upper / 200_000)

    assert area(edge) / area(np.pi / 2) == pytest.approx(0.95, abs=2e-6)


def test_compare__three_seeds__t_interval_by_hand() -> None:
    """Differences of 1, 2 and 6 points: mean 3, standard deviation sqrt(7), half width 4.30265 * sqrt(7 / 3)."""
    told = compare(group(shares(41, 52, 66), "a"), group(shares(40, 50, 60), "b"))
    half = 4.30265 * np.sqrt(7 / 3)
    assert (told.points, told.low, told.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-6)
    assert told.seeds == 3 and not told.decided
    assert str(told) == "+3.00 [-3.57, +9.57]"


def test_compare__two_seeds__12_7_standard_errors() -> None:
    told = compare(group(shares(51, 53), "a"), group(shares(50, 50), "b"))
    assert (told.points, told.low, told.high) == pytest.approx((2.0, 2 - 12.7062, 2 + 12.7062), rel=1e-6)


def test_compare__which_questions_are_right__no_influence_on_the_interval() -> None:
    rng = np.random.default_rng(0)
    right, other = shares(60, 55, 70, 64), shares(50, 52, 61, 49)
    mixed = [np.stack([rng.permutation(line) for line in one]) for one in (right, other)]
    ordered, shuffled = compare(group(right, "a"), group(other, "b")), compare(*map(group, mixed, "ab"))
    assert str(ordered) == str(shuffled) and ordered.decided


def test_compare__seeds_in_another_order__paired_by_seed() -> None:
    ours, other = group(shares(60, 50, 40), "a", (0, 1, 2)), group(shares(38, 58, 90), "b", (2, 0, 7))
    told = compare(ours, other)
    assert told.points == pytest.approx(2.0) and told.seeds == 2
    assert (told.low, told.high) == pytest.approx((2.0, 2.0))
    assert compare(other, ours).points == pytest.approx(-2.0)


def test_compare__teacher__stands_for_every_seed() -> None:
    told = compare(group(shares(60, 50, 40), "a"), group(shares(70), "teacher"))
    assert told.points == pytest.approx(-20.0) and told.seeds == 3
    assert told.high - told.points == pytest.approx(4.30265 * 10 / np.sqrt(3), rel=1e-5)


def test_compare__one_seed__no_interval() -> None:
    told = compare(group(shares(60, 50), "a"), group(shares(40), "b", (1,)))
    assert (told.points, told.low, told.high, told.seeds) == (pytest.approx(10.0), None, None, 1)
    assert str(told) == "+10.00 (one seed)" and not told.decided


def test_compare__no_seed_in_common__refused() -> None:
    with pytest.raises(ValueError, match=r"w2g128/a and w2g128/b have no seed in common"):
        compare(group(shares(60), "a", (0,)), group(shares(40), "b", (1,)))


@pytest.mark.parametrize("count", [0, 1, 22])
def test_t_half_width__numbers_without_a_quantile__refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 21 values, got {count}"):
        t_half_width([0.0] * count)
    assert t_half_width(np.arange(21)) == pytest.approx(2.08596 * np.sqrt(38.5 / 21), rel=1e-6)


@pytest.mark.parametrize(
    ("points", "sign"),
    [((10, 11, 12), 1), ((-10, -11, -12), 1), ((10, -11, 3), 0), ((0, 0, 0), 0), ((1, 1, 1), 1), ((-1, -1, -1), 1)],
)
def test_decided__interval_that_holds_0__no(points: tuple[int, ...], sign: int) -> None:
    ours = group(shares(*(50 + point for point in points)), "a")
    assert compare(ours, group(shares(50, 50, 50), "b")).decided == bool(sign)
    near = (
        Compared(0.5, 0.2, 0.8, 3),
        Compared(-0.5, -0.8, -0.2, 3),
        Compared(0.5, 0.0, 1.0, 3),
        Compared(-0.5, -1.0, 0.0, 3),
    )
    assert [one.decided for one in near] == [True, True, False, False]


def record(seed: int, right: list[bool], **more: Any) -> dict[str, Any]:
    entries = scored(np.array(right), np.arange(len(right)) % 2, ("even", "odd"))
    return {"setting": "w2g128", "method": "grace", "seed": seed, "part": "test", **entries, **more}


def test_collect__records_in_any_order__groups_by_seed_without_search_and_failures() -> None:
    two, nought = [True, False, True, True, False], [False, False, False, True, False]
    records = [
        record(2, two, held_out={"accuracy": 0.5}),
        record(0, nought, held_out={"accuracy": 0.25}),
        record(1, two, part="validation"),
        {**record(3, two), "failed": "it did"},
        record(0, two, method="kl"),
    ]
    groups = collect(records)
    assert set(groups) == {("w2g128", "grace"), ("w2g128", "kl")}
    found = groups["w2g128", "grace"]
    assert found.seeds == (0, 2) and (found.setting, found.method) == ("w2g128", "grace")
    assert found.right.dtype == bool and found.right.tolist() == [nought, two]
    assert found.mean == pytest.approx(40.0) and found.deviation == pytest.approx(40 / np.sqrt(2))
    assert found.held_out == pytest.approx(37.5) and groups["w2g128", "kl"].held_out is None
    assert found.by_type() == pytest.approx({"even": 100 * (0 + 2 / 3) / 2, "odd": 100 * (0.5 + 0.5) / 2})
    assert groups["w2g128", "kl"].deviation is None
    assert groups["w2g128", "kl"].by_type() == pytest.approx({"even": 100 * 2 / 3, "odd": 50.0})


def test_scored__answers_by_type__shares_and_packed_answers() -> None:
    right, type_ = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1], bool), np.array([0, 0, 0, 2, 2, 2, 2, 2, 0])
    found = scored(right, type_, ("a", "b", "c"))
    assert found["questions"] == 9 and found["accuracy"] == pytest.approx(6 / 9)
    assert found["by_type"] == pytest.approx({"a": 0.75, "c": 0.6})
    assert (answers_of(found) == right).all() and answers_of(found).dtype == bool


SEARCH = {rate: Row("bf16", "grace", 0, rate) for rate in (1e-4, 1e-3, 1e-2)}
WEIGHED = {weight: Row("bf16", "grace", 0, weight=weight) for weight in (1.0, 10.0)}


@pytest.mark.parametrize(
    ("rates", "weights", "wanted"),
    [
        ((0.1, 0.5, 0.3), (), (1e-3, None)),  # not the first, not the last
        ((0.1, 0.3, 0.5), (0.4, 0.45), (1e-2, None)),  # no weight is better than the default
        ((0.6, 0.3, 0.5), (0.4, 0.7), (1e-4, 10.0)),
        ((0.6, 0.3, 0.5), (0.8, 0.7), (1e-4, 1.0)),
        ((0.1, 0.5, 0.5), (0.5, 0.5), (1e-3, None)),  # equal ones: the first rate, the default weight
        ((0.1, 0.5, 0.5), (0.6, 0.6), (1e-3, 1.0)),
    ],
)
def test_best_of__validation_accuracies__best_rate_then_a_better_weight(
    rates: tuple[float, ...], weights: tuple[float, ...], wanted: tuple[float, float | None]
) -> None:
    best, weight = best_of(dict(zip(SEARCH.values(), rates)), dict(zip(WEIGHED.values(), weights)))
    assert (best.rate, weight) == wanted


def test_found__search_rows_on_disk__the_best_of_those_that_did_not_fail(tmp_path: Path) -> None:
    size, store = SIZES["tiny"], Store(tmp_path)
    work, asked = Work(size, store, tmp_path, "nowhere"), Row("w2g128", "grace", 1)
    rates, weights = asked.rates(size), asked.weights(size)
    assert [row.rate for row in rates] == [1e-3, 2e-3] and [row.weight for row in weights] == [30.0]
    store.write(rates[0], accuracy=0.2)
    store.write(rates[1], accuracy=0.4)
    store.write(weights[0], accuracy=0.5)
    said = {"0.001": 0.2, "0.002": 0.4, "w30": 0.5}
    assert work.found(asked) == (2e-3, 30.0, said)
    assert work.found(weights[0]) == (2e-3, 30.0, {"0.001": 0.2, "0.002": 0.4})
    assert work.found(rates[0]) == (1e-3, None, {})
    store.write(weights[0], accuracy=0.3)
    assert work.found(asked) == (2e-3, None, said | {"w30": 0.3})
    store.write(rates[1], failed="diverged")
    assert work.found(asked) == (1e-3, 30.0, {"0.001": 0.2, "w30": 0.3})


@pytest.mark.parametrize(
    ("method", "found", "wanted"),
    [
        ("grace", 10.0, 10.0),
        ("grace", None, 3.0),
        ("grace-default", 10.0, 3.0),
        ("grace-norelation", 10.0, None),
        ("kl", None, 1.0),
        ("kl", 10.0, 10.0),
        ("modelopt", 3.0, 3.0),
        ("ce", None, None),
        ("torchao", None, None),
        ("relation", 30.0, 30.0),
        ("grace-beta0.3", 10.0, 10.0),
    ],
)
def test_weight__method_and_search__what_is_trained_with(
    method: str, found: float | None, wanted: float | None
) -> None:
    weighed = METHODS[method].weighed(found)
    assert weighed.weight == wanted
    _, relational, controller = weighed.blocks()
    if relational.enabled:
        assert relational.weight == wanted
    elif wanted is not None:
        assert controller.beta_start == wanted and not controller.enabled


@pytest.mark.parametrize("name", SETS)
def test_recorded_rows__weight__the_one_that_was_used(name: str) -> None:
    every = [one for one in Store(SETS[name] / "rows").all() if one["method"] in METHODS and "failed" not in one]
    trained = [one for one in every if one["part"] == "test"]  # older rows of the search have no weight
    assert len(trained) > 20
    for one in trained:
        weight, method = one["weight"], METHODS[one["method"]]
        assert weight is None or method.weighed(weight).weight == weight, one["row"]
        if "weight_used" in one:
            assert one["weight_used"] == method.weighed(weight).weight, one["row"]
    rows = {one["row"]: one for one in trained}
    if name == "scenes":
        for seed in (0, 1):
            corrected = rows[f"w2g128/grace-default/{seed}"]
            assert (corrected["weight"], corrected["weight_used"]) == (None, 3.0) and "10" in corrected["corrected"]


def test_label__rows_of_a_method__says_the_weight_they_trained_with() -> None:
    assert label_of(group(shares(1), "grace", weight=10.0)) == "QAT + GRACE, weight 10"
    assert label_of(group(shares(1), "grace", weight=None)) == "QAT + GRACE, weight 3"
    assert (
        label_of(group(shares(1), "grace-default", weight=None, weight_used=3.0))
        == "QAT + GRACE at its defaults, weight 3"
    )
    assert label_of(group(shares(1), "kl", weight=None)) == "QAT + plain KL, weight 1"
    assert label_of(group(shares(1), "gptq", seconds=1.0)) == "GPTQ"
    assert label_of(group(shares(1), "ce", weight=None)) == "QAT alone"
    assert (
        label_of(group(shares(1), "grace", weight=10.0, weight_used=30.0)) == "QAT + GRACE, weight 30"
    )  # what was used counts
    assert label_of(group(shares(1), "kl-frozen", weight=3.0)) == "plain KL, scales not learned, weight 3"
    assert label_of(group(shares(1), "grace-norelation", weight=None)) == "no relation"
    assert label_of(replace(group(shares(1), "grace", weight=10.0), setting="bf16")) == "GRACE, weight 10"
    two = replace(group(shares(1, 2), "grace"), records=({"weight": 10.0}, {"weight": 3.0}))
    assert label_of(two) == "QAT + GRACE, weight 3 and 10"
    assert label_of(group(shares(1), "grace")) == "QAT + GRACE"  # without records nothing is known


def test_missing_default__no_such_row__said_with_the_reason() -> None:
    tuned, plain = group(shares(1), "grace", weight=10.0), group(shares(1), "grace", weight=None)
    default = group(shares(1), "grace-default", weight=None)
    assert missing_default({("w2g128", "grace"): tuned}, "w2g128") == "not run"
    chosen = "as GRACE: the search chose the default weight"
    assert missing_default({("w2g128", "grace"): plain}, "w2g128") == chosen
    used = group(shares(1), "grace", weight=10.0, weight_used=3.0)
    assert missing_default({("w2g128", "grace"): used}, "w2g128") == chosen
    other = group(shares(1), "grace", weight=None, weight_used=10.0)
    assert missing_default({("w2g128", "grace"): other}, "w2g128") == "not run"
    mixed = replace(group(shares(1, 1), "grace"), records=({"weight": 3.0}, {"weight": 10.0}))
    assert missing_default({("w2g128", "grace"): mixed}, "w2g128") == "not run"
    assert missing_default({("w2g128", "grace"): tuned, ("w2g128", "grace-default"): default}, "w2g128") == ""
    assert missing_default({}, "w2g128") == ""


def test_closed__lead_within_its_interval__no_share_is_claimed() -> None:
    teacher, start = group(shares(80), "teacher"), group(shares(40, 40, 40), "ce")
    clear, unclear = group(shares(60, 61, 59), "grace"), group(shares(60, 41, 70), "grace")
    groups = {("pair", "teacher"): teacher, ("bf16", "ce"): start, ("w2g128", "grace"): clear}
    assert closed(groups, "w2g128").startswith("GRACE closes 50 % of the way") and "+20.00 [+17.52, +22.48]" in closed(
        groups, "w2g128"
    )
    assert closed({**groups, ("w2g128", "grace"): unclear}, "w2g128").startswith("GRACE is not told apart")
    assert closed({**groups, ("pair", "teacher"): group(shares(39), "teacher")}, "w2g128") == ""
    assert closed({**groups, ("pair", "teacher"): group(shares(40), "teacher")}, "w2g128") == ""
    near = {
        **groups,
        ("pair", "teacher"): group(shares(60), "teacher"),
        ("w2g128", "grace"): group(shares(60, 60, 60), "grace"),
    }
    assert closed(near, "w2g128").startswith("GRACE closes 100 % of the way")
    assert closed({**groups, ("bf16", "ce"): group(shares(40), "ce", (7,))}, "w2g128") == ""
    for missing in groups:
        assert closed({key: one for key, one in groups.items() if key != missing}, "w2g128") == ""


@pytest.mark.parametrize("name", SETS)
def test_recorded_tables__made_again_from_the_rows__the_same(name: str, tmp_path: Path) -> None:
    results = SETS[name]
    shutil.copy(results / FILE, tmp_path / FILE)
    text = write_table(Store(results / "rows"), tmp_path, pages=False, told=(TOLD,) * (name == "captions"))
    assert (results / "table.md").read_text() == text, "run python -m benchmarks.accuracy --table"
    assert (results / "accuracy.svg").read_text() == (tmp_path / "accuracy.svg").read_text()
    assert "t-intervals" in text and "bootstrap" not in text


def test_pages__tables_made_again_from_the_rows__the_same() -> None:
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
    scenes, captions = (collect(Store(results / "rows").all()) for results in SETS.values())
    blind, unseen = (json.loads((results / FILE).read_text()) for results in SETS.values())
    assert list(SETS) == ["scenes", "captions"]
    for text, section, begin, end in (
        (readme, short_table(scenes), SHORT_BEGIN, SHORT_END),
        (page, page_section(scenes, blind), BEGIN, END),
        (page, captions_section(captions, unseen), CAPTIONS_BEGIN, CAPTIONS_END),
    ):
        told = text.partition(begin)[2].partition(end)[0].strip("\n")
        assert told == section, "run python -m benchmarks.accuracy --table, and again with --set captions"


def intervals(text: str) -> list[tuple[float, ...]]:
    """Every "x [low, high]" of a text."""
    number = r"([-+]?\d+\.\d+)"
    found = re.findall(rf"{number}(?: points)?\s+\[{number},\s{number}\]", text)
    return [tuple(map(float, one)) for one in found]


def test_results_page__intervals_of_its_sentences__are_those_of_the_tables() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    section = page.partition("## Accuracy study")[2].partition("\n## ")[0]
    for begin, end in ((BEGIN, END), (CAPTIONS_BEGIN, CAPTIONS_END)):
        assert begin in section
        section = section.partition(begin)[0] + section.partition(end)[2]
    known = [one for results in SETS.values() for one in intervals((results / "table.md").read_text())]
    known += [(-points, -high, -low) for points, low, high in known]
    told = intervals(section)
    assert len(told) > 20 and section.count("[") - section.count("](") == len(told)
    for one in told:
        assert any(max(abs(a - b) for a, b in zip(one, other)) < 0.0501 for other in known), one


def asked(question: list[int], answer: list[int]) -> Samples:
    nothing = np.zeros(len(question), np.int64)
    return Samples(*(nothing,) * 6, np.array(question), np.array(answer))


def test_blind__most_frequent_answer_by_question__ties_to_the_lowest_and_unseen_wrong() -> None:
    train = asked([0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 4, 7, 6, 9, 8, 8, 9])
    assert most_frequent(train) == {0: 5, 1: 6, 2: 8}
    test = asked([0, 0, 1, 1, 2, 3, 3], [5, 4, 6, 7, 8, 0, 5])
    assert answer_blind(train, test).tolist() == [True, False, True, False, True, False, False]
    with pytest.raises(ValueError, match="shorter"):
        most_frequent(asked([0, 0], [1]))
    with pytest.raises(ValueError, match="shorter"):
        answer_blind(train, asked([0, 0], [1]))


def test_blind__recorded_figure__computed_again() -> None:
    recorded, size = json.loads((RESULTS / FILE).read_text()), SIZES["gpu"]
    photos = np.zeros((50, 32, 32, 3), np.uint8), np.arange(50) % 10  # others than the command's: they do not matter
    train, test = (
        draw(seed, count, photos, augment=more)
        for seed, count, more in ((TRAIN_SEED, size.samples, True), (TEST_SEED, size.test_samples, False))
    )
    right = answer_blind(train, test)
    assert (answers_of(recorded) == right).all() and recorded["accuracy"] == right.mean()
    assert 0.25 < right.mean() < 0.28
    students = Store(RESULTS / "rows").read(Row("pair", "teacher", 0))
    assert students is not None and students["questions"] == len(right)
    assert recorded["by_type"] == pytest.approx({t: right[test.type == n].mean() for n, t in enumerate(TYPES)})
