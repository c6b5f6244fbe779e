"""Samples with a video, an image, both or neither train together for every family that takes videos, and are counted so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_plugin.data import load_samples
from grace_plugin.vlm import family_of
from tests.pairs import pair, run
from tests.tiny import EVERY, build, make_samples
from tests.videos import video_samples, write_video

TAKES_VIDEOS = tuple(name for name in EVERY if family_of(model := build(name)[0]).takes_videos(model.config))
FILMS, PICTURES, TEXTS, CLIPS = 6, 3, 3, 4
ANSWER = {"role": "assistant", "content": "a red square"}


def written(folder: Path) -> Path:
    """Videos as frames on disk, of two, four or six frames; one sample has a picture beside its video."""
    (folder / "frames").mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for number, picture in enumerate(sample["images"][0] for sample in make_samples(8, seed=31)):
        picture.resize((96, 64)).save(folder / "frames" / f"{number}.png")
    for number, film in enumerate(video_samples(FILMS)):
        frames = [f"frames/{(number + k) % 8}.png" for k in range(2 + 2 * (number % 3))]
        lines.append({"id": f"film {number}", "messages": [*film["messages"], ANSWER], "videos": [frames], "fps": 2.0})
    lines[0]["messages"][0] = {"role": "user", "content": [{"type": "image"}, *lines[0]["messages"][0]["content"]]}
    lines[0]["images"] = ["frames/1.png"]
    for number in range(PICTURES):
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the shape?"}]}
        lines.append({"messages": [asked, ANSWER], "images": [f"frames/{number}.png"]})
    lines += [{"messages": [{"role": "user", "content": f"say {n}"}, ANSWER]} for n in range(TEXTS)]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "samples.jsonl"


STACKED = ("llava_onevision", "internvl")
"""Families whose processor takes videos of one length in a batch."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", TAKES_VIDEOS)
def test_videos_train_beside_images_and_text(name: str, tmp_path: Path) -> None:
    made, given = pair(name, tmp_path), load_samples(str(written(tmp_path / "set")))
    options: dict[str, Any] = {"max_steps": 9, "logging_steps": 1, "dataloader_num_workers": 1}
    batch = {"per_device_train_batch_size": 4}
    if name in STACKED:
        with pytest.raises(
            ValueError, match=r"videos of different length into one batch .*per_device_train_batch_size=1"
        ):
            run(made, tmp_path / "refused", given, **options, **batch)
        assert not (tmp_path / "refused").exists()
        batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trained = run(made, tmp_path / "out", given, **options, **batch)
    count = FILMS + PICTURES + TEXTS
    assert trained.data["usable"] == trained.data["samples"] == count
    assert trained.data["images_and_videos"] == FILMS + PICTURES + 1
    assert trained.data["samples_without_images"] == TEXTS
    logs = [log for log in trained.history if "loss_rcka" in log]
    epochs = 9 * 4 // count
    assert sum(log["images"] for log in logs) == epochs * (
        FILMS + PICTURES + 1
    )  # each an equal part of the relational term
    assert sum(log["images_skipped"] for log in logs) == 0
    assert sum(log["samples_without_images"] for log in logs) == epochs * TEXTS
    assert sum(log["loss_ce"] for log in logs[-3:]) < 0.9 * sum(log["loss_ce"] for log in logs[:3])
    assert trained.verification["verified"]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_video_files_train_in_both_formats(name: str, tmp_path: Path) -> None:
    """Two clips of different frame rate, at two frames a second: each becomes four frames."""
    for number, rate in enumerate((24, 10)):
        write_video(tmp_path / f"{number}.mp4", frames=2 * rate, rate=rate)
    ask = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what is it?"}]}
    said = {"from": "gpt", "value": "a red square"}
    lines: list[dict[str, Any]] = [
        {"messages": [ask, ANSWER], "videos": [f"{n % 2}.mp4"]} if n < CLIPS // 2
        else {"video": f"{n % 2}.mp4", "conversations": [{"from": "human", "value": "<video>\nwhat is it?"}, said]}
        for n in range(CLIPS)
    ]  # fmt: skip
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "dataloader_num_workers": 1}
    trained = run(pair(name, tmp_path), tmp_path / "out", load_samples(str(tmp_path / "samples.jsonl")), **options)
    assert trained.data["usable"] == trained.data["images_and_videos"] == CLIPS
    logs = [log for log in trained.history if "loss_rcka" in log]
    assert [log["images"] for log in logs] == [2] * 6
    assert logs[-1]["loss_ce"] < 0.9 * logs[0]["loss_ce"]
    assert trained.verification["verified"]
