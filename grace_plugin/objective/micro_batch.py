"""Find what a micro-batch trains on, and run the teacher on it.

Legend: B batch, S sequence, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.objective.terms import LossTerm, RunContext
from grace_plugin.objective.window import MicroBatch, NamedSums
from grace_plugin.teacher import supervised_positions
from grace_plugin.vlm import Family, VisualTokens
from grace_plugin.vlm.transfer import single_thread, to_device

__all__ = ["SAMPLES_WITHOUT_IMAGES", "labels_of", "prepare_micro_batch", "sample_numbers"]

SAMPLES_WITHOUT_IMAGES = "samples_without_images"


def labels_of(batch: Mapping[str, Any], family: Family, config: Any) -> Tensor:
    """Return labels [B, S]; a batch without any (calibration text) supervises every text token that the model reads."""
    if batch.get("labels") is not None:
        return batch["labels"]
    labels = batch["input_ids"].clone()
    if batch.get("attention_mask") is not None:
        labels[batch["attention_mask"] == 0] = IGNORE_INDEX
    for token_id in family.token_ids(config).values():
        labels[labels == token_id] = IGNORE_INDEX
    return labels


def sample_numbers(batch: Mapping[str, Any]) -> Tensor:
    """Return int64 [B * S]: the sample a token belongs to. In packed sequences one begins wherever positions restart at 0."""
    ids = batch["input_ids"]
    if batch.get("attention_mask") is None and batch.get("position_ids") is not None:
        return (batch["position_ids"] == 0).flatten().cumsum(0) - 1
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])


def _count_text_only(host: Mapping[str, Any], positions: Tensor, visual: VisualTokens) -> Tensor:
    """Count samples with a supervised token and without a visual one, 0-dimensional."""
    sample = sample_numbers(host)
    # one entry per token instead of per sample: the number of samples is a value, and reading it would stop the device
    text_only = torch.zeros(sample.shape, device=sample.device)
    text_only.index_fill_(0, sample[positions], 1.0)
    return text_only.index_fill_(0, sample[visual.index], 0.0).sum()


def prepare_micro_batch(
    batch: Mapping[str, Any],
    host: Mapping[str, Any],
    context: RunContext,
    terms: Sequence[LossTerm],
    counts: NamedSums,
) -> MicroBatch:
    """Find supervised and visual positions, run the teacher, and have every term add its share to the counts.

    Args:
        batch: of the collator, on the student's device.
        host: the same batch where it is inspected; in host memory, nothing is read back from the device.
        context: of the run.
        terms: that are enabled.
        counts: of the window, on the student's device.

    Raises:
        ValueError: visual tokens that do not fit the family, or a label outside the shared vocabulary.
    """
    device, config = counts.values.device, context.student.config
    with single_thread(device):
        # in host memory: shapes that depend on values (nonzero, a maximum) would stop the device
        labels = labels_of(host, context.family, config)
        positions = supervised_positions(labels)
        targets = labels.flatten()[positions + 1]
        if targets.numel() and int(targets.max()) >= context.vocabulary:
            raise ValueError(
                f"label {int(targets.max())} lies outside the {context.vocabulary} token ids that teacher and student share; "
                "the data was tokenized with another tokenizer, or the sample uses a token only one side knows"
            )
        found = context.family.visual_tokens(config, host)
        text_only = _count_text_only(host, positions, found)
    visual = VisualTokens(to_device(found.index, device), found.sizes)
    micro_batch = MicroBatch(to_device(positions, device), to_device(targets, device), visual, host)
    counts.add(**{SAMPLES_WITHOUT_IMAGES: to_device(text_only, device)})
    if context.teacher is not None:
        micro_batch.teacher = context.teacher.states(batch, micro_batch.positions, visual, host)
    # after the teacher's states: the terms count by them
    for term in terms:
        term.prepare(micro_batch, counts)
    return micro_batch
