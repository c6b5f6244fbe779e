"""A step of the objective reads nothing back from the device: on `meta`, where reading raises, with its batches on the host.

That holds for what transformers' modeling code asks as well, in every family, because a batch's tensors are `Known`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grace_plugin.objective.host import Reading
from grace_plugin.objective.window import look
from grace_plugin.vlm import FAMILIES
from grace_plugin.vlm.host import moved
from tests.objective.parts import Set
from tests.pairs import mixed_rows
from tests.threads import Threads
from tests.vlm.test_host_inputs import batch_of

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PACKED = sorted(name for name, family in FAMILIES.items() if family.packs)
COPIES_LENGTHS = ("llava_next", "llava_onevision")
WITH_VIDEOS = ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]


def batches_of(made: Set) -> list[dict[str, Any]]:
    rows = mixed_rows(6)
    return [made.collate(rows[:4]), made.collate(rows[4:])]


def on(device: str, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches as Trainer copies them."""
    place = torch.device(device)
    return [{k: moved(v, place) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]


def set_on(device: str, family: str, attention: str) -> Set:
    made = Set(family, quantized=True)
    for model in (made.student, made.teacher):
        model.bfloat16() if family == "qwen3_vl_moe" else None  # grouped products on `meta` know no other dtype
        model.to(device).set_attn_implementation(attention)
    made.grace.teacher.to(torch.device(device))
    return made


def step_on_meta(made: Set, host: list[dict[str, Any]]) -> None:
    away = on("meta", host)
    assert made.grace.window(away, host).device.type == "meta"
    for batch in away:
        loss = made.grace.loss(made.student, batch)
        loss.backward()
        assert loss.device.type == "meta"
    made.grace.cancel_step()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_meta_with_its_batches_on_the_host(family: str, attention: str) -> None:
    made = set_on("meta", family, attention)
    host = batches_of(made)
    step_on_meta(made, host)
    with pytest.raises(Exception, match="meta"):
        made.grace.window(on("meta", host))  # looked at on the device, as it has to be without host batches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_meta_under_checkpointing(family: str) -> None:
    made = set_on("meta", family, "sdpa")
    made.student.train()
    made.student.gradient_checkpointing_enable({"use_reentrant": False})
    step_on_meta(made, batches_of(made))


@pytest.mark.parametrize("family", PACKED)
def test_a_step_on_meta_with_packed_rows(family: str) -> None:
    made = set_on("meta", family, "sdpa")
    made.collate.packed = True
    step_on_meta(made, batches_of(made))


@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_a_step_on_meta_with_videos(family: str) -> None:
    made = set_on("meta", family, "sdpa")
    step_on_meta(made, [batch_of(made.processor, "both")])


def test_looking_at_a_batch_wakes_no_other_thread(threads: int) -> None:
    made, device = Set("qwen2_vl"), torch.device("meta")
    host = batches_of(made)[0]
    grace = made.grace
    with Threads() as seen:
        look(
            on("meta", [host])[0], host, family=grace.family, config=grace.config, vocabulary=grace.vocabulary, teacher=None,
            distill=grace.distill, relational=grace.relational, device=device,
        )  # fmt: skip
    assert len(seen.found) > 5 and set().union(*seen.found.values()) == {1}
    assert torch.get_num_threads() == threads


def test_host_batches_change_nothing() -> None:
    losses, records = [], []
    for copied in (False, True):
        made = Set("llava", quantized=True)
        batches = batches_of(made)
        host = [{key: value.clone() for key, value in batch.items()} for batch in batches]
        made.grace.window(batches, host if copied else None)
        losses.append(torch.stack([made.grace.loss(made.student, batch) for batch in batches]).sum())
        records.append(made.grace.measure())
    assert torch.equal(*losses) and records[0] == records[1]


def test_a_reading_is_the_tensor_as_it_stood() -> None:
    tensor = torch.tensor([1.0, 2.5])
    assert Reading(tensor).numbers() == [1.0, 2.5]
    assert moved(tensor, torch.device("cpu")) is tensor


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [pytest.param(family, marks=CUDA) for family in FAMILIES])
def test_a_step_on_cuda_reads_nothing(family: str, checkpointing: bool, request: pytest.FixtureRequest) -> None:
    """The second step in torch's error mode: window, both models, losses, backward pass, record, controller, quantizer."""
    if family in COPIES_LENGTHS:
        reason = "transformers copies the lengths of its image features, which nobody asks for, from pageable memory"
        request.applymarker(pytest.mark.xfail(raises=RuntimeError, strict=True, reason=reason))
    made = set_on("cuda", family, "sdpa")
    made.student.train()
    if checkpointing:
        made.student.gradient_checkpointing_enable({"use_reentrant": False})
    host = batches_of(made)
    for mode in ("default", "error"):  # the first compiles kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            away = on("cuda", host)
            made.grace.window(away, host)
            for batch in away:
                made.grace.loss(made.student, batch).backward()
            record = made.grace.measure()
            made.grace.step(1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert record.finite and record.tokens > 0
