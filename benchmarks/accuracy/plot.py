"""Draw the main table as SVG: mean accuracy of each method with a dot for each seed, by setting."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.accuracy.statistics import Group

__all__ = ["chart"]

WIDTH, LEFT, LINE = 820, 260, 20


def chart(
    groups: dict[tuple[str, str], Group], name: Callable[[str, str], str], shown: dict[str, str], order: tuple[str, ...]
) -> str:
    """SVG text. groups by setting and method; the accuracies of teacher and student are vertical lines."""
    lanes: list[tuple[str, Group | None]] = []
    for setting, told in shown.items():
        found = [groups[setting, method] for method in order if (setting, method) in groups]
        if len(found) > 1:
            lanes += [(told, None), *((name(setting, group.method), group) for group in found)]
    pair = {m: groups["pair", m].mean for m in ("student", "teacher") if ("pair", m) in groups}
    values = [100 * float(share) for _, group in lanes if group is not None for share in group.right.mean(1)]
    values += list(pair.values())
    if not lanes or not values:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>\n'
    low, high = min(values) - 1, max(values) + 1
    height = LINE * (len(lanes) + 3)

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 60)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">'
    ]
    out.append('<rect width="100%" height="100%" fill="white"/>')
    for method, value in pair.items():
        out.append(f'<line x1="{at(value):.1f}" x2="{at(value):.1f}" y1="{LINE}" y2="{height - LINE}" stroke="#bbb"/>')
        out.append(f'<text x="{at(value):.1f}" y="14" text-anchor="middle" fill="#555">{method} {value:.1f} %</text>')
    for number, (label, group) in enumerate(lanes):
        y = LINE * (number + 2)
        if group is None:
            out.append(f'<text x="4" y="{y + 4}" font-weight="bold">{label}</text>')
            continue
        colour = "#1f6fb2" if group.method == "grace" else "#777"
        out.append(f'<text x="16" y="{y + 4}">{label}</text>')
        for share in group.right.mean(1):
            out.append(f'<circle cx="{at(100 * float(share)):.1f}" cy="{y}" r="2.5" fill="{colour}" opacity="0.5"/>')
        x = at(group.mean)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 6}" stroke="{colour}" stroke-width="3"/>')
        out.append(f'<text x="{WIDTH - 4}" y="{y + 4}" text-anchor="end">{group.mean:.2f}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
