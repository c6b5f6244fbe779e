"""Damaged samples are used or counted: 3,000 of the mutants of `integration/mutated_samples.py`, which says what must hold."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grace_plugin.data.measure import Entry
from integration.mutated_samples import Workshop, _judged, mutant, run
from tests.tiny import make_samples


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mutants"))


@pytest.mark.slow
def test_mutated_samples__3_000_of_them__each_used_or_counted(shop: Workshop) -> None:
    outcomes = dict(run(range(3000), shop))
    assert [f"{number}: {outcome}" for number, outcome in outcomes.items() if outcome.startswith("FAULT")] == []
    counts = Counter(outcomes.values())
    assert counts["used"] > 200
    assert sum(count >= 5 for count in counts.values()) >= 12  # reasons of all kinds, not one that hides the others


def test_mutated_samples__made_from_their_number__the_same_again(shop: Workshop) -> None:
    for number in (8, 16, 24):
        assert mutant(number, shop) == mutant(number, shop)
    assert len({mutant(8 * number, shop) for number in range(100)}) > 95


def test_judgement_of_a_mutant__what_must_not_happen__is_a_error(shop: Workshop) -> None:
    """The checks themselves: each of them can fail."""
    collator, [sample] = shop.collators[0], make_samples(1)

    def judged(entry: Entry, given: Any = sample) -> str:
        return _judged(given, entry, 0, collator)

    tokens = collator([sample])["input_ids"].shape[1]
    assert judged(Entry(tokens=tokens)) == "used"
    assert judged(Entry(tokens=tokens + 1)).startswith("FAULT: ")
    assert judged(Entry(tokens=tokens), {"messages": []}).startswith(
        "FAULT: checked, and the collator raises SampleError"
    )
    assert judged(Entry(reason="malformed", message="x" * 600)) == "malformed"
    assert judged(Entry(reason="malformed", message="x" * 601)) == "FAULT: a message of 601 characters"
    assert judged(Entry(reason="malformed")) == "FAULT: a message of 0 characters"
    shop.seen.clear()
    shop.watching = True
    subprocess.run([sys.executable, "-c", ""], check=True)
    shop.watching = False
    assert shop.seen
    assert os.path.exists(Path(shop.path("fifo.png")))
