"""Test that the demo's table in docs/results.md has the figures of the recorded run."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = {
    "BF16 fine-tuned, same steps and data": "BF16 fine-tuned",
    "**GRACE INT4**": "GRACE INT4",
    "QAT + plain KL INT4, same teacher, steps and data": "QAT + plain KL INT4",
}


def test_results_page__table_of_the_demo__figures_of_the_recorded_run() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    section = page.partition("## The bundled demo")[2].partition("\n## ")[0]
    (file,) = set(re.findall(r"benchmarks/results/demo/summary_plain_kl\.json", section))
    run = json.loads((ROOT / file).read_text())
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    seen = set()
    for name, accuracy, *difference in lines:
        if " / " in accuracy:
            family = name.partition(",")[0]
            wanted = " / ".join(f"{100 * run['methods'][f'{family} {bits}-bit']['accuracy']:.2f}" for bits in (3, 2))
            assert accuracy == wanted
            continue
        method = NAMED.get(name, name)
        seen.add(method)
        assert accuracy.strip("* ") == f"{100 * run['methods'][method]['accuracy']:.2f}", name
        if method != "GRACE INT4":
            mean, low, high = (100 * value for value in run["paired_differences_of_grace_int4"][method])
            assert difference[0].strip() == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", name
    assert seen == {*run["paired_differences_of_grace_int4"], "GRACE INT4"} and len(lines) == len(seen) + 2
    assert run["codes_differing"] == 0 and run["methods"]["GRACE INT4"]["questions"] == 8000
    shown = run["compositions_shown"]
    assert f"{shown['training']:,} samples" in section and f"{shown['teacher'] + shown['student']:,}" in section
    assert f"on {run['vllm_equal']}\nof {run['vllm_asked']} questions" in section
