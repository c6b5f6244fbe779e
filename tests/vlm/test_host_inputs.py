"""Inputs that families make in host memory: the model computes the same bits with them, and reads nothing for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grace_plugin.data import ConversationCollator
from grace_plugin.teacher.base import model_inputs
from grace_plugin.vlm import family_of
from grace_plugin.vlm.transfer import single_thread
from tests.threads import Threads
from tests.tiny import EVERY, build, make_samples
from tests.videos import video_samples

GRIDS = [name for name in EVERY if name.startswith("qwen")]
CPU = torch.device("cpu")


def batch_of(processor: Any, kind: str) -> dict[str, Tensor]:
    if kind == "images":
        chosen = make_samples(1, seed=4, images=2) + make_samples(2, seed=1) + make_samples(1, seed=3, images=0)
    else:
        asked = video_samples(1, 4)[0]
        answer = {"role": "assistant", "content": "a red square"}
        chosen = [{"messages": [*asked["messages"], answer], "videos": [list(asked["videos"][0][0])]}]
        chosen += make_samples(1, seed=1) if kind == "both" else []
    batch: dict[str, Tensor] = ConversationCollator(processor)(chosen)
    return batch


def test_grid_families__registry__at_least_four() -> None:
    assert len(GRIDS) >= 4


@pytest.mark.parametrize("kind", ["images", "videos", "both"])
@pytest.mark.parametrize("name", GRIDS)
def test_logits__with_host_inputs__same_bits(name: str, kind: str) -> None:
    model, processor = build(name)
    batch = batch_of(processor, kind)
    inputs, made = model_inputs(batch), family_of(model).host_inputs(model, batch, CPU)
    kinds = {"images": {"image"}, "videos": {"video"}, "both": {"image", "video"}}[kind]
    assert {key.split("_")[0] for key in made} == kinds | {"position"}
    for one in kinds:
        assert {f"{one}_position_ids", f"{one}_cu_seqlens"} <= made.keys()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**{**inputs, **made}).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GRIDS)
def test_gradients__with_host_inputs_under_checkpointing__same_bits(name: str, attention: str) -> None:
    model, processor = build(name)
    model.set_attn_implementation(attention)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, found = batch_of(processor, "images"), []
    for made in ({}, family_of(model).host_inputs(model, batch, CPU)):
        model.zero_grad()
        model(**{**model_inputs(batch), **made}, labels=batch["labels"], use_cache=False).loss.backward()
        found.append({key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
    one, other = found
    assert len(one) > 20 and one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("name", GRIDS)
def test_host_inputs__one_altered__logits_change(name: str) -> None:
    """An input that the model did not take would not change its logits."""
    model, processor = build(name)
    batch = batch_of(processor, "images")
    inputs, made = model_inputs(batch), family_of(model).host_inputs(model, batch, CPU)
    with torch.no_grad():
        want = model(**inputs).logits
        for key, value in made.items():
            if key.endswith(("cu_seqlens", "cu_window_seqlens")):
                other = value[[0, -1]]  # everything attends to everything
            else:
                other = (
                    value * 0
                    if value.is_floating_point()
                    else value.flip(0)
                    if value.ndim == 1
                    else torch.zeros_like(value)
                )
            assert not torch.equal(model(**{**inputs, **made, key: other}).logits, want), key


@pytest.mark.parametrize("name", GRIDS)
def test_host_inputs__parts_missing_or_given__not_made(name: str) -> None:
    model, processor = build(name)
    family, batch = family_of(model), batch_of(processor, "images")
    assert family.host_inputs(model, {k: v for k, v in batch.items() if k != "pixel_values"}, CPU) == {}
    assert family.host_inputs(model, {k: v for k, v in batch.items() if k != "mm_token_type_ids"}, CPU) == {}
    assert "position_ids" not in family.host_inputs(model, {**batch, "position_ids": batch["input_ids"]}, CPU)


@pytest.mark.parametrize("name", GRIDS)
def test_attention_bounds__by_attention_function__where_they_are_read(name: str) -> None:
    """On the device for kernels of variable lengths; in host memory for the others, which split by them."""
    model, processor = build(name)
    batch, device = batch_of(processor, "images"), torch.device("meta")
    found = {}
    for attention in ("sdpa", "flash_attention_2"):
        model.model.visual.config._attn_implementation = attention
        found[attention] = family_of(model).host_inputs(model, batch, device)
    bounds = {key for key in found["sdpa"] if key.startswith("image_cu_")}
    for case, made in found.items():
        where = {key: value.device.type for key, value in made.items() if isinstance(value, Tensor)}
        assert {key for key, place in where.items() if place == "cpu"} == (bounds if case == "sdpa" else set())
        assert set(where.values()) <= {"meta", "cpu"} and bounds <= where.keys()
    for key in bounds:
        assert found["sdpa"][key][-1] == len(batch["pixel_values"])
    sizes = batch["image_grid_thw"].prod(1)
    assert found["flash_attention_2"]["image_max_seqlen"] == int(sizes.max())
    assert ("image_max_window_seqlen" in found["flash_attention_2"]) == ("image_cu_window_seqlens" in found["sdpa"])
    assert not {key for key in found["sdpa"] if "max" in key}


def test_model_inputs__batch_on_the_host__no_host_inputs() -> None:
    model, processor = build("qwen3_vl")
    batch = batch_of(processor, "images")
    away = {key: value.to("meta") for key, value in batch.items()}
    here = model_inputs(batch)
    assert model_inputs(batch, model, batch).keys() == here.keys() == model_inputs(away, model).keys()
    assert model_inputs(away, None, batch).keys() == here.keys()
    made = model_inputs(away, model, batch)
    assert made.keys() > here.keys() and "labels" not in made
    assert {key for key, value in made.items() if value.device.type != "meta"} == {"image_cu_seqlens"}
    llava, _ = build("llava")  # no family of grids
    assert model_inputs(away, llava, batch).keys() == here.keys()


@pytest.mark.parametrize("name", GRIDS)
def test_model_inputs__three_threads__one_used(name: str, threads: int) -> None:
    model, processor = build(name)
    batch = batch_of(processor, "images")
    away = {key: value.to("meta") for key, value in batch.items()}
    with Threads() as seen:
        model_inputs(away, model, batch)
    assert len(seen.found) > 5 and set().union(*seen.found.values()) == {1}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("device", "inside"), [("meta", 1), ("cuda", 1), ("cpu", 3)])
def test_single_thread__exception_inside__threads_restored(device: str, inside: int, threads: int) -> None:
    found = []

    def work() -> None:
        with single_thread(torch.device(device)):
            found.append(torch.get_num_threads())
            raise ValueError("asked for")

    with pytest.raises(ValueError, match="asked for"):
        work()
    assert [*found, torch.get_num_threads()] == [inside, threads]
