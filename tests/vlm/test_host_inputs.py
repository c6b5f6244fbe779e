"""Inputs that families make in host memory: the model computes the same bits with them, and reads nothing for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_plugin.data import ConversationCollator
from grace_plugin.teacher.base import model_inputs
from grace_plugin.vlm import family_of
from grace_plugin.vlm.host import one_thread
from tests.films import films
from tests.threads import Threads
from tests.tiny import EVERY, build, rows

GRIDS = [name for name in EVERY if name.startswith("qwen")]
CPU = torch.device("cpu")


def batch_of(processor: Any, kind: str) -> dict[str, Tensor]:
    if kind == "images":
        chosen = rows(1, seed=4, images=2) + rows(2, seed=1) + rows(1, seed=3, images=0)
    else:
        asked = films(1, 4)[0]
        answer = {"role": "assistant", "content": "a red square"}
        chosen = [{"messages": [*asked["messages"], answer], "videos": [list(asked["videos"][0][0])]}]
        chosen += rows(1, seed=1) if kind == "both" else []
    batch: dict[str, Tensor] = ConversationCollator(processor)(chosen)
    return batch


def test_families_of_grids_are_found() -> None:
    assert len(GRIDS) >= 4


@pytest.mark.parametrize("kind", ["images", "videos", "both"])
@pytest.mark.parametrize("name", GRIDS)
def test_the_model_computes_the_same_bits(name: str, kind: str) -> None:
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
def test_gradients_under_checkpointing_are_the_same_bits(name: str, attention: str) -> None:
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
def test_the_model_looks_at_what_it_is_given(name: str) -> None:
    """Were an input not taken, the logits would not move with it."""
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
def test_nothing_is_made_of_nothing(name: str) -> None:
    model, processor = build(name)
    family, batch = family_of(model), batch_of(processor, "images")
    assert family.host_inputs(model, {k: v for k, v in batch.items() if k != "pixel_values"}, CPU) == {}
    assert family.host_inputs(model, {k: v for k, v in batch.items() if k != "mm_token_type_ids"}, CPU) == {}
    assert "position_ids" not in family.host_inputs(model, {**batch, "position_ids": batch["input_ids"]}, CPU)


@pytest.mark.parametrize("name", GRIDS)
def test_bounds_are_where_they_are_read(name: str, tmp_path: Path) -> None:
    """On the device for kernels that cut; in host memory for the others, or known beside ranks, whose engine moves tensors."""
    model, processor = build(name)
    batch, device = batch_of(processor, "images"), torch.device("meta")
    found = {}
    for attention in ("sdpa", "flash_attention_2"):
        model.model.visual.config._attn_implementation = attention
        found[attention] = family_of(model).host_inputs(model, batch, device)
    model.model.visual.config._attn_implementation = "sdpa"
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found["ranks"] = family_of(model).host_inputs(model, batch, device)
    finally:
        torch.distributed.destroy_process_group()
    bounds = {key for key in found["sdpa"] if key.startswith("image_cu_")}
    for case, made in found.items():
        where = {key: value.device.type for key, value in made.items() if isinstance(value, Tensor)}
        assert {key for key, place in where.items() if place == "cpu"} == (bounds if case == "sdpa" else set())
        assert set(where.values()) <= {"meta", "cpu"} and bounds <= where.keys()
    for key in bounds:
        assert found["ranks"][key].tolist() == found["sdpa"][key].tolist()
        assert found["sdpa"][key][-1] == len(batch["pixel_values"])
    sizes = batch["image_grid_thw"].prod(1)
    assert found["flash_attention_2"]["image_max_seqlen"] == int(sizes.max())
    assert ("image_max_window_seqlen" in found["flash_attention_2"]) == ("image_cu_window_seqlens" in found["sdpa"])
    assert not {key for case in ("sdpa", "ranks") for key in found[case] if "max" in key}


def test_only_a_batch_that_is_elsewhere_needs_them() -> None:
    model, processor = build("qwen3_vl")
    batch = batch_of(processor, "images")
    away = {key: value.to("meta") for key, value in batch.items()}
    here = model_inputs(batch)
    assert model_inputs(batch, model, batch).keys() == here.keys() == model_inputs(away, model).keys()
    assert model_inputs(away, None, batch).keys() == here.keys()
    made = model_inputs(away, model, batch)
    assert made.keys() > here.keys() and "labels" not in made
    assert {key for key, value in made.items() if value.device.type != "meta"} == {"image_cu_seqlens"}
    assert torch.equal(made["image_grid_thw"].cpu(), batch["image_grid_thw"])  # known
    llava, _ = build("llava")  # no family of grids
    assert model_inputs(away, llava, batch).keys() == here.keys()


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_made_of_a_batch_wakes_no_other_thread(name: str, threads: int) -> None:
    model, processor = build(name)
    batch = batch_of(processor, "images")
    away = {key: value.to("meta") for key, value in batch.items()}
    with Threads() as seen:
        model_inputs(away, model, batch)
    assert len(seen.found) > 5 and set().union(*seen.found.values()) == {1}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("device", "inside"), [("meta", 1), ("cuda", 1), ("cpu", 3)])
def test_threads_are_given_back(device: str, inside: int, threads: int) -> None:
    found = []

    def work() -> None:
        with one_thread(torch.device(device)):
            found.append(torch.get_num_threads())
            raise ValueError("asked for")

    with pytest.raises(ValueError, match="asked for"):
        work()
    assert [*found, torch.get_num_threads()] == [inside, threads]
