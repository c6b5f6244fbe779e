"""A mixed set of 2,000 samples, one in twenty broken, trains for 50 steps on each family; the report counts every sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grace_plugin.data import BadSamplesError, ConversationCollator, epoch_order, load_samples, prepare, stream_samples
from tests.mixed_files import Mixed, write_mixed
from tests.pairs import Pair, pair, run
from tests.tiny import FAMILIES, build, make_samples

ROWS, STEPS, VIDEOS, BATCH, SEED = 2000, 50, 40, 4, 1


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return write_mixed(tmp_path_factory.mktemp("mixed") / "set", ROWS, videos=VIDEOS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_set_trains_and_every_sample_is_accounted_for(family: str, mixed: Mixed, tmp_path: Path) -> None:
    trained = run(
        pair(family, tmp_path), tmp_path / "out", load_samples(str(mixed.mix)), max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        max_bad_samples=0.08, dataloader_num_workers=1, logging_steps=1, seed=SEED,
    )  # fmt: skip
    expected = dict(mixed.reasons) | ({"video_unsupported": VIDEOS} if family == "llava" else {})
    report = json.loads((tmp_path / "out.run" / "data_report.json").read_text())
    assert report == trained.data
    assert report["rejected"] == expected
    assert report["samples"] == ROWS
    assert report["usable"] == ROWS - sum(expected.values()) == report["samples_per_epoch"]
    listed = (tmp_path / "out.run" / "data_rejected.jsonl").read_text().splitlines()
    assert len(listed) == sum(expected.values())
    losses = [log["loss"] for log in trained.history if "loss" in log]
    assert len(losses) == STEPS
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    collator = ConversationCollator(build(family)[1])
    kept = prepare(load_samples(str(mixed.mix)), collator, max_bad_samples=0.08)
    seen = epoch_order(len(kept), SEED, 0, lengths=kept.lengths, batch_size=BATCH)[: STEPS * BATCH]
    assert sum(log.get("images", 0) for log in trained.history) == sum(
        kept.entries[kept.numbers[n]].media for n in seen
    )
    trained_on = {kind: sum(kind in kept[n] for n in seen) for kind in ("conversations", "messages")}
    videos = [
        kept[n].get("video") or kept[n]["videos"][0] for n in seen if kept[n].get("video") or kept[n].get("videos")
    ]
    assert {isinstance(video, str) for video in videos} == {
        True,
        False,
    } or family == "llava"  # files, and lists of frames
    assert min(trained_on["conversations"], trained_on["messages"], sum(not kept[n].get("images") for n in seen)) > 20
    assert trained.verification


def test_a_run_with_too_many_broken_samples_stops_before_training(mixed: Mixed, tmp_path: Path) -> None:
    with pytest.raises(
        BadSamplesError, match=r"140 of 2000 samples cannot be used, 7\.0%, above max_bad_samples = 5\.0%"
    ):
        run(pair("llava", tmp_path), tmp_path / "out", load_samples(str(mixed.mix)))
    assert not (tmp_path / "out").exists()
    assert {file.name for file in (tmp_path / "out.run").iterdir()} == {"data_report.json", "data_rejected.jsonl"}


def test_a_set_without_images_trains_and_says_that_the_relation_is_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = run(pair("llava", tmp_path), tmp_path / "out", make_samples(8, images=0), logging_steps=1)
    assert "no sample has an image or a video: the relational term is absent" in caplog.text
    assert trained.data["images_and_videos"] == 0
    logs = [log for log in trained.history if "loss_rcka" in log]
    assert [(log["images"], log["loss_rcka"]) for log in logs] == [(0, 0.0), (0, 0.0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_trains_and_counts_what_it_drops(workers: int, tmp_path: Path) -> None:
    small: Pair = pair("llava", tmp_path)
    write_mixed(tmp_path / "set", 120, broken=0.1, videos=0)
    folder = tmp_path / "set"
    lines = [json.loads(line) for line in (folder / "messages.jsonl").read_text().splitlines()]
    lines[5]["images"] = ["pictures/none.png"]
    (folder / "messages.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stream = stream_samples(str(folder / "messages.jsonl"))
    with pytest.raises(ValueError, match=r"the dataset has no length; pass max_steps="):
        run(small, tmp_path / "none", stream, max_steps=-1)
    trained = run(small, tmp_path / "out", stream, max_steps=20, dataloader_num_workers=workers)
    assert trained.data["rejected"]["missing_file"] >= 1
    assert trained.data["samples"] == trained.data["usable"] + trained.data["rejected"]["missing_file"]
    assert trained.data["usable"] >= 40
    listed = [json.loads(line) for line in (tmp_path / "out.run" / "data_rejected.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in listed} == {"missing_file"}
    with pytest.raises(
        BadSamplesError, match=r"1 of the stream's first 45 samples cannot be used, above max_bad_samples = 1\.0%"
    ):
        run(small, tmp_path / "strict", stream, max_steps=2, max_bad_samples=0.01)
