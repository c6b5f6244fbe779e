"""Means over seeds, and paired bootstrap intervals over questions and seeds together.

Two methods are compared on the same seeds and questions: d[seed, question] is 1, 0 or -1. A replicate draws questions and seeds
with replacement, both; the interval is the middle 95 % of the replicates' means. Photographs of scenes are shared by questions,
which the interval does not know of. Where records have a `cluster`, so many questions after one another are about one picture,
and pictures are drawn, with all their questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.accuracy.rows import answers_of

__all__ = ["Compared", "Group", "collect", "compare"]

REPLICATES, SEED = 2000, 7


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
    def cluster(self) -> int:
        """Questions after one another that are about one picture; 1 where each has its own."""
        return self.records[0].get("cluster", 1) if self.records else 1

    @property
    def held_out(self) -> float | None:
        """Percent of right choices on held-out pictures, mean over seeds; None where it was not recorded."""
        found = [record["held_out"]["accuracy"] for record in self.records if "held_out" in record]
        return 100 * float(np.mean(found)) if found else None

    def by_type(self) -> dict[str, float]:
        """Percent by question type."""
        return {t: 100 * float(np.mean([r["by_type"][t] for r in self.records])) for t in self.records[0]["by_type"]}


@dataclass(frozen=True)
class Compared:
    """Points, ours minus the other, with the 95 % interval, over `seeds` seeds."""

    points: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.points:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def decided(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


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


@lru_cache
def _draws(questions: int) -> np.ndarray:
    """How often each question is drawn in each replicate, float32 [replicates, questions]."""
    rng = np.random.default_rng(SEED)
    counts = (np.bincount(rng.integers(0, questions, questions), minlength=questions) for _ in range(REPLICATES))
    return np.stack(list(counts)).astype(np.float32)


def compare(ours: Group, other: Group) -> Compared:
    """Ours minus the other on the seeds both have; a model without seeds of its own (the teacher) stands for every seed.

    Raises:
        ValueError: no seed in common.
    """
    shared = ours.seeds if other.method == "teacher" else tuple(seed for seed in ours.seeds if seed in other.seeds)
    if not shared:
        raise ValueError(f"{ours.setting}/{ours.method} and {other.setting}/{other.method} have no seed in common")
    mine = ours.right[[ours.seeds.index(seed) for seed in shared]].astype(np.float32)
    theirs = other.right if other.method == "teacher" else other.right[[other.seeds.index(seed) for seed in shared]]
    difference = mine - theirs.astype(np.float32)
    difference = difference.reshape(len(shared), -1, ours.cluster).mean(-1)
    drawn_from = difference.shape[1]
    by_seed = _draws(drawn_from) @ difference.T / drawn_from  # [replicates, seeds]
    rng = np.random.default_rng(SEED + 1)
    drawn = rng.integers(0, len(shared), (REPLICATES, len(shared)))
    means = np.take_along_axis(by_seed, drawn, 1).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Compared(100 * float(difference.mean()), 100 * float(low), 100 * float(high), len(shared))
