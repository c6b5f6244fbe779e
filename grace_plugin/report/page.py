"""A report as a folder: `report.json` and one HTML file without scripts or outside references, written whole or not at all.

The page escapes everything that comes from rows, names and models; pictures are JPEGs inside it, charts inline SVG, and its
colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grace_plugin.export.stage import check_destination
from grace_plugin.report.charts import bars, label

__all__ = ["PAGE", "REPORT", "write_damage", "write_folder"]

REPORT, PAGE = "report.json", "page.html"
_KINDS = 12  # small charts of layer kinds
_LISTED = 300  # layers in the page's table; report.json has all
_ERROR = "output_error"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _points(difference: Sequence[float] | None) -> str:
    if difference is None:
        return "-"
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _nats(difference: Sequence[float] | None) -> str:
    if difference is None:
        return "-"
    mean, low, high = difference
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def write_folder(folder: Path, template: str, report: Mapping[str, Any], **shown: Any) -> Path:
    """Write report and page to a folder that appears complete; returns the page.

    Raises:
        FileExistsError: the folder holds something.
    """
    check_destination(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"label": label, "percent": _percent, "points": _points, "nats": _nats}
    text = environment.get_template(template).render(report=report, **shown)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (partial / PAGE).write_text(text, encoding="utf-8", errors="backslashreplace")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder / PAGE


def _kind_charts(layers: Sequence[Mapping[str, Any]], depth: int) -> list[dict[str, Any]]:
    """One small chart for each kind of linear, its output error over the decoder layers; experts of a layer are averaged."""
    kinds: dict[str, dict[int, list[float]]] = {}
    for one in layers:
        if one["decoder_layer"] is None or one[_ERROR] is None:
            continue
        kind = re.sub(r"experts\.\d+\.", "experts.*.", one["kind"])
        kinds.setdefault(kind, {}).setdefault(one["decoder_layer"], []).append(one[_ERROR])
    order = sorted(kinds)[:_KINDS]
    means = {kind: {at: sum(v) / len(v) for at, v in kinds[kind].items()} for kind in order}
    high = max((value for kind in order for value in means[kind].values()), default=1.0)
    names = [str(index) for index in range(depth)]
    return [
        bars(
            kind, names, {_ERROR: [means[kind].get(index) for index in range(depth)]}, width=350, height=130, high=high
        )
        for kind in order
    ]


def _pooled(values: Sequence[tuple[float, int]]) -> float | None:
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else None


def write_damage(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write the folder of a damage report; returns the page."""
    depth = report["decoder_layers"]
    names = [str(one["decoder_layer"]) for one in depth]
    keys = {"visual tokens": "hidden_error_visual", "text tokens": "hidden_error_text"}
    series = {name: [one[key] for one in depth] for name, key in keys.items() if any(one[key] for one in depth)}
    return write_folder(
        folder, "damage.html.j2", report, title=f"{report['a']['path']} against {report['b']['path']}",
        hidden=bars("Error of each decoder layer's output", names, series),
        kinds=_kind_charts(report["layers"], len(depth)), listed=report["layers"][:_LISTED],
        clip_share=_pooled([(one["clip_share"], one["weights"]) for one in report["layers"]]),
        worst_kl=max((token["kl"] for row in report["worst"] for token in row["tokens"]), default=0.0),
    )  # fmt: skip
