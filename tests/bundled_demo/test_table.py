"""The demo's table: the rows of the widths that were asked for, and figures that are those of the answers."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from examples.bundled_demo.jobs import Result, jobs_of
from examples.bundled_demo.table import print_summary, summarise

PROOF: dict[str, Any] = {
    "codes": 10, "codes_differing": 0, "scales_differing": 0, "weights_differing": 0, "logits_equal": True,
    "processor_files_changed": [],
}  # fmt: skip


def results(low_bits: tuple[int, ...]) -> dict[str, Result]:
    """Answers that are right with a share of their own in each row."""
    rng, found = np.random.default_rng(0), {}
    for number, job in enumerate(jobs_of(low_bits)):
        right = [bool(value) for value in rng.random(500) < 0.95 - 0.05 * number]
        found[job.name] = Result(job, [""] * 500, right, 1000 * job.bits, {"make": 1.0, "score": 2.0}, PROOF)
    return found


@pytest.mark.parametrize("low_bits", [(), (2,), (3, 2), (2, 3)])
def test_the_table_has_the_widths_that_were_asked_for(low_bits: tuple[int, ...]) -> None:
    rows = results(low_bits)
    summary = summarise(rows, None, {"total": 3.0})
    assert list(summary["low_bits"]) == [f"{bits}-bit" for bits in sorted(low_bits, reverse=True)]
    assert set(summary["methods"]) == set(rows)
    for bits in low_bits:
        rounded, learned = (np.mean(rows[f"{name} {bits}-bit"].right) for name in ("round-to-nearest", "GRACE"))
        assert summary["low_bits"][f"{bits}-bit"]["gained"] == pytest.approx(learned - rounded)
    for name in ("QAT + plain KL INT4", "teacher BF16"):
        apart = np.array(rows["GRACE INT4"].right, float) - np.array(rows[name].right, float)
        half = 1.959964 * apart.std(ddof=1) / 500**0.5
        wanted = [apart.mean(), apart.mean() - half, apart.mean() + half]
        assert summary["paired_differences_of_grace_int4"][name] == pytest.approx(wanted)
    assert summary["methods"]["GRACE INT4"]["correct"] == sum(rows["GRACE INT4"].right)
    console = Console(file=io.StringIO(), width=120)
    shown = {"training": 11, "test": 22, "teacher": 33, "student": 44}
    print_summary(summary | {"compositions_shown": shown}, console)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert [f"GRACE {bits}-bit" in text for bits in (2, 3, 5)] == [bits in low_bits for bits in (2, 3, 5)]
    assert f"{100 * np.mean(rows['GRACE INT4'].right):.2f}" in text
    assert "QAT + plain KL INT4" in text and "over the questions" in text
    assert "11 in the training samples, 22 in the test" in text and "33 that trained the bundled teacher" in text
