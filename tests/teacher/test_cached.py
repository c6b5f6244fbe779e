"""A cached teacher answers as the resident one, holds its head alone, and refuses what it cannot answer before a run."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

import grace_plugin
from grace_plugin.data import ConversationCollator
from grace_plugin.objective import GraceObjective
from grace_plugin.run.trainer import GraceTrainer
from grace_plugin.teacher import (
    CachedTeacher,
    ResidentTeacher,
    StateStore,
    load_teacher,
    open_store,
    supervised_positions,
)
from grace_plugin.teacher import cached as reading
from grace_plugin.vlm import VisualTokens, family_of
from tests.pairs import Pair, mixed_samples, pair, recipe_text, run
from tests.teacher.caches import ask, asked, build, cached_recipe, collator_of, same, video_sample
from tests.tiny import FAMILIES, make_samples, save
from tests.tiny import build as tiny

ROWS = mixed_samples(6)


@pytest.fixture(scope="module")
def cache_of(pair_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> a cache of ROWS, each sample run alone, in several files; never change it, copy it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "cache"
            build(pair_of(family), made[family], ROWS, batch_size=1, shard_bytes=200_000)
        return made[family]

    return get


def both(pair: Pair, folder: Path) -> tuple[ResidentTeacher, CachedTeacher]:
    resident = ResidentTeacher(load_teacher(str(pair.teacher), dtype="float32"))
    return resident, CachedTeacher(open_store(asked(pair, folder), visual=True), asked(pair, folder))


def apart(resident: ResidentTeacher, batch: dict[str, Any], left: Any, right: Any) -> dict[str, tuple[float, float]]:
    """Of "final" and "visual": the largest distance of a sample of `left` from `right`'s, and of `left` from float64's (that is
    what float32 rounds on this machine); both as a share of the sample's length.
    """
    exact = ResidentTeacher(load_teacher(resident.name_or_path, dtype="float32").double())
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    truth, found = ask(exact, wide), {}
    for name in ("final", "visual"):
        mine, other, true = (getattr(states, name).double() for states in (left, right, truth))
        assert mine.shape == other.shape == true.shape
        found[name] = tuple(
            float(((a - b).norm(dim=-1) / true.norm(dim=-1)).max()) for a, b in ((mine, other), (mine, true))
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_teacher__states__those_of_the_resident_teacher(pair_of: Any, cache_of: Any, family: str) -> None:
    """A sample run alone: the same bits. Samples padded together: the resident teacher's own float32 rounding lies between."""
    resident, cached = both(pair_of(family), cache_of(family))
    collate = collator_of(pair_of(family))
    for sample in ROWS:
        assert same(ask(resident, collate([sample])), ask(cached, collate([sample])))
    shuffled = [ROWS[number] for number in (4, 1, 5, 0, 1)]
    left, right = ask(resident, collate(shuffled)), ask(cached, collate(shuffled))
    for difference, rounding in apart(resident, collate(shuffled), left, right).values():
        assert difference <= 2 * rounding and rounding < 1e-5
    assert torch.equal(resident.head()[0], cached.head()[0]) and cached.head()[1] is None
    cached.to(torch.device("cpu"))


@pytest.mark.slow
def test_cached_teacher__same_batch__same_bits(llava: Pair, tmp_path: Path) -> None:
    """Build and batch put the longest sample first, so both pad and order alike."""
    dataset = sorted(mixed_samples(4), key=lambda sample: -len(collator_of(llava)([sample])["input_ids"][0]))
    build(llava, tmp_path / "cache", dataset, batch_size=4)
    resident, cached = both(llava, tmp_path / "cache")
    batch = collator_of(llava)(dataset)
    assert len({len(collator_of(llava)([sample])["input_ids"][0]) for sample in dataset}) > 1, "something is padded"
    assert same(ask(resident, batch), ask(cached, batch))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_cached_teacher__images_and_videos__in_the_batch_order(pair_of: Any, tmp_path: Path, family: str) -> None:
    """A batch lists its images before its videos, whatever their order in the samples."""
    pictures = [sample["images"][0].resize((96, 64)) for sample in make_samples(6, seed=9)]
    dataset = [
        video_sample(pictures[:4], pictures[4]),
        make_samples(1, seed=8)[0],
        video_sample(pictures[2:], pictures[0]),
    ]
    build(pair_of(family), tmp_path / "cache", dataset, batch_size=1)
    resident, cached = both(pair_of(family), tmp_path / "cache")
    batch = collator_of(pair_of(family))(dataset)
    visual = torch.cat([ask(resident, collator_of(pair_of(family))([sample])).visual for sample in dataset])
    left, right = ask(resident, batch), ask(cached, batch)
    difference, rounding = apart(resident, batch, left, right)["visual"]
    assert difference <= 2 * rounding and rounding < 1e-5
    assert (visual - left.visual).abs().max() > 0.1, "the order of the samples is another than the batch's"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_cached_teacher__loss_and_gradients__same_bits_as_resident(pair_of: Any, cache_of: Any, family: str) -> None:
    resident, cached = both(pair_of(family), cache_of(family))
    collate = collator_of(pair_of(family))
    batches = [collate([sample]) for sample in ROWS[:3]]
    found = []
    for teacher in (resident, cached, resident.model):
        student, processor = tiny(family)
        grace = GraceObjective()
        grace.prepare(student, teacher, vocabulary=len(processor.tokenizer), total_steps=10)
        grace.steps = 5
        grace.begin_step(batches)
        losses = [grace.compute_loss(student, batch) for batch in batches]
        torch.stack(losses).sum().backward()
        found.append((losses, [p.grad for p in student.parameters() if p.grad is not None], grace.reduce_metrics()))
    for losses, gradients, record in found[1:]:
        assert torch.equal(torch.stack(losses), torch.stack(found[0][0])) and record == found[0][2]
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][1], strict=True))
    assert found[0][2].gdkd > 0 and found[0][2].rcka > 0


@pytest.mark.slow
def test_train__cached_teacher__same_bytes_as_resident(llava: Pair, cache_of: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    resident = run(llava, tmp_path / "a", ROWS, **options)
    cached = run(llava, tmp_path / "b", ROWS, recipe=cached_recipe(llava, cache_of("llava")), **options)
    left, right = (done.checkpoint / "model.safetensors" for done in (resident, cached))
    assert left.read_bytes() == right.read_bytes()
    assert "kind: cached" in (cached.checkpoint / "recipe.yaml").read_text()


@pytest.mark.slow
def test_oneshot_and_session__cached_teacher__same_result(llava: Pair, cache_of: Any, tmp_path: Path) -> None:
    folder = cache_of("llava")
    done = grace_plugin.oneshot(
        str(llava.student), recipe=cached_recipe(llava, folder), dataset=ROWS, output_dir=tmp_path / "out", batch_size=3
    )
    assert done.verification["verified"]
    with pytest.raises(ValueError, match="1 of 7 samples are not in the teacher cache"):
        grace_plugin.oneshot(
            str(llava.student), recipe=cached_recipe(llava, folder), dataset=[*ROWS, *make_samples(1, seed=77)],
            output_dir=tmp_path / "no",
        )  # fmt: skip
    student = AutoModelForImageTextToText.from_pretrained(llava.student)
    with grace_plugin.grace_session(student, cached_recipe(llava, folder), total_steps=4) as grace:
        grace.objective.begin_step([collator_of(llava)(ROWS[:2])])
        grace.objective.compute_loss(student, collator_of(llava)(ROWS[:2])).backward()
        assert grace.objective.reduce_metrics().gdkd > 0


@pytest.mark.slow
def test_evaluation__batches_with_keys__accepted(llava: Pair, cache_of: Any, tmp_path: Path) -> None:
    student = AutoModelForImageTextToText.from_pretrained(llava.student)
    arguments = TrainingArguments(
        str(tmp_path / "run"), remove_unused_columns=False, label_names=["labels"], use_cpu=True, report_to="none",
        disable_tqdm=True, prediction_loss_only=True,
    )  # fmt: skip
    found = []
    with grace_plugin.grace_session(student, cached_recipe(llava, cache_of("llava")), total_steps=4) as grace:
        for keys in (False, True):
            collate = ConversationCollator(AutoProcessor.from_pretrained(llava.student), keys=keys)
            trainer = GraceTrainer(
                model=student,
                args=arguments,
                data_collator=collate,
                objective=grace.objective,
                scale_rate=1.0,
            )
            found.append(trainer.evaluate(ROWS[:3])["eval_loss"])
    assert found[0] == found[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_train__cached_teacher__only_the_head_file_read(tmp_path: Path, family: str) -> None:
    """One tensor a file, and every file but the head's is gone; Qwen2.5-VL's head is its embedding."""
    made = pair(family, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(made.teacher)
    (made.teacher / "model.safetensors").unlink()
    model.save_pretrained(made.teacher, max_shard_size="1KB")
    build(made, tmp_path / "cache", ROWS[:4])
    head = {"llava": "lm_head.weight", "qwen2_5_vl": "embed_tokens.weight"}[family]
    removed = 0
    for path in made.teacher.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            gone = not any(name.endswith(head) for name in file.keys())
        if gone:
            path.unlink()
            removed += 1
    assert removed > 60 and len(list(made.teacher.glob("model-*.safetensors"))) == 1
    with pytest.raises(ValueError, match="cannot load the teacher"):
        load_teacher(str(made.teacher))
    done = run(made, tmp_path / "out", ROWS[:4], recipe=cached_recipe(made, tmp_path / "cache"))
    assert done.verification["verified"]
    teacher = CachedTeacher(StateStore(tmp_path / "cache"), asked(made, tmp_path / "cache"))
    assert teacher.head_bytes == 400 * 512 * 4
    assert torch.equal(teacher.head()[0], model.get_output_embeddings().weight.float())


def refused(
    pair: Pair, folder: Path, match: str, dataset: Any = None, *, student: str = "/no/student", **options: Any
) -> None:
    """Refused before any model is loaded: the student named is not there, unless the samples have to be checked."""
    options = {"processor": AutoProcessor.from_pretrained(pair.student)} | options
    blocks = {key: options.pop(key) for key in ("teacher", "relational") if key in options}
    recipe = cached_recipe(pair, folder) if "teacher" not in blocks else recipe_text(None, **blocks)
    with pytest.raises(ValueError, match=match):
        run(pair, folder.parent / "out", dataset or ROWS, recipe=recipe, model=student, **options)
    assert not (folder.parent / "out").exists() and not (folder.parent / "out.run").exists()


@pytest.mark.slow
def test_train__cache_that_does_not_fit__refused_before_loading(llava: Pair, cache_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cache_of("llava"), tmp_path / "cache"))
    refused(llava, tmp_path / "none", r"no teacher cache at .*none; write it with `grace teacher cache RECIPE --model")
    other = tmp_path / "other"
    save(*tiny("llava", seed=5, hidden=512, layers=5, vocab_rows=400), other)
    block = asked(llava, folder, model=str(other)).model_dump()
    named = rf"written for the teacher '{llava.teacher}' and this run asks for '{other}'.*layer: 2 / 3"
    refused(llava, folder, named, teacher=block)
    retrained = Path(shutil.copytree(llava.teacher, tmp_path / "retrained"))
    weights = load_file(retrained / "model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in weights.items()}, retrained / "model.safetensors", {"format": "pt"}
    )
    block = asked(llava, folder, model=str(retrained)).model_dump()
    refused(llava, folder, r"\(cache / run\): model\.safetensors: '\w+' / '\w+'", teacher=block)
    block = asked(llava, folder, dtype="bfloat16").model_dump()
    refused(llava, folder, "dtype: 'float32' / 'bfloat16'", teacher=block)
    refused(llava, folder, "name.* as well", teacher=asked(llava, folder, model=None).model_dump())
    processor = AutoProcessor.from_pretrained(llava.student)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    refused(llava, folder, r"another processor .*image_processor\.image_mean: \[0\.48.* / \[0\.1", processor=processor)
    build(llava, tmp_path / "text", ROWS, visual=False)
    refused(llava, tmp_path / "text", "no states of visual tokens and the recipe's relational term reads them")
    run(llava, tmp_path / "fine", ROWS, recipe=cached_recipe(llava, tmp_path / "text", relational={"enabled": False}))


@pytest.mark.slow
def test_check_cached_samples__missing_sample__named(llava: Pair, cache_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cache_of("llava"), tmp_path / "cache"))
    new = {**make_samples(1, seed=50)[0], "id": "new-one"}
    student = str(llava.student)
    refused(
        llava, folder, rf"1 of 7 samples are not in the teacher cache {folder}: sample 'new-one'; write them with `grace",
        [*ROWS, new], student=student,
    )  # fmt: skip
    changed = {**ROWS[0], "images": [ROWS[0]["images"][0].rotate(180)]}
    refused(llava, folder, r"1 of 6 samples are not in .*: sample 5; write", [*ROWS[1:], changed], student=student)

    drawn = type("Drawn", (), {"__len__": lambda self: 6, "__getitem__": lambda self, number: ROWS[number]})()
    refused(llava, folder, "made as they are read", drawn, student=student)


def test_cached_teacher__batch_without_keys_or_states__refused(llava: Pair, cache_of: Any, tmp_path: Path) -> None:
    teacher = both(llava, cache_of("llava"))[1]
    batch = collator_of(llava)(ROWS[:2])
    with pytest.raises(ValueError, match=r"no sample_key; collate it with .*keys=True"):
        ask(teacher, {key: value for key, value in batch.items() if key != "sample_key"})
    with pytest.raises(ValueError, match="the sample with key 00 is not in the teacher cache"):
        ask(teacher, batch | {"sample_key": [batch["sample_key"][0], "00"]})
    labels = batch["labels"].clone()
    labels[0, labels[0].ne(-100).nonzero()[0]] = -100
    with pytest.raises(ValueError, match=r"supervised positions and the teacher cache .* holds \d+ for its samples"):
        ask(teacher, batch | {"labels": labels})
    positions = supervised_positions(batch["labels"])
    found = family_of(teacher).visual_tokens(teacher.config, batch)
    with pytest.raises(ValueError, match=r"visual tokens and the teacher cache"):
        teacher.states(batch, positions, VisualTokens(found.index[1:], found.sizes))


def test_open_teacher__cached_with_a_loaded_teacher__refused(llava: Pair, cache_of: Any, tmp_path: Path) -> None:
    loaded = load_teacher(str(llava.teacher), dtype="float32")
    with pytest.raises(ValueError, match="cached does not use the teacher that was passed"):
        run(llava, tmp_path / "out", ROWS, recipe=cached_recipe(llava, cache_of("llava")), teacher=loaded)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return reading._concatenate([parts], torch.device("cpu"))[0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_concatenate__forked_process__own_threads() -> None:
    parts = [torch.randn(samples, 1024).bfloat16() for samples in (700, 0, 1, 300)]
    assert sum(part.nbytes for part in parts) > reading._THREADED_BYTES
    assert torch.equal(_joined(parts), torch.cat(parts))
    child = multiprocessing.get_context("fork").Process(target=_joined, args=(parts,))
    child.start()
    child.join(60)
    assert child.exitcode == 0, "it waited for threads that only its parent has"
    small = [part[:5] for part in parts]
    assert torch.equal(_joined(small), torch.cat(small))
