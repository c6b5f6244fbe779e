"""`python -m benchmarks.accuracy.rules_table`: the table of candidate rules for beta, from their recorded rows.

Reads benchmarks/results/controller_rules/rows.jsonl (one JSON object per trained row: accuracy, beta and GDKD over the run) and
writes table.md next to it. A difference is paired by seed with the fixed weight named in the column's head; its interval is a
95 % t-interval over the seeds that both have.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy.statistics import t_half_width

__all__ = ["make_table"]

RESULTS = Path(__file__).parents[1] / "results" / "controller_rules"
REFERENCES = ("beta0.5", "beta1.0")
SETTINGS = {"w4g128": "4 bits", "w2g128": "2 bits", "bf16": "BF16"}
Runs = dict[int, dict[str, Any]]  # by seed
Setting = tuple[str, str, bool]  # data set, format, whether the relation has its default weight


def _difference(ours: Runs, other: Runs) -> str:
    shared = sorted(ours.keys() & other.keys())
    if not shared or ours is other:
        return ""
    points = [100 * (ours[seed]["accuracy"] - other[seed]["accuracy"]) for seed in shared]
    if len(points) == 1:
        return f"{points[0]:+.2f} (one seed)"
    half = t_half_width(points)
    return f"{mean(points):+.2f} [{mean(points) - half:+.2f}, {mean(points) + half:+.2f}]"


def _line(name: str, runs: Runs, references: list[Runs]) -> str:
    betas = [beta for run in runs.values() for beta in run["beta"]]
    violated = [run["controller"]["violated"] for run in runs.values() if "violated" in run["controller"]]
    cells = [
        name,
        f"{100 * mean(run['accuracy'] for run in runs.values()):.2f}",
        str(len(runs)),
        *(_difference(runs, other) for other in references),
        f"{min(betas):.2f} to {max(betas):.2f}, mean {mean(betas):.2f}",
        f"{100 * mean(violated):.0f} %" if violated else "",
    ]
    return f"| {' | '.join(cells)} |"


def _pooled(groups: Mapping[Setting, Mapping[str, Runs]]) -> list[str]:
    """Return the lines of a table over all settings: what each rule is above the constant 0.5, by pairs of one seed."""
    points: dict[str, dict[Setting, list[float]]] = defaultdict(dict)
    for setting, methods in groups.items():
        base = methods.get("beta0.5", {})
        for name, runs in methods.items():
            shared = runs.keys() & base.keys()
            if shared and name != "beta0.5":
                points[name][setting] = [100 * (runs[seed]["accuracy"] - base[seed]["accuracy"]) for seed in shared]
    lines = []
    for name, settings in points.items():
        pairs = [point for values in settings.values() for point in values]
        half = t_half_width(pairs)
        worst = min(mean(values) for values in settings.values())
        interval = f"{mean(pairs):+.2f} [{mean(pairs) - half:+.2f}, {mean(pairs) + half:+.2f}]"
        lines.append((mean(pairs), f"| {name} | {interval} | {len(pairs)} | {len(settings)} | {worst:+.2f} |"))
    return [line for _, line in sorted(lines, reverse=True)]


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return the tables in Markdown, one for each data set, number of bits and weight of the relation."""
    groups: dict[Setting, dict[str, Runs]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        name = row["method"].removeprefix("grace").removeprefix("-")
        default = name.startswith("default")
        name = name.removeprefix("default").removeprefix("-") or "today's controller"
        groups[row["data"], row["setting"], default][name][row["seed"]] = row
    parts = [
        "# Candidate rules for the weight of distillation (beta)",
        "",
        (__doc__ or "").partition("\n\n")[2].strip(),
        "",
    ]
    parts += [
        "## All settings",
        "",
        "Accuracy minus that of the constant 0.5, paired by setting and seed; the interval treats all pairs alike.",
        "",
        "| rule | minus beta0.5 | pairs | settings | worst setting |",
        "|---|---|---|---|---|",
        *_pooled(groups),
        "",
    ]
    heads = " | ".join(f"minus {name}" for name in REFERENCES)
    for (data, setting, default), methods in sorted(groups.items()):
        weights = {row["weight"] for runs in methods.values() for row in runs.values()}
        weight = "default (3)" if default else f"searched ({', '.join(f'{w:g}' for w in sorted(weights, key=str))})"
        parts += [
            f"## {data}, {SETTINGS[setting]}, relation weight {weight}",
            "",
            f"| rule | accuracy % | seeds | {heads} | beta | constraint violated |",
            "|---|---|---|" + "---|" * (len(REFERENCES) + 2),
        ]
        order = sorted(methods, key=lambda name: -mean(run["accuracy"] for run in methods[name].values()))
        parts += [_line(name, methods[name], [methods.get(other, {}) for other in REFERENCES]) for name in order]
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Write table.md and print it."""
    rows = [json.loads(line) for line in (RESULTS / "rows.jsonl").read_text().splitlines()]
    table = make_table(rows)
    (RESULTS / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
