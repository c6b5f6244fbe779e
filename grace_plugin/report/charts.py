"""Bar and line charts as inline SVG, drawn by matplotlib (`pip install grace-plugin[report]`).

Without matplotlib a chart is an empty string and the page shows its tables alone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

COLOURS = ("#3f7fc1", "#d0702c", "#4f9a5f")  # readable on the light and on the dark page
STYLES = ("-", "--", ":")
GREY = "#808080"


def has_matplotlib() -> bool:
    """Whether charts can be drawn."""
    return find_spec("matplotlib") is not None


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


@contextmanager
def _axes(size: tuple[float, float], out: list[str]) -> Iterator[Any]:
    """Axes to draw on; the SVG is appended to `out` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and a backend in global state

    # Text stays text, so that it can be read aloud and takes the page's colour. A fixed salt makes equal charts equal bytes.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "grace", "font.family": "sans-serif", "font.size": 9}
    ):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=GREY, alpha=0.3)
        axes.tick_params(length=0)
        yield axes
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False)
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML an SVG needs no namespaces, and without them the page names no address at all. The ids of drawn parts are
    # the same in every chart, and nothing refers to them.
    out.append(re.sub(r' xmlns(:xlink)?="[^"]*"| id="[a-z0-9.]+_\d+"', "", svg))


def bar_chart(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    high: float | None = None,
    small: bool = False,
) -> str:
    """Draw a bar for each name and series, next to each other; None leaves a gap.

    Args:
        names: labels of the horizontal axis; only some are written where there are many.
        high: top of the vertical axis, to give several charts the same.
        small: half as wide and high.
    """
    if not has_matplotlib():
        return ""
    out: list[str] = []
    with _axes((3.6, 1.4) if small else (7.2, 2.1), out) as axes:
        width = 0.8 / max(1, len(series))
        for number, (name, values) in enumerate(series.items()):
            places = [index + (number - (len(series) - 1) / 2) * width for index in range(len(names))]
            axes.bar(places, _numbers(values), width * 0.9, label=name, color=COLOURS[number % len(COLOURS)])
        step = max(1, math.ceil(len(names) / (12 if small else 24)))
        axes.set_xticks(range(0, len(names), step), names[::step])
        axes.set_ylim(0, high)
    return out[0]


def line_chart(series: Mapping[str, Sequence[tuple[float, float | None]]]) -> str:
    """Draw a line for each series of (step, value); a line is broken where a value is None."""
    if not has_matplotlib():
        return ""
    out: list[str] = []
    with _axes((4.8, 2.0), out) as axes:
        for number, (name, points) in enumerate(series.items()):
            steps, values = [step for step, _ in points], _numbers([value for _, value in points])
            # a value between two gaps has no line, only its marker
            look = {
                "color": COLOURS[number % 3],
                "linestyle": STYLES[number % 3],
                "marker": "." if len(steps) < 100 else "",
            }
            axes.plot(steps, values, label=name, linewidth=1.5, **look)
    return out[0]
