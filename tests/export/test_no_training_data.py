"""Nothing of the training data is in a finished checkpoint: neither pixels nor tokens nor texts, in any file of the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

import grace_plugin
from grace_plugin.data import ConversationCollator
from grace_plugin.export import VerificationError
from grace_plugin.export.plan import rehearse_save
from grace_plugin.export.probe import make_probe, probe_logits, read_probe, write_probe
from grace_plugin.export.record import PROBE, RECORD
from tests.conftest import Finished
from tests.pairs import Pair, loaded, modifier_of, recipe_text, run
from tests.tiny import EVERY, build, make_samples

WINDOW = 48
"""Bytes of each piece that is searched for; pieces of fewer than 4 different bytes (plain areas) say nothing."""


def pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content) - WINDOW + 1, WINDOW):
        piece = content[start : start + WINDOW]
        if len(set(piece)) >= 4:
            yield piece


def texts(samples: list[dict[str, Any]]) -> set[str]:
    return {part["text"] for s in samples for m in s["messages"] for part in m["content"] if part["type"] == "text"}


def traces(samples: list[dict[str, Any]], processor: Any) -> dict[str, set[bytes]]:
    """What would give the samples away, by kind: raw and processed pixels, token ids in three widths, texts."""
    found: dict[str, set[bytes]] = {"pixels": set(), "processed": set(), "ids": set(), "text": set()}
    collate = ConversationCollator(processor)
    for sample in samples:
        batch = collate([sample])
        for image in sample["images"]:
            found["pixels"] |= set(pieces(image.tobytes()))
        if "pixel_values" in batch:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                values = batch["pixel_values"].to(dtype).contiguous().view(torch.uint8)
                found["processed"] |= set(pieces(values.numpy().tobytes()))
    for text in texts(samples):
        ids = torch.tensor(processor.tokenizer(text)["input_ids"][:8])
        if len(ids) == 8:
            found["ids"] |= {ids.to(d).numpy().tobytes() for d in (torch.int64, torch.int32, torch.int16)}
        found["text"].add(text.encode())
    return found


def kinds_found(folder: Path, wanted: dict[str, set[bytes]]) -> set[str]:
    """Kinds of traces that any file of the folder holds."""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {kind for kind, some in wanted.items() if any(piece in content for piece in some for content in contents)}


@pytest.mark.slow
def test_checkpoint__every_file__holds_no_training_data(finished: Finished, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(finished.folder)
    wanted = traces(finished.dataset, processor)
    assert all(len(some) > 2 for some in wanted.values())
    assert kinds_found(finished.folder, wanted) == set()
    leaking = Path(
        shutil.copytree(finished.folder, tmp_path / "leaking")
    )  # the search finds what earlier runs published
    batch = ConversationCollator(processor)(finished.dataset[:1])
    write_probe(leaking / PROBE, {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}, torch.zeros(1))
    (leaking / "notes.txt").write_text(next(iter(texts(finished.dataset))))
    (leaking / "raw").write_bytes(finished.dataset[0]["images"][0].tobytes())
    assert kinds_found(leaking, wanted) == {"pixels", "processed", "ids", "text"}


@pytest.mark.parametrize("family", EVERY)
def test_make_probe__synthetic__same_each_time_and_finite(family: str) -> None:
    model, processor = build(family)
    before = torch.random.get_rng_state()
    made, again = make_probe(model, processor), make_probe(model, processor)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert made.kind == "synthetic image" and "pixel_values" in made.batch
    assert all(torch.equal(made.batch[key], again.batch[key]) for key in made.batch)
    assert probe_logits(model, made.batch).isfinite().all()
    assert made.batch["pixel_values"].float().std() > 0.1  # noise, not a plain area
    text = make_probe(model, None)
    assert text.kind == "synthetic text" and "pixel_values" not in text.batch
    assert probe_logits(model, text.batch).isfinite().all()


@pytest.mark.slow
def test_make_probe__given_samples__verified_on(llava: Pair, tmp_path: Path) -> None:
    own = make_samples(1, seed=77)
    result = run(llava, tmp_path / "out", probe=own, max_steps=1)
    kept, _ = read_probe(result.checkpoint / PROBE)
    expected = ConversationCollator(AutoProcessor.from_pretrained(llava.student))(own)
    assert all(torch.equal(kept[key], expected[key]) for key in kept) and "pixel_values" in kept
    assert result.verification["probe"] == "given"
    assert grace_plugin.verify(result.checkpoint)["logits_equal"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ([], "probe= takes a list of samples or a collated batch with input_ids, got list with 0 samples"),
        ("photo.png", "got str with 0 samples"),
        ([{"messages": []}], "messages"),
    ],
)
def test_make_probe__unusable__refused_before_the_first_step(
    llava: Pair, tmp_path: Path, probe: Any, message: str
) -> None:
    student = loaded(llava)
    with pytest.raises(ValueError, match=message):
        run(llava, tmp_path / "out", model=student, probe=probe)
    assert not (tmp_path / "out").exists()


def test_make_probe__no_processor__token_ids_and_a_warning(
    llava: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = loaded(llava)
    student.config._name_or_path = student.name_or_path = str(tmp_path)
    plan = rehearse_save(student, modifier_of(recipe_text(llava.teacher)))
    assert plan.probe.kind == "synthetic text"
    assert "verified on seeded token ids without an image, pass processor=" in caplog.text


@pytest.mark.slow
def test_session__first_batch_of_nan__saved_and_verified(llava: Pair, tmp_path: Path) -> None:
    """The step is skipped, and the probe is no training batch, so the final check has finite logits."""
    processor = AutoProcessor.from_pretrained(llava.student)
    batches = [ConversationCollator(processor)(make_samples(2, seed=seed)) for seed in (1, 2)]
    batches[0]["pixel_values"].fill_(float("nan"))
    student = loaded(llava).train()
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=2) as grace:
        optimizer = torch.optim.SGD(grace.parameter_groups(1e-3))
        finite = []
        for batch in batches:
            grace.objective.begin_step([batch])
            grace.objective.compute_loss(student, batch).backward()
            finite.append(grace.objective.reduce_metrics().finite)
            if finite[-1]:
                optimizer.step()
            grace.objective.end_step(skipped=not finite[-1])
            optimizer.zero_grad()
        found = grace.save(tmp_path / "out")
    assert finite == [False, True]
    assert found["verified"] and found["logits_equal"]
    assert json.loads((tmp_path / "out" / RECORD).read_text())["probe"] == "synthetic image"
    kept = load_file(tmp_path / "out" / PROBE)
    assert all(value.float().isfinite().all() for value in kept.values())


@pytest.mark.slow
def test_save__weights_not_finite__named_and_nothing_written(llava: Pair, tmp_path: Path) -> None:
    student = loaded(llava).train()
    batch = ConversationCollator(AutoProcessor.from_pretrained(llava.student))(make_samples(1))
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=1) as grace:
        grace.objective.begin_step([batch])
        grace.objective.compute_loss(student, batch).backward()
        grace.objective.reduce_metrics()
        grace.objective.end_step()
        student.model.language_model.norm.weight.data[0] = float("nan")
        with pytest.raises(
            VerificationError,
            match=r"nothing was written: the logits on the probe \(synthetic image\) are not finite; these weights hold NaN or "
            r"Inf: model\.language_model\.norm\.weight",
        ):
            grace.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
