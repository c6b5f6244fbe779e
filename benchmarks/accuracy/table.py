"""Make the tables and the chart of the recorded rows.

They are results/accuracy/table.md and accuracy.svg, the sections of docs/results.md, and the short table of the README. All
figures are read from the rows; a row that failed is listed with its error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.blind import FILE
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.plot import chart
from benchmarks.accuracy.rows import Store
from benchmarks.accuracy.statistics import Group, collect, compare

__all__ = ["write_table"]

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
SHORT_BEGIN, SHORT_END = "<!-- results: made by python -m benchmarks.accuracy --table -->", "<!-- results: end -->"
BEGIN, END = "<!-- accuracy: made by python -m benchmarks.accuracy --table -->", "<!-- accuracy: end -->"
CAPTIONS_BEGIN = "<!-- captions: made by python -m benchmarks.accuracy --set captions --table -->"
CAPTIONS_END = "<!-- captions: end -->"
SHOWN = {
    "bf16": "BF16",
    "w8g128": "8 bits, group 128",
    "w4g128": "4 bits, group 128",
    "w4row": "4 bits, per row",
    "w3g128": "3 bits, group 128",
    "w3row": "3 bits, per row",
    "w2g128": "2 bits, group 128",
    "w2g32": "2 bits, group 32",
    "w2g64": "2 bits, group 64",
    "w2row": "2 bits, per row",
}
NAMES = {
    "student": "student BF16",
    "teacher": "teacher BF16",
    "teacher-small": "smaller teacher BF16",
    "teacher-large": "larger teacher BF16",
    "rtn": "round-to-nearest",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "autoround": "AutoRound",
    "kl": "plain KL",
    "grace": "GRACE",
    "kl+rtn": "BF16 + plain KL, then round-to-nearest",
    "kl+gptq": "BF16 + plain KL, then GPTQ",
    "grace+rtn": "BF16 + GRACE, then round-to-nearest",
    "grace+gptq": "BF16 + GRACE, then GPTQ",
    "torchao": "torchao QAT",
    "modelopt": "ModelOpt QAT + plain KL",
    "grace-calibration": "GRACE on 512 samples, a tenth of the steps",
    "grace-default": "GRACE at its defaults",
}
ORDER = (
    "rtn",
    "gptq",
    "awq",
    "autoround",
    "kl+rtn",
    "kl+gptq",
    "grace+rtn",
    "grace+gptq",
    "torchao",
    "modelopt",
    "ce",
    "kl",
    "grace-calibration",
    "grace-default",
    "grace",
)
PARTS = {
    "grace-beta": "beta fixed at",
    "grace-k": "gate sharpness",
    "grace-scalerate": "rate of the scales over the weights' (10 by default):",
    "kl-scalerate": "plain KL, rate of the scales over the weights':",
    "grace-max": "controller with beta up to",
    "grace-steps": "share of the steps:",
    "kl-steps": "plain KL, share of the steps:",
    "ce-steps": "QAT alone, share of the steps:",
    "grace-rows": "training samples:",
    "kl-rows": "plain KL, training samples:",
    "ce-rows": "QAT alone, training samples:",
}
CHANGED = {
    "grace-kl": "plain KL in place of the decoupled divergence",
    "grace-norelation": "no relation",
    "grace-nogate": "no gate",
    "grace-frozen": "scales not learned",
    "kl-frozen": "plain KL, scales not learned",
    "grace-scales": "scales and norms alone learned",
    "relation": "relation alone",
    "grace-gptq": "weights and scales start at GPTQ's",
    "grace-awq": "weights and scales start at AWQ's",
    "grace-unmasked": "clipped weights have a gradient",
    "grace-floatscales": "scales rounded to bfloat16 at the end alone",
    "grace-mixed-damage": "half of the weights a bit more, half a bit fewer, by measured damage",
    "grace-mixed-error": "the same by the weights' error",
    "grace-mixed-reverse": "the same, the least damaged with more bits",
    "grace-teacher-small": "smaller teacher",
    "grace-teacher-large": "larger teacher",
    "kl-teacher-small": "plain KL, smaller teacher",
    "kl-teacher-large": "plain KL, larger teacher",
    "grace-layer-last": "relation after the last layer",
    "grace-layers2": "relation after two layers",
    "grace-layers3": "relation after three layers",
    "grace-text": "relation on text tokens too",
    "grace-text-alone": "relation on text tokens alone",
    "grace-minmax": "scales start at the largest weight",
    "grace": "GRACE",
}
READING = (
    "Differences are paired by seed, on the same questions, with 95 % t-intervals over the seeds that both rows have. An "
    "interval holds other seeds, not other questions, images or teachers; over two seeds it is wide, or narrow by chance. One "
    "seed has no interval. A weight is that of the relation (of KL for methods without one): searched, but for GRACE at its "
    "defaults."
)
BLIND = "without the image: each question's most frequent answer in training"
#: comparisons that no other table has and that docs/results.md cites: the first row minus the second
FURTHER = (
    (("w4g128", "grace"), ("bf16", "grace")),
    (("w2g128", "grace"), ("bf16", "grace")),
    *(((setting, "grace-default"), (setting, one)) for setting in ("bf16", "w4g128", "w2g128") for one in ("kl", "ce")),
    *((("w2g128", "grace-default"), ("w2g128", one)) for one in ("modelopt", "grace+gptq")),
    *((("w4g128", "grace-calibration"), ("w4g128", one)) for one in ("rtn", "gptq", "awq", "autoround")),
    *((("w2g128", "grace-calibration"), ("w2g128", one)) for one in ("gptq", "autoround")),
    *((("w2g128", one), ("w2g128", "kl")) for one in ("kl-frozen", "modelopt", "kl-teacher-small", "kl-teacher-large")),
    (("w2g128", "grace-text-alone"), ("w2g128", "grace-norelation")),
    (("w2g128", "ce"), ("bf16", "ce")),
    *((("w4g128", one), ("w4g128", "gptq")) for one in ("ce", "kl")),
    (("w2g128", "ce"), ("w2g128", "gptq")),
)
Groups = dict[tuple[str, str], Group]


def name_of(setting: str, method: str) -> str:
    """What a method is called in a setting."""
    if method == "ce":
        return "fine-tuned" if setting == "bf16" else "QAT alone"
    told = NAMES.get(method, method)
    trained = setting not in ("bf16", "pair") and method in ("kl", "grace", "grace-default")
    return f"QAT + {told}" if trained else told


def label_of(group: Group) -> str:
    """Name a group in a table: its method, and the weight that its seeds trained with where the method has one to search."""
    known = group.method in (*NAMES, "ce")
    told = name_of(group.setting, group.method) if known else changed_part(group.method)
    method = METHODS.get(group.method)
    if method is None or method.weight is None or not group.records:
        return told
    used = sorted({record.get("weight_used") or record.get("weight") or method.weight for record in group.records})
    return f"{told}, weight {' and '.join(f'{one:g}' for one in used)}"


def changed_part(method: str) -> str:
    """What an ablation changes, in words."""
    if method in CHANGED:
        return CHANGED[method]
    stem = max((part for part in PARTS if method.startswith(part)), key=len, default="")
    return f"{PARTS[stem]} {method[len(stem) :]}" if stem else method


def closed(groups: Groups, setting: str) -> str:
    """How much of the way from the fine-tuned BF16 student to the teacher GRACE goes, as a sentence. Where the
    interval of its lead over that student holds 0, or there is none, the sentence says that instead.
    """
    start, ours, top = (groups.get(key) for key in (("bf16", "ce"), (setting, "grace"), ("pair", "teacher")))
    if start is None or ours is None or top is None or top.mean <= start.mean or not {*start.seeds} & {*ours.seeds}:
        return ""
    lead = compare(ours, start)
    if not lead.decided:
        return f"GRACE is not told apart from the fine-tuned BF16 student: {lead} points."
    share = 100 * (ours.mean - start.mean) / (top.mean - start.mean)
    return f"GRACE closes {share:.0f} % of the way from the fine-tuned BF16 student to the teacher (its lead: {lead} points)."


def _spread(group: Group) -> str:
    return f"{group.mean:.2f}" + (f" ± {group.deviation:.2f}" if group.deviation is not None else "")


def _line(group: Group, against: Group | None) -> str:
    types = " | ".join(f"{value:.1f}" for value in group.by_type().values())
    types = types if group.held_out is None else f"{group.held_out:.1f} | {types}"
    apart = against is None or against is group or (group.method != "teacher" and not {*group.seeds} & {*against.seeds})
    difference = "" if apart or against is None else str(compare(against, group))
    return f"| {label_of(group)} | {_spread(group)} | {len(group.seeds)} | {difference} | {types} |"


def blind_line(blind: dict[str, Any] | None, types: Sequence[str]) -> list[str]:
    """Return the line of the baseline that sees no image, with a cell for each of `types`; none where it was not computed."""
    if blind is None:
        return []
    cells = " | ".join(f"{100 * blind['by_type'][one]:.1f}" if one in blind["by_type"] else "" for one in types)
    return [f"| {BLIND} | {100 * blind['accuracy']:.2f} | | | {cells} |"]


def missing_default(groups: Groups, setting: str) -> str:
    """Say where GRACE at its defaults is when a setting has a GRACE row and no such row; empty otherwise."""
    ours = groups.get((setting, "grace"))
    if ours is None or not ours.records or (setting, "grace-default") in groups:
        return ""
    default = METHODS["grace"].weight
    if all((record.get("weight_used") or record.get("weight") or default) == default for record in ours.records):
        return "as GRACE: the search chose the default weight"
    return "not run"


def main_table(groups: Groups, blind: dict[str, Any] | None = None) -> list[str]:
    """One section for each setting that has a GRACE row or another main row."""
    pair = [group for (setting, _), group in groups.items() if setting == "pair" and group.method != "tower"]
    if not pair:
        return []
    types = [*([] if pair[0].held_out is None else ["held-out choice"]), *pair[0].by_type()]
    head = [f"| | accuracy % ± sd | seeds | GRACE minus the method, points | {' | '.join(types)} |"]
    head.append("|---|---|---|---|" + "---|" * len(types))
    lines = ["## The pair", "", *head, *(_line(group, None) for group in sorted(pair, key=lambda g: -g.mean))]
    lines += blind_line(blind, types)
    for setting, told in SHOWN.items():
        found = [groups[setting, method] for method in ORDER if (setting, method) in groups]
        if len(found) > 1:
            ours = groups.get((setting, "grace"))
            pair = [groups["pair", m] for m in ("student", "teacher") if ("pair", m) in groups and ours is not None]
            lines += ["", f"## {told}", "", *head, *(_line(group, ours) for group in (*pair, *found))]
            lines += ["", f"GRACE at its defaults: {said}."] if (said := missing_default(groups, setting)) else []
            lines += ["", way] if (way := closed(groups, setting)) else []
    return lines


def rounding_table(groups: Groups) -> list[str]:
    """What round-to-nearest costs the student in each setting, on the seeds that were run."""
    student, lines = groups.get(("pair", "student")), []
    for setting, told in SHOWN.items():
        group = groups.get((setting, "rtn"))
        if group is not None and student is not None:
            lines.append(f"| {told} | {_spread(group)} | {len(group.seeds)} | {compare(group, student)} |")
    head = [
        "",
        "## Where rounding hurts",
        "",
        "| round-to-nearest | accuracy % ± sd | seeds | minus student BF16, points |",
    ]
    return [*head, "|---|---|---|---|", *lines] if lines else []


def ablation_table(groups: Groups) -> list[str]:
    """GRACE with a part changed, against GRACE as it is in that setting, on the seeds that both have."""
    lines: list[str] = []
    for (setting, method), group in sorted(groups.items()):
        changed = setting not in ("bf16", "w2g128", "w4g128", "w3g128", "w8g128", "pair")
        grace = groups.get(("w2g128" if method == "grace" else setting, "grace"))
        if grace is None or (method in ORDER and not (changed and method == "grace")):
            continue
        if setting == "pair" or not set(group.seeds) & set(grace.seeds):
            continue
        label = changed_part(method) + ("" if setting == "w2g128" else f", {SHOWN.get(setting, setting)}")
        bound = [record["controller"].get("share_at_bound") for record in group.records if record.get("controller")]
        pinned = f"{100 * max(bound):.0f} %" if bound and None not in bound else ""
        lines.append(f"| {label} | {_spread(group)} | {len(group.seeds)} | {compare(group, grace)} | {pinned} |")
    told = (
        "Rate and weight are those found for GRACE (plain KL and QAT alone have their own). A part is compared with GRACE in "
        "its own setting, another group size with group 128 at 2 bits."
    )
    head = ["", "## Ablations", "", told, ""]
    head += [
        "| | accuracy % ± sd | seeds | minus GRACE, points | steps at a bound |",
        "|---|---|---|---|---|",
    ]
    return head + lines if lines else []


def further_table(groups: Groups) -> list[str]:
    """Return the comparisons of `FURTHER` whose two rows are there and have a seed in common."""
    lines = []
    for first, second in FURTHER:
        ours, other = groups.get(first), groups.get(second)
        if ours is not None and other is not None and {*ours.seeds} & {*other.seeds}:
            told = " | ".join(f"{SHOWN.get(one.setting, 'the pair')}: {label_of(one)}" for one in (ours, other))
            found = compare(ours, other)
            lines.append(f"| {told} | {found} | {found.seeds} |")
    head = ["", "## Further comparisons", "", "| | minus | points | seeds |", "|---|---|---|---|"]
    return head + lines if lines else []


def search_table(records: list[dict[str, Any]]) -> list[str]:
    """Validation accuracy of every rate, and of every weight at the best rate."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    columns: dict[str, tuple[bool, float]] = {}
    for record in records:
        if record.get("part") == "validation" and "failed" not in record:
            rate, weight = record["rate"], record.get("weight")
            tried = f"{rate:g}" if weight is None else f"weight {weight:g}"
            columns[tried] = (weight is not None, rate if weight is None else weight)
            found.setdefault((record["setting"], record["method"]), {})[tried] = 100 * record["accuracy"]
    if not found:
        return []
    order = sorted(columns, key=lambda tried: columns[tried])
    told = "Seed 0, validation accuracy, percent: rates at the default weight, then weights at the best rate (of the relation; "
    lines = ["", "## Search", "", told + "of KL for the methods without one)."]
    lines += ["", "| | " + " | ".join(order) + " |", "|---|" + "---|" * len(order)]
    for (setting, method), several in sorted(found.items()):
        cells = " | ".join(f"{several[tried]:.2f}" if tried in several else "" for tried in order)
        lines.append(f"| {SHOWN[setting]}: {name_of(setting, method)} | {cells} |")
    return lines


def failure_table(records: list[dict[str, Any]]) -> list[str]:
    """Rows that failed, with the last line of their error."""
    lines = [f"| {r['row']} | `{r['failed'].strip().splitlines()[-1][:160]}` |" for r in records if "failed" in r]
    return ["", "## Failed", "", "| row | error |", "|---|---|", *lines] if lines else []


def short_table(groups: Groups) -> str:
    """Return the README's table: seven methods by bits, and what GRACE adds to each at 4 and 2 bits."""
    shown = {"bf16": "BF16 %", "w4g128": "4 bits %", "w2g128": "2 bits %"}
    differences = [f"GRACE minus it, {bits}, points" for bits in ("4 bits", "2 bits")]
    lines = [f"| | {' | '.join([*shown.values(), *differences])} |", "|---" * (len(shown) + 3) + "|"]
    told = {
        "rtn": "student, rounded to nearest",
        "gptq": "student, GPTQ",
        "ce": "cross-entropy (BF16: fine-tuning, else QAT)",
        "kl": "plain KL distillation, weight searched",
        "grace-default": "GRACE at its defaults",
        "grace": "GRACE, weight searched",
    }
    if ("pair", "teacher") in groups:
        lines.append(f"| teacher | {_spread(groups['pair', 'teacher'])} |" + " |" * (len(shown) + 1))
    for method, name in told.items():
        found = {
            one: groups.get(("pair", "student") if (one, method) == ("bf16", "rtn") else (one, method)) for one in shown
        }
        cells = [_spread(group) if group is not None else "" for group in found.values()]
        for setting in ("w4g128", "w2g128"):
            ours, group = groups.get((setting, "grace")), found[setting]
            cells.append(str(compare(ours, group)) if ours and group and group is not ours else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page_section(groups: Groups, blind: dict[str, Any] | None = None) -> str:
    """Return the table of docs/results.md: by setting, mean ± sd and GRACE's lead over each method."""
    lines = [
        "| | accuracy % ± sd | seeds | GRACE (searched) of the same bits minus the method, "
        "points (95 % t-interval over seeds) |",
        "|---|---|---|---|",
    ]
    for method in ("teacher", "student"):
        if ("pair", method) in groups:
            group = groups["pair", method]
            lines.append(f"| {NAMES[method]} | {_spread(group)} | {len(group.seeds)} | |")
    lines += [f"| {BLIND} | {100 * blind['accuracy']:.2f} | | |"] if blind is not None else []
    for setting in ("bf16", "w4g128", "w2g128"):
        ours = groups.get((setting, "grace"))
        for method in ORDER:
            group = groups.get((setting, method))
            if group is not None and ours is not None:
                difference = "" if group is ours else str(compare(ours, group))
                told = f"{SHOWN[setting]}: {label_of(group)}"
                lines.append(f"| {told} | {_spread(group)} | {len(group.seeds)} | {difference} |")
        if missing := missing_default(groups, setting):
            lines.append(f"| {SHOWN[setting]}: {name_of(setting, 'grace-default')} | {missing} | | |")
    ways = [f"{SHOWN[setting]}: {way}" for setting in ("bf16", "w4g128", "w2g128") if (way := closed(groups, setting))]
    return "\n".join([*lines, "", *(f"- {way}" for way in ways)])


def captions_section(groups: Groups, blind: dict[str, Any] | None = None) -> str:
    """Return the captions table of docs/results.md: methods by setting, and GRACE minus each trained method."""
    settings = ("bf16", "w4g128", "w2g128")
    lines = [
        f"| captions, % ± sd | {' | '.join(SHOWN[setting] for setting in settings)} |",
        "|---|" + "---|" * len(settings),
    ]
    if ("pair", "teacher") in groups:
        lines.append(f"| teacher | {_spread(groups['pair', 'teacher'])} | | |")
    lines += [f"| {BLIND} | {100 * blind['accuracy']:.2f} | | |"] if blind is not None else []
    told = {
        "rtn": "student, rounded to nearest",
        "gptq": "GPTQ",
        "ce": "cross-entropy (QAT)",
        "kl": "plain KL",
        "grace-default": "GRACE at its defaults",
        "grace": "GRACE",
    }
    for method, name in told.items():
        cells = []
        for setting in settings:
            group = groups.get(("pair", "student") if (setting, method) == ("bf16", "rtn") else (setting, method))
            weight = (
                label_of(group).rpartition(", weight ")
                if group is not None and method in ("kl", "grace")
                else ("",) * 3
            )
            cell = missing_default(groups, setting) if method == "grace-default" else ""
            cells.append(
                _spread(group) + (f" (weight {weight[2]})" if weight[1] else "") if group is not None else cell
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for method in ("ce", "kl"):
        both = [(groups.get((setting, "grace")), groups.get((setting, method))) for setting in settings]
        cells = [str(compare(ours, one)) if ours is not None and one is not None else "" for ours, one in both]
        lines.append(f"| GRACE minus {told[method]}, points | {' | '.join(cells)} |")
    return "\n".join(lines)


def _replace_section(file: Path, section: str, begin: str, end: str) -> None:
    """Put a section between its two marks in a page."""
    if file.is_file() and begin in (old := file.read_text()):
        before, _, rest = old.partition(begin)
        file.write_text(f"{before}{begin}\n{section}\n{end}{rest.partition(end)[2]}")


def write_table(store: Store, results: Path, pages: bool, told: tuple[str, ...] = ()) -> str:
    """Write table.md and accuracy.svg and return the text of the table.

    Args:
        store: the rows.
        results: folder that is written to.
        pages: also replace the sections of docs/results.md and README.md.
        told: sentences about the data, after the first paragraph.
    """
    records = store.all()
    groups = collect(records)
    devices = sorted({record["environment"]["device"] for record in records})
    revisions = sorted({record["revision"] for record in records})
    hours = sum(record["seconds"] for record in records) / 3600
    told = (*told, *sorted({record["pictures"] + "." for record in records if "pictures" in record}))
    blind = json.loads((results / FILE).read_text()) if (results / FILE).is_file() else None
    head = [
        "# Accuracy study",
        "",
        f"{len(records)} rows, {hours:.1f} process hours on {', '.join(devices)}, revisions "
        f"{', '.join(revisions)}. {READING}",
        "",
        *(line for one in told for line in (one, "")),
    ]
    parts = [
        *head,
        *main_table(groups, blind),
        *rounding_table(groups),
        *ablation_table(groups),
        *further_table(groups),
        *search_table(records),
        *failure_table(records),
    ]
    text = "\n".join(parts) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / "table.md").write_text(text)
    (results / "accuracy.svg").write_text(chart(groups, name_of, SHOWN, ORDER))
    if pages and any("held_out" in record for record in records):
        _replace_section(PAGE, captions_section(groups, blind), CAPTIONS_BEGIN, CAPTIONS_END)
    elif pages:
        _replace_section(PAGE, page_section(groups, blind), BEGIN, END)
        _replace_section(README, short_table(groups), SHORT_BEGIN, SHORT_END)
    return text
