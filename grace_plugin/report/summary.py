"""From records of samples to the report: by modality, by question type and over all, with 95 % intervals."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grace_plugin.report.samples import SampleComparison

Z95 = 1.959964
MANY = 60
"""Number of different beginnings of ids above which ids do not say a sample's type."""


def interval(correct: int, questions: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of an accuracy."""
    share, n = correct / questions, questions
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    return centre - half, centre + half


def paired_difference(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of ours - other over the same samples, with its normal 95 % interval."""
    # paired: the samples' own difficulty is in both models and cancels
    differences = torch.tensor([float(a) - float(b) for a, b in zip(ours, other, strict=True)], dtype=torch.float64)
    mean = float(differences.mean())
    half = Z95 * float(differences.std(unbiased=True)) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def type_of(sample: Mapping[str, Any], set_name: str | None = None) -> tuple[str, str]:
    """Return (where it is said, the type): `type`, else `source`, else the name of its set, else the beginning of its id."""
    for key in ("type", "source"):
        if isinstance(sample.get(key), str) and sample[key].strip():
            return key, sample[key].strip()
    if set_name is not None:
        return "set", set_name
    beginning = re.sub(r"[\d\W_]+$", "", str(sample.get("id") or ""))
    return ("id", beginning) if beginning else ("", "")


def set_types(records: Sequence[SampleComparison], types: Mapping[int, tuple[str, str]]) -> None:
    """Set the group of each record to its type."""
    # an id such as a file name begins differently in each sample, which is no type
    beginnings = {said for where, said in types.values() if where == "id"}
    for record in records:
        where, said = types[record.number]
        record.group = "" if where == "id" and len(beginnings) > MANY else said


def _paired(ours: Sequence[float], other: Sequence[float]) -> list[float] | None:
    return list(paired_difference(ours, other)) if len(ours) > 1 else None


def _accuracy(records: Sequence[SampleComparison]) -> dict[str, Any]:
    asked = [one for one in records if one.right]
    if not asked:
        return {}
    found: dict[str, Any] = {"questions": len(asked)}
    for place, side in enumerate("ab"):
        right = sum(one.right[place] for one in asked)
        found |= {f"accuracy_{side}": right / len(asked), f"interval_{side}": list(interval(right, len(asked)))}
    found["difference"] = _paired([one.right[1] for one in asked], [one.right[0] for one in asked])
    found["lost"] = sum(one.right == [True, False] for one in asked)
    found["gained"] = sum(one.right == [False, True] for one in asked)
    return found


def overall(records: Sequence[SampleComparison]) -> dict[str, Any]:
    """Return means per supervised token (KL and negative log-likelihoods in nats), and accuracy of the answers."""
    tokens = sum(one.tokens for one in records)
    if not tokens:
        return {"samples": 0, "tokens": 0}
    sums: dict[str, list[float]] = {
        "kl": [one.kl for one in records],
        "agreement": [one.agree for one in records],
        "token_accuracy_a": [one.right_a for one in records],
        "token_accuracy_b": [one.right_b for one in records],
        "nll_a": [one.nll_a for one in records],
        "nll_b": [one.nll_b for one in records],
    }
    means = {name: sum(values) / tokens for name, values in sums.items()}
    return {"samples": len(records), "tokens": tokens, **means, **_accuracy(records)}


def by_modality(records: Sequence[SampleComparison]) -> dict[str, Any]:
    """Compare samples with images, the same samples without them, and samples that have none.

    `difference`: mean over samples of (KL per token with the images - without), with its 95 % interval.
    """
    with_images = [one for one in records if one.has_images]
    both = [one for one in with_images if one.kl_text_only is not None]
    tokens = sum(one.tokens for one in both)
    found: dict[str, Any] = {
        "image": overall(with_images),
        "text": overall([one for one in records if not one.has_images]),
        "compared_samples": len(both),
    }
    if both:
        text_only = [float(one.kl_text_only or 0.0) for one in both]
        means = [kl / one.tokens for kl, one in zip(text_only, both, strict=True)]
        found["kl_image_conditioned"] = sum(one.kl for one in both) / tokens
        found["kl_text_only"] = sum(text_only) / tokens
        found["difference"] = _paired([one.mean for one in both], means)
    return found


def by_type(records: Sequence[SampleComparison]) -> list[dict[str, Any]]:
    """Return one entry per type, largest KL first."""
    groups: dict[str, list[SampleComparison]] = defaultdict(list)
    for one in records:
        groups[one.group].append(one)
    found = [{"type": name, **overall(own)} for name, own in groups.items()]
    return sorted(found, key=lambda one: (-one.get("kl", 0.0), one["type"]))
