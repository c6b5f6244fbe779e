"""Test the demo's table: the requested numbers of bits, and figures computed from the answers."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from examples.bundled_demo.jobs import Result, jobs_of
from examples.bundled_demo.table import print_summary, summarise

PROOF: dict[str, Any] = {
    "codes": 10,
    "codes_differing": 0,
    "scales_differing": 0,
    "weights_differing": 0,
    "logits_equal": True,
    "processor_files_changed": [],
}


def results(low_bits: tuple[int, ...]) -> dict[str, Result]:
    """Return answers with a different share of correct ones for each method."""
    rng, found = np.random.default_rng(0), {}
    for number, job in enumerate(jobs_of(low_bits)):
        right = [bool(value) for value in rng.random(500) < 0.95 - 0.05 * number]
        found[job.name] = Result(job, [""] * 500, right, 1000 * job.bits, {"make": 1.0, "score": 2.0}, PROOF)
    return found


@pytest.mark.parametrize("low_bits", [(), (2,), (3, 2), (2, 3)])
def test_summary__low_bits__requested_methods_with_figures_of_the_answers(low_bits: tuple[int, ...]) -> None:
    found = results(low_bits)
    summary = summarise(found, None, {"total": 3.0})
    assert list(summary["low_bits"]) == [f"{bits}-bit" for bits in sorted(low_bits, reverse=True)]
    assert set(summary["methods"]) == set(found)
    for bits in low_bits:
        rounded, learned = (np.mean(found[f"{name} {bits}-bit"].right) for name in ("round-to-nearest", "GRACE"))
        assert summary["low_bits"][f"{bits}-bit"]["gained"] == pytest.approx(learned - rounded)
    for name in ("QAT + plain KL INT4", "teacher BF16"):
        difference = np.array(found["GRACE INT4"].right, float) - np.array(found[name].right, float)
        half = 1.959964 * difference.std(ddof=1) / 500**0.5
        wanted = [difference.mean(), difference.mean() - half, difference.mean() + half]
        assert summary["paired_differences_of_grace_int4"][name] == pytest.approx(wanted)
    assert summary["methods"]["GRACE INT4"]["correct"] == sum(found["GRACE INT4"].right)
    console = Console(file=io.StringIO(), width=120)
    shown = {"training": 11, "test": 22, "teacher": 33, "student": 44}
    print_summary(summary | {"compositions_shown": shown}, console)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert [f"GRACE {bits}-bit" in text for bits in (2, 3, 5)] == [bits in low_bits for bits in (2, 3, 5)]
    assert f"{100 * np.mean(found['GRACE INT4'].right):.2f}" in text
    assert "QAT + plain KL INT4" in text and "over the questions" in text
    assert "11 in the training samples, 22 in the test" in text and "33 that trained the bundled teacher" in text


def test_summary__intervals__name_what_grace_leads_and_what_it_does_not() -> None:
    summary = summarise(results(()), None, {"total": 3.0})
    summary["paired_differences_of_grace_int4"] = {
        "GPTQ INT4": [0.02, 0.01, 0.03],
        "student BF16": [0.0, -0.01, 0.01],
        "teacher BF16": [-0.02, -0.03, -0.01],
    }
    console = Console(file=io.StringIO(), width=400)
    print_summary(summary, console)
    assert (
        "GRACE INT4 is more accurate than GPTQ INT4; is less accurate than teacher BF16; does not differ significantly from "
        "student BF16 (95 % intervals over the questions, one seed)"
    ) in console.file.getvalue()  # type: ignore[attr-defined]
