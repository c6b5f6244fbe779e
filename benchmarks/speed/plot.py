"""The speed results as one image: `python -m benchmarks.speed.plot` lays h200.json out as speed.svg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["chart"]

RESULTS = Path(__file__).parents[1] / "results" / "speed"
WIDTH, LEFT, LINE = 900, 420, 22
Bar = tuple[str, float, float]  # what, milliseconds, milliseconds of its baseline


def _bars(found: dict[str, Any]) -> list[tuple[str, list[Bar]]]:
    """Return titles and bars of every part that was measured."""
    groups: list[tuple[str, list[Bar]]] = []
    if "head" in found:
        title = found["head"]["title"]
        baseline = title["products_ms"]
        rows = [
            ("ours", "ours_ms"),
            ("ours, float32 sum", "ours_float32_sum_ms"),
            ("torch", "torch_ms"),
            ("Liger-Kernel's fused linear JSD: no CE, no gate", "liger_ms"),
        ]
        groups.append(
            ("heads and losses; baseline: the four products", [(n, title[k], baseline) for n, k in rows if title[k]])
        )
        scaled = [(" ".join(f"{k} {v}" for k, v in row["sizes"].items()), row) for row in found["head"]["scaling"]]
        groups.append(("the same at other sizes", [(n, r["ours_ms"], r["products_ms"]) for n, r in scaled]))
    if "linear" in found:
        of = [("x".join(map(str, r["shape"])) + " " + r["weight"].removeprefix("torch."), r) for r in found["linear"]]
        bars = [(n, r["ours"]["of_16_ms"], r["plain"]["of_16_ms"]) for n, r in of]
        groups.append(("linear, one of 16 micro-batches; baseline: the plain layer", bars))
    if "step" in found:
        for name, baseline in (("resident", "plain step and teacher"), ("cached", "plain step")):
            step = found["step"][name]
            groups.append(
                (f"step, {name} teacher; baseline: {baseline}", [("GRACE", step["ms"], step["ms"] / step["ratio"])])
            )
    return groups


def chart(found: dict[str, Any]) -> str:
    """SVG text: a bar for each time, the share of its baseline in a darker colour, the ratio next to it."""
    lines: list[str] = []
    y = LINE
    for title, bars in _bars(found):
        lines.append(f'<text x="10" y="{y}" font-weight="bold">{title}</text>')
        longest = max(ms for _, ms, _ in bars)
        for name, ms, baseline in bars:
            y += LINE
            scale = (WIDTH - LEFT - 170) / longest
            lines.append(f'<text x="20" y="{y}">{name}</text>')
            for value, colour in ((ms, "#9ecae1"), (min(baseline, ms), "#3182bd")):
                lines.append(f'<rect x="{LEFT}" y="{y - 13}" width="{value * scale:.1f}" height="16" fill="{colour}"/>')
            at = LEFT + ms * scale + 6
            lines.append(f'<text x="{at:.1f}" y="{y}">{ms:.2f} ms, {ms / baseline:.2f} of baseline</text>')
        y += 2 * LINE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>\n"])


def main() -> None:
    """Draw the run that has all parts."""
    (RESULTS / "speed.svg").write_text(chart(json.loads((RESULTS / "h200.json").read_text())))


if __name__ == "__main__":
    main()
