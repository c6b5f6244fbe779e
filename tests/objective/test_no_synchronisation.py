"""The code of this package reads nothing back from the device during a step, given the batches in host memory as well.

On `meta`, reading a value raises; on CUDA, torch's error mode for synchronizations does. transformers' modeling code does read
(masks that select, padding that is looked for), so the models here run their decoders alone, which ask nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_plugin.objective.async_copy import AsyncHostCopy
from grace_plugin.objective.micro_batch import SAMPLES_WITHOUT_IMAGES, prepare_micro_batch
from grace_plugin.objective.window import MicroBatch, NamedSums
from grace_plugin.teacher import ResidentTeacher, TeacherStates
from grace_plugin.teacher.base import states_of
from grace_plugin.vlm import FAMILIES, VisualTokens
from grace_plugin.vlm.transfer import to_device
from tests.objective.parts import Set
from tests.pairs import mixed_samples
from tests.threads import Threads
from tests.tiny import FAMILIES as THREE
from tests.vlm.test_host_inputs import batch_of

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PACKED = sorted(name for name, family in FAMILIES.items() if family.packs)
WITH_VIDEOS = ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]


def batches_of(made: Set) -> list[dict[str, Any]]:
    rows = mixed_samples(6)
    return [made.collate(rows[:4]), made.collate(rows[4:])]


def on(device: str, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches as Trainer copies them."""
    place = torch.device(device)
    return [{k: to_device(v, place) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]


def decoder_alone(model: Any) -> Callable[..., Any]:
    """A forward pass of the model's decoder on the batch's ids, without images, under a causal mask made here."""

    def forward(**inputs: Any) -> Any:
        ids = inputs["input_ids"]
        mask = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        return model.model.language_model(input_ids=ids, attention_mask=mask, use_cache=False)

    return forward


class DecoderTeacher(ResidentTeacher):
    """A resident teacher whose pass is its decoder's."""

    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        return states_of(decoder_alone(self.model), self._text_model, batch, positions, visual)


def set_on(device: str, family: str) -> Set:
    made = Set(family, quantized=True)
    made.student.to(device)
    teacher = DecoderTeacher(made.teacher.to(device))
    made.grace.prepare(made.student, teacher, vocabulary=made.size, total_steps=100, attached=made.attached)
    return made


def look_at(made: Set, host: dict[str, Any], device: str) -> tuple[MicroBatch, Tensor]:
    context, counts = (
        replace(made.grace.context, teacher=None),
        NamedSums((SAMPLES_WITHOUT_IMAGES,), torch.device(device)),
    )
    return prepare_micro_batch(on(device, [host])[0], host, context, (), counts), counts.values


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batch__images__nothing_read(family: str) -> None:
    made = Set(family)
    for host in batches_of(made):
        item, counts = look_at(made, host, "meta")
        assert item.positions.is_meta and item.targets.is_meta and item.visual.index.is_meta and counts.is_meta
        assert sum(item.visual.sizes) == item.visual.index.numel()


@pytest.mark.parametrize("family", PACKED)
def test_micro_batch__packed_samples__nothing_read(family: str) -> None:
    made = Set(family)
    made.collate.packed = True
    item, _ = look_at(made, batches_of(made)[0], "meta")
    assert item.positions.is_meta and len(item.visual.sizes) > 1


@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_micro_batch__videos__nothing_read(family: str) -> None:
    made = Set(family)
    item, _ = look_at(made, batch_of(made.processor, "both"), "meta")
    assert item.visual.index.is_meta and len(item.visual.sizes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", THREE)
def test_window_and_losses__on_meta__nothing_read(family: str) -> None:
    made = set_on("meta", family)
    host = batches_of(made)
    away = on("meta", host)
    made.grace.begin_step(away, host)
    assert made.grace._window.counts.values.is_meta
    for batch in away:
        loss = made.grace.compute_loss(decoder_alone(made.student), batch)
        loss.backward()
        assert loss.is_meta
    made.grace.cancel_step()
    with pytest.raises(Exception, match="meta"):
        made.grace.begin_step(away)  # without host batches they are read on the device


def test_micro_batch__three_threads__one_used(threads: int) -> None:
    made = Set("qwen2_vl")
    host = batches_of(made)[0]
    with Threads() as seen:
        look_at(made, host, "meta")
    assert len(seen.found) > 5 and set().union(*seen.found.values()) == {1}
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_begin_step__host_batches_given__same_numbers() -> None:
    losses, records = [], []
    for copied in (False, True):
        made = Set("llava", quantized=True)
        batches = batches_of(made)
        host = [{key: value.clone() for key, value in batch.items()} for batch in batches]
        made.grace.begin_step(batches, host if copied else None)
        losses.append(torch.stack([made.grace.compute_loss(made.student, batch) for batch in batches]).sum())
        records.append(made.grace.reduce_metrics())
    assert torch.equal(*losses) and records[0] == records[1]


def test_async_host_copy__on_cpu__numbers_of_the_tensor() -> None:
    tensor = torch.tensor([1.0, 2.5])
    assert AsyncHostCopy(tensor).tolist() == [1.0, 2.5]
    assert to_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.parametrize("family", [pytest.param(family, marks=CUDA) for family in THREE])
def test_whole_step__on_cuda__no_synchronization(family: str) -> None:
    """The second step in torch's error mode: window, teacher, losses, backward pass, record, controller, quantizer."""
    made = set_on("cuda", family)
    made.student.train()
    host = batches_of(made)
    for mode in ("default", "error"):  # the first compiles kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            away = on("cuda", host)
            made.grace.begin_step(away, host)
            for batch in away:
                made.grace.compute_loss(decoder_alone(made.student), batch).backward()
            record = made.grace.reduce_metrics()
            made.grace.end_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert record.finite and record.tokens > 0
