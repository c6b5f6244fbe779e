"""Records of rows to findings: by modality, by question type, over all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from grace_plugin.report.intervals import interval, paired_difference
from grace_plugin.report.measure import RowDamage

__all__ = ["by_modality", "by_type", "overall", "type_of"]

MANY = 60
"""Beginnings of ids beyond which ids say nothing of a row's type."""


def type_of(row: Mapping[str, Any], set_name: str | None = None) -> tuple[str, str]:
    """(where it stands, what it says) of a row's type: `type`, else `source`, else its set's name, else its id's beginning."""
    for key in ("type", "source"):
        if isinstance(row.get(key), str) and row[key].strip():
            return key, row[key].strip()
    if set_name is not None:
        return "set", set_name
    beginning = re.sub(r"[\d\W_]+$", "", str(row.get("id") or ""))
    return ("id", beginning) if beginning else ("", "")


def set_types(records: Sequence[RowDamage], types: Mapping[int, tuple[str, str]]) -> None:
    """Give each record its group; beginnings of ids count only where they are few."""
    beginnings = {said for where, said in types.values() if where == "id"}
    for record in records:
        where, said = types[record.number]
        record.group = "" if where == "id" and len(beginnings) > MANY else said


def _paired(ours: Sequence[float], other: Sequence[float]) -> list[float] | None:
    return list(paired_difference(ours, other)) if len(ours) > 1 else None


def _accuracy(records: Sequence[RowDamage]) -> dict[str, Any]:
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


def _of(records: Sequence[RowDamage]) -> dict[str, Any]:
    """KL in nats, agreement and right next tokens per supervised token; accuracy over rows that say what they accept."""
    tokens = sum(one.tokens for one in records)
    if not tokens:
        return {"rows": 0, "tokens": 0}
    return {
        "rows": len(records), "tokens": tokens, "kl": sum(one.kl for one in records) / tokens,
        "agreement": sum(one.agree for one in records) / tokens,
        "token_accuracy_a": sum(one.right_a for one in records) / tokens,
        "token_accuracy_b": sum(one.right_b for one in records) / tokens,
        "nll_a": sum(one.nll_a for one in records) / tokens, "nll_b": sum(one.nll_b for one in records) / tokens,
        **_accuracy(records),
    }  # fmt: skip


def overall(records: Sequence[RowDamage]) -> dict[str, Any]:
    """All rows."""
    return _of(records)


def by_modality(records: Sequence[RowDamage]) -> dict[str, Any]:
    """Rows with pictures, the same rows without them, and rows that have none.

    `difference`: mean over rows of (KL per token with the pictures - without), with its 95 % interval.
    """
    pictured = [one for one in records if one.pictures]
    both = [one for one in pictured if one.kl_blind is not None]
    tokens = sum(one.tokens for one in both)
    found: dict[str, Any] = {
        "image": _of(pictured), "text": _of([one for one in records if not one.pictures]), "compared_rows": len(both),
    }  # fmt: skip
    if both:
        blind = [float(one.kl_blind or 0.0) for one in both]
        found |= {
            "kl_image_conditioned": sum(one.kl for one in both) / tokens, "kl_text_only": sum(blind) / tokens,
            "difference": _paired([one.mean for one in both], [k / one.tokens for k, one in zip(blind, both, strict=True)]),
        }  # fmt: skip
    return found


def by_type(records: Sequence[RowDamage]) -> list[dict[str, Any]]:
    """One finding a type, the largest KL first."""
    groups: dict[str, list[RowDamage]] = defaultdict(list)
    for one in records:
        groups[one.group].append(one)
    found = [{"type": name, **_of(own)} for name, own in groups.items()]
    return sorted(found, key=lambda one: (-one.get("kl", 0.0), one["type"]))
