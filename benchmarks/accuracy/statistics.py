"""Means over seeds, and t-intervals over seeds of paired differences.

Two methods are compared on the seeds that both have, on the same questions. d[seed] is the difference of their accuracies; the
interval is mean(d) ± t * sd(d) / sqrt(n), with the 97.5 % quantile of Student's t at n - 1 degrees of freedom, over n seeds. A
bootstrap over two to five seeds gives intervals that are too narrow.

What the interval holds: that another seed (student, order of the samples, draws) gives another difference. What it does not
hold: that other questions, other images or another teacher would. With two seeds it can be narrow by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.accuracy.rows import answers_of

__all__ = ["Compared", "Group", "collect", "compare", "t_half_width"]

#: 97.5 % quantile of Student's t, at 1, 2, 3 ... degrees of freedom: as published, five decimals
T975 = (
    12.70620,
    4.30265,
    3.18245,
    2.77645,
    2.57058,
    2.44691,
    2.36462,
    2.30600,
    2.26216,
    2.22814,
    2.20099,
    2.17881,
    2.16037,
    2.14479,
    2.13145,
    2.11991,
    2.10982,
    2.10092,
    2.09302,
    2.08596,
)


@dataclass(frozen=True)
class Group:
    """The records of one setting and method; right is bool [seeds, questions] in the order of `seeds`."""

    setting: str
    method: str
    seeds: tuple[int, ...]
    right: np.ndarray
    records: tuple[dict[str, Any], ...]

    @property
    def mean(self) -> float:
        """Accuracy, percent."""
        return 100 * float(self.right.mean())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds, points; None for one seed."""
        return 100 * float(self.right.mean(1).std(ddof=1)) if len(self.seeds) > 1 else None

    @property
    def held_out(self) -> float | None:
        """Percent of right choices on held-out images, mean over seeds; None where it was not recorded."""
        found = [record["held_out"]["accuracy"] for record in self.records if "held_out" in record]
        return 100 * float(np.mean(found)) if found else None

    def by_type(self) -> dict[str, float]:
        """Percent by question type."""
        return {t: 100 * float(np.mean([r["by_type"][t] for r in self.records])) for t in self.records[0]["by_type"]}


@dataclass(frozen=True)
class Compared:
    """Points, ours minus the other, with the 95 % t-interval over `seeds` seeds; low and high are None for one seed."""

    points: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.points:+.2f} (one seed)"
        return f"{self.points:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def decided(self) -> bool:
        """Whether there is an interval that leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def collect(records: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Group]:
    """Groups of the records scored on the test, by setting and method; failures and the search are left out."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if "failed" not in record and record["part"] == "test":
            found.setdefault((record["setting"], record["method"]), []).append(record)
    groups = {}
    for (setting, method), several in found.items():
        several.sort(key=lambda record: record["seed"])
        right = np.stack([answers_of(record) for record in several])
        groups[setting, method] = Group(setting, method, tuple(r["seed"] for r in several), right, tuple(several))
    return groups


def t_half_width(values: Sequence[float] | np.ndarray) -> float:
    """Return half the width of the 95 % t-interval of a mean of values [n].

    Raises:
        ValueError: fewer than two values, or more than `T975` knows of.
    """
    count = len(values)
    if not 2 <= count <= len(T975) + 1:
        raise ValueError(f"a t-interval needs 2 to {len(T975) + 1} values, got {count}")
    return T975[count - 2] * float(np.std(values, ddof=1)) / math.sqrt(count)


def compare(ours: Group, other: Group) -> Compared:
    """Return ours minus the other on the seeds that both have; a model without seeds (the teacher) counts for every seed.

    Raises:
        ValueError: no seed in common.
    """
    shared = ours.seeds if other.method == "teacher" else tuple(seed for seed in ours.seeds if seed in other.seeds)
    if not shared:
        raise ValueError(f"{ours.setting}/{ours.method} and {other.setting}/{other.method} have no seed in common")
    mine = ours.right[[ours.seeds.index(seed) for seed in shared]].mean(1)
    theirs = other.right if other.method == "teacher" else other.right[[other.seeds.index(seed) for seed in shared]]
    by_seed = 100 * (mine - theirs.mean(1))
    points = float(by_seed.mean())
    if len(shared) == 1:
        return Compared(points, None, None, 1)
    half = t_half_width(by_seed)
    return Compared(points, points - half, points + half, len(shared))
