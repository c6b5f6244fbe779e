"""A step of the objective reads nothing back from the device: on `meta`, where reading raises, with its batches on the host.

What a family's modeling code reads belongs to transformers; LLaVA's reads nothing with eager attention and without
transformers' checks, nor do Qwen2-VL's and Qwen2.5-VL's with what `Family.host_inputs` makes of their grids. Qwen3-VL's looks
for its pictures' tokens on the device, once for each layer that is given more of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from grace_plugin.objective.host import Reading
from grace_plugin.teacher.base import model_inputs
from grace_plugin.vlm.host import moved
from tests.objective.parts import Set
from tests.pairs import mixed_rows

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def batches_of(made: Set) -> list[dict[str, Any]]:
    rows = mixed_rows(6)
    return [made.collate(rows[:4]), made.collate(rows[4:])]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_a_step_on_meta_with_its_batches_on_the_host(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    made = Set(family, quantized=True)
    for model in (made.student, made.teacher):
        model.to("meta").set_attn_implementation("eager")  # sdpa asks whether anything is padded
    made.grace.teacher.to(torch.device("meta"))
    host = batches_of(made)
    away = [{key: value.to("meta") for key, value in batch.items()} for batch in host]
    tokens = made.grace.window(away, host)
    assert tokens.device.type == "meta"
    for batch in away:
        loss = made.grace.loss(made.student, batch)
        loss.backward()
        assert loss.device.type == "meta"
    assert made.grace.probe is not None and {value.device.type for value in made.grace.probe.values()} == {"cpu"}
    with pytest.raises(Exception, match="meta"):
        made.grace.window(away)  # looked at on the device, as it has to be without host batches


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


def reads(work: Callable[[], Any]) -> int:
    """How often torch says that the host waited for the device."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in said)


@pytest.mark.parametrize("family", [pytest.param(family, marks=CUDA) for family in ("llava", "qwen3_vl")])
def test_a_step_on_cuda_reads_no_more_than_the_models_do(family: str) -> None:
    """Everything in torch's error mode but the two models' forward; the backward pass reads as often as the bare student's.

    transformers' forward reads grids, masks and counts; the backward pass of its masked copy of the image features reads too.
    """
    made, bare = Set(family, quantized=True), Set(family)
    for model in (made.student, made.teacher, bare.student):
        model.cuda()
    made.grace.teacher.to(torch.device("cuda"))
    forwards = {model: model.forward for model in (made.student, made.teacher)}

    def allowed(model: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            try:
                return forwards[model](*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)

        return forward

    for model in forwards:
        model.forward = allowed(model)
    host = batches_of(made)
    for run in range(2):  # the first compiles kernels
        torch.cuda.set_sync_debug_mode("error" if run else "default")
        try:
            away = [{key: moved(value, torch.device("cuda")) for key, value in batch.items()} for batch in host]
            made.grace.window(away, host)
            losses = [made.grace.loss(made.student, batch) for batch in away]
            record = made.grace.measure()
            made.grace.step(1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert record.finite and record.tokens > 0
        for loss, batch in zip(losses, away, strict=True):
            plain = bare.student(**batch).loss
            assert reads(loss.backward) <= reads(plain.backward)


@pytest.mark.parametrize("family", [pytest.param(family, marks=CUDA) for family in ("qwen2_vl", "qwen3_vl")])
def test_a_forward_pass_on_cuda_reads_less_with_its_grids_on_the_host(family: str) -> None:
    made = Set(family)
    made.student.cuda()
    host = batches_of(made)[0]
    away = {key: moved(value, torch.device("cuda")) for key, value in host.items()}
    counts = [
        reads(lambda given=given: made.student(**model_inputs(away, made.student, given)))  # type: ignore[misc]
        for given in (None, host, None, host)  # the first compiles and fills caches
    ]
    assert counts[3] < counts[2] // 2
