"""The rows that B damages most, as they are shown: conversation, pictures, and each learned token with its KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grace_plugin.data import read_sample
from grace_plugin.data.page import sample_images
from grace_plugin.report.answers import accepted
from grace_plugin.report.measure import Measure

__all__ = ["examples"]


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "role": turn["role"],
            "text": " ".join(
                part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in turn["content"]
            ),
        }
        for turn in messages
    ]


def examples(measure: Measure, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The worst rows, largest KL per supervised token first.

    Args:
        numbers: each row's number in the dataset.
    """
    tokenizer, found = measure.collator.processor.tokenizer, []
    for number, tokens in measure.worst_rows():
        record = measure.records[number]
        row = read_sample(rows[number], numbers[number], max_pixels=measure.collator.max_pixels)
        found.append({
            "number": numbers[number], "name": row.name, "type": record.group, "kl": record.mean,
            "kl_text_only": None if record.kl_blind is None else record.kl_blind / record.tokens,
            "turns": _turns(row.messages), "accept": accepted(rows[number]),
            "answers": dict(zip(("a", "b"), record.answers, strict=False)),
            "right": dict(zip(("a", "b"), record.right, strict=False)),
            "tokens": [
                {"text": tokenizer.decode([label]), "kl": kl, "a": tokenizer.decode([a]), "b": tokenizer.decode([b])}
                for label, kl, a, b in zip(*(tokens[key] for key in ("label", "kl", "top_a", "top_b")), strict=True)
            ],
            "pictures": sample_images(row),
        })  # fmt: skip
    return found
