"""Intervals of shares and of paired differences, 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["Z95", "interval", "paired_difference"]

Z95 = 1.959964


def interval(correct: int, questions: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy."""
    share, n = correct / questions, questions
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    return centre - half, centre + half


def paired_difference(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ours - other over the same rows, with its 95 % interval (normal, from the paired differences)."""
    differences = torch.tensor([float(a) - float(b) for a, b in zip(ours, other, strict=True)], dtype=torch.float64)
    mean = float(differences.mean())
    half = Z95 * float(differences.std(unbiased=True)) / math.sqrt(len(differences))
    return mean, mean - half, mean + half
