"""Numbers to the geometry of inline SVG: bars and lines, in user units; the template draws what it is given.

Charts hold no colour: classes s0, s1, ... take theirs from the page's style, once for light and once for dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["bars", "label", "lines", "ticks"]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = (low - 0.5, low + 0.5) if low else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1.0, 2.0, 5.0, 10.0) if power * nice >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def label(value: float | None) -> str:
    """A number as a person reads it: 3 digits, no exponent where none is needed."""
    if value is None:
        return "-"
    if value and (abs(value) < 1e-4 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _axis(low: float, high: float, top: float, bottom: float) -> tuple[list[dict[str, Any]], Any]:
    """Tick marks of a vertical axis, and the function from value to height on the page."""
    marks = ticks(low, high)
    span = marks[-1] - marks[0]

    def place(value: float) -> float:
        return round(bottom - (value - marks[0]) / span * (bottom - top), 2)

    return [{"y": place(mark), "text": label(mark)} for mark in marks], place


def bars(
    title: str, names: Sequence[str], series: Mapping[str, Sequence[float | None]], *, width: int = 720, height: int = 200,
    high: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A bar for each name and series, side by side; None leaves a gap.

    Args:
        high: top of the axis, to give several charts the same.
    """
    left, right, top, bottom = 52, 8, 10, height - 24
    known = [value for values in series.values() for value in values if value is not None]
    marks, place = _axis(0.0, high if high is not None else max(known, default=1.0), top, bottom)
    slot = (width - left - right) / max(1, len(names))
    thick = slot * 0.8 / max(1, len(series))
    every = max(1, math.ceil(len(names) * 24 / (width - left - right)))
    drawn = [
        {
            "x": round(left + n * slot + slot * 0.1 + s * thick, 2), "y": place(value), "width": round(max(thick - 1, 1), 2),
            "height": round(bottom - place(value), 2), "class": f"s{s}", "tip": f"{names[n]}, {name}: {label(value)}",
        }
        for s, (name, values) in enumerate(series.items())
        for n, value in enumerate(values)
        if value is not None
    ]  # fmt: skip
    words = [
        {"x": round(left + (n + 0.5) * slot, 2), "text": name} for n, name in enumerate(names) if n % every == 0
    ]  # fmt: skip
    return {
        "title": title, "width": width, "height": height, "left": left, "right": width - right, "bottom": bottom,
        "marks": marks, "bars": drawn, "words": words, "series": list(series),
    }  # fmt: skip


def lines(
    title: str, series: Mapping[str, Sequence[tuple[float, float | None]]], *, width: int = 720, height: int = 220
) -> dict[str, Any]:
    """A line for each series of (step, value); a line is broken where a value is None."""
    left, right, top, bottom = 60, 12, 10, height - 24
    steps = [step for points in series.values() for step, _ in points]
    known = [value for points in series.values() for _, value in points if value is not None]
    marks, place = _axis(min(known, default=0.0), max(known, default=1.0), top, bottom)
    first, last = min(steps, default=0), max(steps, default=1)
    span = (last - first) or 1

    def across(step: float) -> float:
        return round(left + (step - first) / span * (width - left - right), 2)

    drawn = []
    for number, (name, points) in enumerate(series.items()):
        path, pen = [], False
        for step, value in points:
            if value is not None:
                path.append(f"{'L' if pen else 'M'}{across(step)} {place(value)}")
            pen = value is not None
        dots = [
            {"x": across(s), "y": place(v), "tip": f"{name} at {s:g}: {label(v)}"} for s, v in points if v is not None
        ]
        drawn.append(
            {"path": " ".join(path), "class": f"s{number}", "name": name, "dots": dots if len(dots) < 200 else []}
        )
    words = [{"x": across(t), "text": f"{t:g}"} for t in ticks(first, last, 6) if first <= t <= last]
    return {
        "title": title, "width": width, "height": height, "left": left, "right": width - right, "bottom": bottom,
        "marks": marks, "lines": drawn, "words": words, "series": list(series),
    }  # fmt: skip
