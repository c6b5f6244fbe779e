"""The family table as a test: every row passes, in one vLLM process."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.families import Row, lessons, questions, served, show, table, taught
from tests.tiny import EVERY

GOOD = {"prompts_differing": 0, "tokens": 100, "mean": 0.001, "most": 0.01, "grey": 0.2}


@pytest.mark.parametrize(
    ("change", "said"),
    [({"tokens_differing": 0}, "tokens equal"), ({"tokens_differing": 2, "margin": 0.01}, "2 near-ties"),
     ({"tokens_differing": 3, "margin": 0.01}, "failed"), ({"tokens_differing": 1, "margin": 0.2}, "failed")],
)  # fmt: skip
def test_served__tokens_differing__not_called_equal(change: dict[str, float], said: str) -> None:
    assert served(Row("llava", **(GOOD | change))) == said


def test_show__judged_with_causal_mask__said_in_the_table() -> None:
    head, row = show([Row("gemma3", against="causal picture tokens (two-way: mean 0.03)")]).splitlines()
    assert "against" in head and "causal picture tokens (two-way: mean 0.03)" in row


@pytest.mark.parametrize("name", EVERY)
def test_questions__by_family__those_trained_on(name: str) -> None:
    """Answers that were learned have margins; families that are not asked about pairs are trained on them all the same."""
    given, asked, trained = lessons(name), questions(name), taught(name)
    assert all(row["messages"][-1]["role"] == "assistant" for row in given)
    assert [row["messages"] for row in asked] == [row["messages"][:-1] for row in given]
    assert [row["messages"] for row in trained[: len(given)]] == [row["messages"] for row in given]
    assert {len(row["images"]) for row in trained} == {0, 1, 2}
    for question, row in zip(asked, trained, strict=False):
        assert [image.tobytes() for image in question["images"]] == [image.tobytes() for image in row["images"]]
        shown = [frames for frames, _ in question.get("videos", [])]
        assert len(shown) == len(row["videos"])
        assert all((one == other).all() for one, other in zip(shown, row["videos"], strict=True))


@pytest.fixture(scope="module")
def found(serve_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """name -> its row."""
    rows, kernels = table(list(EVERY), serve_python, tmp_path_factory.mktemp("families"))
    print(show(rows), kernels)
    return {row.family: row for row in rows}


@pytest.mark.vllm
@pytest.mark.parametrize("name", EVERY)
def test_family__train_verify_serve__passes(found: dict[str, Row], name: str) -> None:
    row = found[name]
    assert row.passed, row
    assert (row.against == "the model") == (row.two_way is None)
    if (
        row.two_way is not None
    ):  # the day vLLM's CPU attention lets picture tokens see each other, this fails: judge them so
        assert row.one_way is not None and row.two_way > 2 * row.one_way, row
    assert row.codes > 0
    assert row.tokens >= 22
