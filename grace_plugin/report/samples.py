"""Both models on the samples, batch by batch: sums by layer, one record per sample, and tokens of the worst samples only."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data import ConversationCollator, read_sample
from grace_plugin.data.page import sample_images
from grace_plugin.report.answers import accepted, answer_start
from grace_plugin.report.divergence import TokenComparison, compare_tokens, head_of
from grace_plugin.report.layer_errors import LayerErrors
from grace_plugin.teacher.base import model_inputs, supervised_positions
from grace_plugin.vlm import Family, capture


@dataclass
class SampleComparison:
    """Sums over the supervised tokens of one sample.

    kl, kl_text_only: nats, with its images and without. right_a, right_b: next tokens that are the label. start: tokens
    before the last answer. answers, right: of A and B, where the sample says which answers it accepts.
    """

    number: int
    tokens: int
    has_images: bool
    kl: float
    agree: int
    right_a: int
    right_b: int
    nll_a: float
    nll_b: float
    start: int
    kl_text_only: float | None = None
    group: str = ""
    answers: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """KL per supervised token."""
        return self.kl / self.tokens


class PairRunner:
    """Runs B and A on batches of samples.

    Args:
        models: A and B, on one device.
        names: B's quantized linears.
        worst: number of samples whose tokens are kept.
    """

    def __init__(
        self,
        models: tuple[Any, Any],
        family: Family,
        vocabulary: int,
        names: list[str],
        collator: ConversationCollator,
        worst: int,
    ) -> None:
        self.models, self.family, self.collator, self.worst = models, family, collator, worst
        self.decoders = (family.text_model(models[0]), family.text_model(models[1]))
        self.heads = tuple(head_of(model, vocabulary) for model in models)
        self.layers = LayerErrors(*models, self.decoders, names)
        self.records: dict[int, SampleComparison] = {}
        self._heap: list[tuple[float, int, dict[str, list[Any]]]] = []

    @torch.no_grad()
    def _forward(self, batch: Mapping[str, Any], *, measure_layers: bool) -> tuple[TokenComparison, Tensor, Tensor]:
        """Run both models; returns its supervised tokens compared, the sample of each in the batch, and their labels."""
        device = self.models[0].device
        positions = supervised_positions(batch["labels"])
        targets = batch["labels"].flatten()[positions + 1]
        inputs = {key: value.to(device) for key, value in model_inputs(batch).items()}
        if measure_layers:
            visual = self.family.visual_tokens(self.models[0].config, batch).index
            self.layers.set_masks(inputs["attention_mask"], visual.to(device))
        states = []
        for side, hooks in (
            (1, self.layers.running_b),
            (0, self.layers.running_a),
        ):  # A's hooks compare with B's outputs
            # one position of logits, which nobody reads: the heads are applied to supervised positions only
            with capture(self.decoders[side]) as caught, hooks() if measure_layers else nullcontext():
                self.models[side](**inputs, use_cache=False, logits_to_keep=1)
            assert caught.final is not None
            states.append(caught.final.flatten(0, 1).index_select(0, positions.to(device)))
        found = compare_tokens(states[1], self.heads[0], states[0], self.heads[1], targets.to(device))
        return found, positions // batch["labels"].shape[1], targets

    def run(self, numbers: Sequence[int], samples: Sequence[Mapping[str, Any]], with_images: set[int]) -> None:
        """Compare the models on whole samples; `with_images` are the numbers of those that have any."""
        batch = self.collator(samples)
        tokens, owner, targets = self._forward(batch, measure_layers=True)
        for place, number in enumerate(numbers):
            own, label = TokenComparison(*(part[owner == place] for part in tokens)), targets[owner == place]
            record = self.records[number] = SampleComparison(
                number,
                tokens=len(label),
                has_images=number in with_images,
                kl=float(own.kl.sum()),
                agree=int((own.top_a == own.top_b).sum()),
                right_a=int((own.top_a == label).sum()),
                right_b=int((own.top_b == label).sum()),
                nll_a=float(own.nll_a.sum()),
                nll_b=float(own.nll_b.sum()),
                start=answer_start(batch["labels"][place]),
            )
            parts = {"kl": own.kl, "label": label, "top_a": own.top_a, "top_b": own.top_b}
            # the number breaks ties, so that equal runs keep the same samples
            heapq.heappush(self._heap, (record.mean, -number, {key: part.tolist() for key, part in parts.items()}))
            if len(self._heap) > self.worst:
                heapq.heappop(self._heap)

    def run_text_only(self, numbers: Sequence[int], samples: Sequence[Mapping[str, Any]]) -> None:
        """Compare the models on the text-only samples of `numbers`; after `run`."""
        tokens, owner, _ = self._forward(self.collator(samples), measure_layers=False)
        for place, number in enumerate(numbers):
            self.records[number].kl_text_only = float(tokens.kl[owner == place].sum())

    def worst_samples(self) -> list[tuple[int, dict[str, list[Any]]]]:
        """Return numbers and tokens of the samples with the largest KL per token, largest first."""
        ordered = sorted(self._heap, key=lambda one: one[:2], reverse=True)
        return [(-negative, tokens) for _, negative, tokens in ordered]


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "role": turn["role"],
            "text": " ".join(one["text"] if one["type"] == "text" else f"[{one['type']}]" for one in turn["content"]),
        }
        for turn in messages
    ]


def worst_entries(
    runner: PairRunner, samples: Sequence[Mapping[str, Any]], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the worst samples as the page shows them: conversation, images, and each supervised token with its KL.

    Args:
        numbers: the number of each sample in the dataset.
    """
    tokenizer, found = runner.collator.processor.tokenizer, []
    for index, tokens in runner.worst_samples():
        record, number = runner.records[index], int(numbers[index])
        sample = read_sample(samples[index], number, max_pixels=runner.collator.max_pixels)
        columns = (tokens[key] for key in ("label", "kl", "top_a", "top_b"))
        entry = {
            "number": number,
            "name": sample.name,
            "type": record.group,
            "kl": record.mean,
            "kl_text_only": None if record.kl_text_only is None else record.kl_text_only / record.tokens,
            "turns": _turns(sample.messages),
            "accept": accepted(samples[index]),
            "answers": dict(zip(("a", "b"), record.answers, strict=False)),  # empty where the sample accepts none
            "right": dict(zip(("a", "b"), record.right, strict=False)),
            "tokens": [
                {"text": tokenizer.decode([label]), "kl": kl, "a": tokenizer.decode([a]), "b": tokenizer.decode([b])}
                for label, kl, a, b in zip(*columns, strict=True)
            ],
            "images": sample_images(sample),
        }
        found.append(entry)
    return found
