"""A part of `python -m integration.bad_models`, and that its verdicts can be failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.bad_model_cases import Case, Materials, cases, copied, finished
from integration.bad_models import problem_of, try_all, try_case

PART = (
    "student: whole", "student: in shards", "student: known leftovers", "student: a finished checkpoint",
    "student: no output head", "student: keys of a PEFT wrapper", "student: adapter_config.json", "student: modelopt FP8",
    "student: a NaN", "student: a text model", "teacher: a shard cut short", "checkpoint: whole", "checkpoint: a code flipped",
)  # fmt: skip


def test_cases__all__enough_and_named_once() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) >= 60 and set(PART) <= set(names)
    assert all(case.like is None or case.like in names[: names.index(case.name)] for case in cases())


def test_bad_models__a_part_of_them__as_expected(tmp_path: Path) -> None:
    found = try_all([case for case in cases() if case.name in PART], tmp_path)
    assert [outcome for outcome in found if outcome.problem] == []
    assert {outcome.outcome for outcome in found} == {"works", "refused"} and len(found) > 2 * len(PART)


def test_bad_models__expectation_that_is_not_met__is_a_problem(tmp_path: Path) -> None:
    made = Materials(tmp_path / "materials")
    works, refused = Case("w", "checkpoint", finished(), "anything"), Case("r", "checkpoint", copied("student"))
    assert [one.problem for one in try_case(works, made, tmp_path / "w", {})] == ["works, expected: refused"]
    assert [one.problem for one in try_case(refused, made, tmp_path / "r", {})] == ["refused, expected: works"]


@pytest.mark.parametrize(
    ("said", "left", "steps", "changed", "problem"),
    [
        ("no head", [], 0, False, ""),
        ("something", [], 0, False, "says nothing like 'head'"),
        ("head\n" * 11, [], 0, False, "11 lines, 55 characters of message"),
        ("head" * 600, [], 0, False, "1 lines, 2400 characters of message"),
        ("head", ["out/config.json"], 0, False, "left out/config.json"),
        ("head", [], 1, False, "1 step(s) begun"),
        ("head", [], 0, True, "changed the input"),
    ],
)  # fmt: skip
def test_problem_of__each_violation__is_named(
    said: str, left: list[str], steps: int, changed: bool, problem: str
) -> None:
    case = Case("c", "student", copied("student"), "head")
    assert problem_of(case, "train", ("refused", said, None), left, steps, changed) == problem
    assert problem_of(case, "train", ("failed", said, None), left, steps, changed) == "failed, expected: refused"
