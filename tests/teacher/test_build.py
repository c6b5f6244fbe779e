"""Build a teacher cache: exact prediction, continuation after a stop, damaged files, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher import CachedTeacher, CachePlan, StateStore, build_cache, open_store
from grace_plugin.teacher.build import check_disk
from tests.pairs import Pair, mixed_samples, pair
from tests.teacher.caches import asked, build, everything
from tests.tiny import make_samples

SMALL = {"batch_size": 1, "shard_bytes": 100_000}  # several files of one or two samples


class StopError(Exception):
    """What ends a build half way."""


def stop_after(count: int) -> Any:
    def progress(what: str, done: int, of: int) -> None:
        if what == "running the teacher" and done == count:
            raise StopError

    return progress


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("visual", [True, False])
def test_build_cache__predicted_size__exact(pair_of: Any, tmp_path: Path, family: str, visual: bool) -> None:
    folder, dataset = tmp_path / "cache", mixed_samples(8)
    plans: list[tuple[CachePlan, bool]] = []
    done = build(
        pair_of(family), folder, dataset, visual=visual, batch_size=1,
        announce=lambda plan: plans.append((plan, folder.exists())),
    )  # fmt: skip
    states = everything(folder)
    assert done.bytes == done.total_bytes == sum(s.numel() * s.element_size() for s in states.values())
    assert {s.dtype for s in states.values()} == {torch.float32}
    assert len(states) == (16 if visual else 8)
    (first, existed), (second, _) = plans
    assert not existed, "the size is said before anything is written"
    assert first.seconds is None and second.seconds is not None and second.seconds > 0.0
    assert (first.samples, first.stored, first.bytes, first.at_most) == (8, 0, done.bytes, False)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert done.bytes < on_disk <= done.bytes + 1024 * 8


@pytest.mark.slow
def test_build_cache__learned_newlines__size_is_upper_bound(pair_of: Any, tmp_path: Path) -> None:
    done = build(pair_of("llava_next"), tmp_path / "cache", make_samples(2))
    assert done.at_most
    assert done.bytes > sum(s.numel() * s.element_size() for s in everything(tmp_path / "cache").values())


def test_build_cache__equal_samples__run_once(llava: Pair, tmp_path: Path) -> None:
    one, two = make_samples(2)
    dataset = [{**one, "id": "a"}, {**two, "id": "b"}, {**one, "id": "c"}]
    assert build(llava, tmp_path / "cache", dataset).samples == 2


@pytest.mark.slow
def test_build_cache__stopped__continues(llava: Pair, tmp_path: Path) -> None:
    dataset, folder = mixed_samples(8), tmp_path / "cache"
    with pytest.raises(StopError):
        build(llava, folder, dataset, **SMALL, progress=stop_after(5))
    (folder / "writing.partial").write_bytes(b"half a file")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    stored = len(StateStore(folder))
    assert 0 < stored <= 5 and len(kept) >= 2
    ran: list[tuple[int, int]] = []
    again = build(llava, folder, dataset, **SMALL, progress=lambda what, done, of: ran.append((done, of)))
    assert again.stored == stored and ran[-1] == (8 - stored, 8 - stored)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert not (folder / "writing.partial").exists()
    build(llava, tmp_path / "whole", dataset, **SMALL)
    left, right = everything(folder), everything(tmp_path / "whole")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    (folder / "mine.safetensors").write_bytes(b"of another kind")
    nothing = build(llava, folder, dataset, **SMALL)
    assert (folder / "mine.safetensors").exists(), "what the store has not written, it does not remove"
    assert (nothing.bytes, nothing.tokens, nothing.stored) == (0, 0, 8)


@pytest.mark.slow
def test_build_cache__longer_dataset__samples_added(llava: Pair, tmp_path: Path) -> None:
    build(llava, tmp_path / "cache", make_samples(2))
    more = build(llava, tmp_path / "cache", make_samples(4), visual=False)
    assert (more.samples, more.stored, len(StateStore(tmp_path / "cache"))) == (4, 2, 4)
    assert sum(name.endswith(".visual") for name in everything(tmp_path / "cache")) == 4, "what a store keeps, it keeps"


def flip(path: Path) -> None:
    """Change one bit of the last state in a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, cut])
def test_build_cache__damaged_file__named_and_written_again(llava: Pair, tmp_path: Path, damage: Any) -> None:
    dataset, folder = mixed_samples(6), tmp_path / "cache"
    build(llava, folder, dataset, **SMALL)
    before = everything(folder)
    bad = sorted(folder.glob("*.safetensors"))[1]
    damage(bad)
    with pytest.raises(ValueError, match=rf"{bad} is not what was written .*grace teacher cache .*{folder}` again"):
        open_store(asked(llava, folder), visual=True)
    if damage is flip:
        assert len(open_store(asked(llava, folder, check_cache=False), visual=True)) == 6
    announced: list[CachePlan] = []
    again = build(llava, folder, dataset, **SMALL, announce=announced.append)
    assert again.dropped == announced[0].dropped == (bad.name,)
    assert 0 < again.samples - again.stored < 6
    after = everything(folder)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    open_store(asked(llava, folder), visual=True)


@pytest.mark.slow
def test_build_cache__bad_input__refused_before_loading(llava: Pair, tmp_path: Path) -> None:
    folder, dataset = tmp_path / "cache", make_samples(2)

    def refused(match: str, **options: Any) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=match):
            build(llava, options.pop("folder", folder), options.pop("dataset", dataset), **options)
        assert sorted(tmp_path.rglob("*")) == before

    refused("set teacher.model in the recipe", teacher=TeacherRecipe())
    refused(r"cannot read the teacher '/no/where'", teacher=TeacherRecipe(model="/no/where"))
    refused("at least 1, got 0 and", batch_size=0)
    refused("the dataset has no samples", dataset=[])
    refused("can be checked first", dataset=IterableDataset.from_generator(lambda: iter(dataset)))
    refused(r"1 of 2 samples cannot be used", dataset=[*make_samples(1), {"messages": []}])
    (tmp_path / "notes").write_text("mine")
    refused("holds something else than a teacher cache", folder=tmp_path)
    with pytest.raises(ValueError, match=r"the states take .* bytes and the disk of .* free"):
        check_disk(folder, CachePlan(1, 0, 2**70, 2**70, False, 1))


@pytest.mark.slow
def test_build_cache__folder_of_other_states__left_alone(llava: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build(llava, folder, make_samples(1), visual=False)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != ".build.lock"}
    processor = AutoProcessor.from_pretrained(llava.student)
    processor.chat_template = processor.chat_template.replace("USER", "PERSON") + " "
    for options, told in (
        ({"teacher": TeacherRecipe(model=str(llava.teacher))}, "dtype: 'float32' / 'bfloat16'"),
        ({"teacher": TeacherRecipe(model=str(llava.student), dtype="float32")}, "width: 512 / 256"),
        ({"visual": True}, "visual: False / True"),
        ({"visual": False, "processor": processor}, "processor.chat_template: "),
    ):
        with pytest.raises(ValueError, match=rf"{folder} holds states written otherwise .*{told}"):
            build(llava, folder, make_samples(2), **({"visual": False} | options))
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != ".build.lock"} == before
    (folder / "store.json").write_text(json.dumps({"format": 0, "identity": {}, "made_with": {}}))
    with pytest.raises(ValueError, match=r"has format 0, and this version reads 2; remove"):
        build(llava, folder, make_samples(2))
    (folder / "store.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"store\.json cannot be read; run `grace teacher cache .*` again: it restores it"
    ):
        StateStore(folder)


def test_build_cache__other_tokenizer__refused(tmp_path: Path) -> None:
    other = pair("llava", tmp_path, teacher={"words": "other"})
    with pytest.raises(ValueError, match="tokenizers differ"):
        build(other, tmp_path / "cache", make_samples(1))
    assert not (tmp_path / "cache").exists()


def test_build_cache__teacher_without_head__refused(tmp_path: Path) -> None:
    """transformers would draw one, and the embedding is not tied to it."""
    made = pair("llava", tmp_path)
    weights = load_file(made.teacher / "model.safetensors")
    kept = {name: value.clone() for name, value in weights.items() if not name.endswith("lm_head.weight")}
    assert len(kept) == len(weights) - 1
    save_file(kept, made.teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 weight\(s\) are missing \(lm_head\.weight\)\. The output head was not saved"
    ):
        build(made, tmp_path / "cache", make_samples(1))
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_build_cache__dataset_and_workers__all_samples(llava: Pair, tmp_path: Path) -> None:
    pictures = []
    for number, sample in enumerate(make_samples(3)):
        sample["images"][0].save(tmp_path / f"{number}.png")
        text = [part | {"text": part.get("text")} for part in sample["messages"][0]["content"]]
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": sample["messages"][1]["content"]},
        ]
        pictures.append({"messages": messages, "images": [str(tmp_path / f"{number}.png")]})
    build_cache(
        str(llava.student), teacher=TeacherRecipe(model=str(llava.teacher)), dataset=Dataset.from_list(pictures),
        output_dir=str(tmp_path / "cache"), workers=2, processor=AutoProcessor.from_pretrained(llava.student),
    )  # fmt: skip
    teacher = CachedTeacher(StateStore(tmp_path / "cache"), asked(llava, tmp_path / "cache", dtype="auto"))
    assert len(teacher.store) == 3
    assert {state.dtype for state in everything(tmp_path / "cache").values()} == {torch.bfloat16}
    assert teacher.head()[0].dtype == torch.bfloat16
