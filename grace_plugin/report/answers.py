"""Greedy answers of both models to rows that say which answers they accept (`accept`, a list of strings).

The prompt is the row up to its last answer. Rows whose prompts have the same number of tokens are asked together, so that
nothing is padded and every family's generation reads what training read. An answer counts when, without white space around it,
it is one of the accepted ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data import ConversationCollator
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.teacher.base import model_inputs

__all__ = ["accepted", "answer_start", "answers"]

MOST = 64
"""Tokens generated at most, where accepted answers are longer."""


def accepted(row: Mapping[str, Any]) -> list[str]:
    """The answers a row accepts, without white space around them; empty when it does not say."""
    given = row.get("accept")
    given = [given] if isinstance(given, str) else given
    return [one.strip() for one in given or [] if isinstance(one, str)]


def answer_start(labels: Tensor) -> int:
    """Where the last run of learned tokens begins in labels [S]."""
    learned = labels != IGNORE_INDEX
    begins = learned & ~torch.nn.functional.pad(learned, (1, 0))[:-1]
    return int(begins.nonzero()[-1])


def _batches(starts: Mapping[int, int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, start in sorted(starts.items()):
        by_length[start].append(number)
    for start, numbers in sorted(by_length.items()):
        for first in range(0, len(numbers), batch_size):
            yield start, numbers[first : first + batch_size]


@torch.no_grad()
def answers(
    models: Sequence[Any], collator: ConversationCollator, rows: Sequence[Mapping[str, Any]], starts: Mapping[int, int],
    batch_size: int,
) -> dict[int, list[str]]:  # fmt: skip
    """Answers of each model, by row number.

    Args:
        starts: row number -> tokens of its prompt, for the rows to ask.
    """
    tokenizer = collator.processor.tokenizer
    found: dict[int, list[str]] = {}
    for start, numbers in _batches(starts, batch_size):
        batch = collator([rows[number] for number in numbers])
        whole = batch["input_ids"].shape
        longest = max(
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) for n in numbers for text in accepted(rows[n])
        )
        texts = []
        for model in models:
            inputs = {
                key: (value[:, :start] if value.shape[:2] == whole else value).to(model.device)
                for key, value in model_inputs(batch).items()
            }
            out = model.generate(**inputs, max_new_tokens=min(longest + 2, MOST), do_sample=False)
            texts.append(tokenizer.batch_decode(out[:, start:], skip_special_tokens=True))
        found |= {number: [one.strip() for one in said] for number, *said in zip(numbers, *texts, strict=True)}
    return found
