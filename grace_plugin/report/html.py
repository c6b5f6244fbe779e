"""A report as a folder: `report.json` and one HTML page without scripts or outside references, written whole or not at all.

The page escapes everything that comes from samples, names and models, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grace_plugin.export.stage import locate
from grace_plugin.report.charts import bar_chart, has_matplotlib

REPORT, PAGE = "report.json", "page.html"
_KINDS = 12  # small charts of layer kinds
_LISTED = 300  # layers in the page's table; report.json has all


def label(value: float | None) -> str:
    """Format a number with 3 digits, and without an exponent where none is needed."""
    if value is None:
        return "-"
    if value and (abs(value) < 1e-4 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _interval(difference: Sequence[float] | None, scale: float, digits: str) -> str:
    if difference is None:
        return "-"
    mean, low, high = (f"{scale * value:+{digits}}" for value in difference)
    return f"{mean} [{low}, {high}]"


def write_report(folder: Path, template: str, report: Mapping[str, Any], **shown: Any) -> Path:
    """Write report and page to a folder that appears complete; returns the page.

    Args:
        template: file name in this package.
        shown: further variables of the template.

    Raises:
        FileExistsError: the folder holds something.
    """
    destination = locate(folder)
    # strict: a field that a report lacks is an error, not an empty cell
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"label": label, "percent": _percent}
    environment.filters["points"] = lambda difference: _interval(difference, 100, ".1f")
    environment.filters["nats"] = lambda difference: _interval(difference, 1, ".3g")
    text = environment.get_template(template).render(report=report, has_charts=has_matplotlib(), **shown)
    destination.clear()
    try:
        destination.stage.mkdir(parents=True)
        (destination.stage / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        # samples may hold lone surrogates, which UTF-8 has no bytes for
        (destination.stage / PAGE).write_text(text, encoding="utf-8", errors="backslashreplace")
        destination.publish()
    except BaseException:
        destination.clear()
        raise
    return folder / PAGE


def _kind_charts(layers: Sequence[Mapping[str, Any]], depth: int) -> list[dict[str, Any]]:
    """Draw the output error of each kind of linear over the decoder layers; experts of a layer are averaged."""
    kinds: dict[str, dict[int, list[float]]] = {}
    for one in layers:
        if one["decoder_layer"] is None or one["output_error"] is None:
            continue
        kind = re.sub(r"experts\.\d+\.", "experts.*.", one["kind"])
        kinds.setdefault(kind, {}).setdefault(one["decoder_layer"], []).append(one["output_error"])
    means = {kind: {at: sum(v) / len(v) for at, v in kinds[kind].items()} for kind in sorted(kinds)[:_KINDS]}
    high = max((value for kind in means.values() for value in kind.values()), default=1.0)
    names = [str(index) for index in range(depth)]
    return [
        {
            "title": kind,
            "svg": bar_chart(names, {kind: [of.get(at) for at in range(depth)]}, high=1.05 * high, small=True),
        }
        for kind, of in means.items()
    ]


def write_comparison(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write the report of `compare_checkpoints`; returns the page."""
    layers, decoder_layers = report["layers"], report["decoder_layers"]
    names = [str(one["decoder_layer"]) for one in decoder_layers]
    keys = {"visual tokens": "hidden_error_visual", "text tokens": "hidden_error_text"}
    series = {
        name: [one[key] for one in decoder_layers]
        for name, key in keys.items()
        if any(one[key] for one in decoder_layers)
    }
    weights = sum(one["weights"] for one in layers)
    return write_report(
        folder,
        "comparison.html.j2",
        report,
        title=f"{report['a']['path']} against {report['b']['path']}",
        hidden=bar_chart(names, series),
        kinds=_kind_charts(layers, len(decoder_layers)),
        listed=layers[:_LISTED],
        clip_share=sum(one["clip_share"] * one["weights"] for one in layers) / weights if weights else None,
        worst_kl=max((token["kl"] for one in report["worst"] for token in one["tokens"]), default=0.0),
    )
