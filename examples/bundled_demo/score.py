"""Score models on the held-out questions: greedy answers, intervals and paired differences.

An answer is correct when the generated text, up to the end of turn, is one of the accepted answers. Questions are encoded
once and shared by all methods, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_plugin.report.summary import interval, paired_difference

__all__ = [
    "Encoded",
    "answer_margins",
    "encode_questions",
    "greedy_answers",
    "interval",
    "is_right",
    "paired_difference",
]

LONGEST_ANSWER = 6
"""Maximum number of generated tokens: four words of a listed row, the end of turn, and one more."""


@dataclass(frozen=True)
class Encoded:
    """A batch of questions: left-padded prompts, and the indices of its samples in the held-out set."""

    inputs: dict[str, Tensor]
    indices: tuple[int, ...]


def encode_questions(processor: Any, samples: Sequence[dict[str, Any]], batch_size: int = 250) -> list[Encoded]:
    """Encode the prompts of all samples, sorted by question type, so that batches of short answers end early."""
    order = sorted(range(len(samples)), key=lambda i: samples[i]["type"])
    batches = []
    for start in range(0, len(order), batch_size):
        picked = tuple(order[start : start + batch_size])
        prompts = [
            processor.apply_chat_template(samples[i]["messages"][:-1], add_generation_prompt=True, tokenize=False)
            for i in picked
        ]
        images = [samples[i]["images"][0] for i in picked]
        encoded = processor(
            text=prompts,
            images=images,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,
        )
        batches.append(Encoded({k: v for k, v in encoded.items() if isinstance(v, Tensor)}, picked))
    return batches


@torch.no_grad()
def greedy_answers(
    model: Any,
    processor: Any,
    batches: Sequence[Encoded],
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Return the generated answer of every sample, in the order of the held-out set; `on_batch(done, total)` follows each
    batch.
    """
    model.eval()
    answers = [""] * sum(len(batch.indices) for batch in batches)
    for number, batch in enumerate(batches, start=1):
        inputs = _in_dtype_of(model, batch.inputs)
        out = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        texts = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch.indices, texts, strict=True):
            answers[index] = text.strip()
        on_batch(number, len(batches))
    return answers


@torch.no_grad()
def answer_margins(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    """Return for each sample the smallest gap in nats between best and second token over its greedy answer."""
    model.eval()
    out = model.generate(
        **_in_dtype_of(model, inputs),
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    gaps = []
    for scores in out.scores:
        best = torch.log_softmax(scores.float(), dim=-1).topk(2, dim=-1).values
        gaps.append(best[:, 0] - best[:, 1])
    return torch.stack(gaps).min(dim=0).values.tolist()


def _in_dtype_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with pixels in the dtype of the model's parameters."""
    dtype = next(model.parameters()).dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def is_right(sample: dict[str, Any], answer: str) -> bool:
    """Return whether an answer is one of the sample's accepted answers."""
    return answer in sample["accept"]
