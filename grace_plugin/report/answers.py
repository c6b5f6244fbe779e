"""Greedy answers of both models to samples that say which answers they accept (`accept`, a list of strings).

The prompt is the sample up to its last answer. An answer is right when it equals an accepted one, white space around it aside.
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

MOST = 64
"""Largest number of generated tokens, where accepted answers are longer."""


def accepted(sample: Mapping[str, Any]) -> list[str]:
    """Return the answers that a sample accepts, stripped; empty when it does not say."""
    given = sample.get("accept")
    given = [given] if isinstance(given, str) else given
    return [one.strip() for one in given or [] if isinstance(one, str)]


def answer_start(labels: Tensor) -> int:
    """Return the position in labels [S] at which the last run of supervised tokens begins."""
    supervised = labels != IGNORE_INDEX
    begins = supervised & ~torch.nn.functional.pad(supervised, (1, 0))[:-1]
    return int(begins.nonzero()[-1])


def _batches(starts: Mapping[int, int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    # Prompts of equal length only, so that nothing is padded: on which side to pad for generation depends on the family.
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, start in sorted(starts.items()):
        by_length[start].append(number)
    for start, numbers in sorted(by_length.items()):
        for first in range(0, len(numbers), batch_size):
            yield start, numbers[first : first + batch_size]


@torch.no_grad()
def answers(
    models: Sequence[Any],
    collator: ConversationCollator,
    samples: Sequence[Mapping[str, Any]],
    starts: Mapping[int, int],
    batch_size: int,
) -> dict[int, list[str]]:
    """Generate the answer of each model, by the sample's number.

    Args:
        starts: number -> tokens of the prompt, for the samples to ask.
    """
    tokenizer = collator.processor.tokenizer
    found: dict[int, list[str]] = {}
    for start, numbers in _batches(starts, batch_size):
        batch = collator([samples[number] for number in numbers])
        whole = batch["input_ids"].shape
        wanted = [text for number in numbers for text in accepted(samples[number])]
        longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wanted)
        texts = []
        for model in models:
            inputs = {
                # tensors of shape [B, S] are cut to the prompt; pixels and the sizes of images have other shapes
                key: (value[:, :start] if value.shape[:2] == whole else value).to(model.device)
                for key, value in model_inputs(batch).items()
            }
            out = model.generate(**inputs, max_new_tokens=min(longest + 2, MOST), do_sample=False)
            texts.append(tokenizer.batch_decode(out[:, start:], skip_special_tokens=True))
        found |= {number: [one.strip() for one in said] for number, *said in zip(numbers, *texts, strict=True)}
    return found
