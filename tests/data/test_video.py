"""Video files written here with PyAV: sampled in time, upright, whole or refused, and counted by reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_plugin.data import ConversationCollator, SampleError, load_samples, prepare
from grace_plugin.data.video import decode_video
from tests.tiny import build
from tests.videos import write_sound, write_video

pytest.importorskip("av")


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `write_video` these are, read off the grey of their right half."""
    return [round(float(frame[:, frame.shape[1] // 2 + 4 :].mean()) / 5) for frame in frames]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mp4", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")],
)
def test_decode_video__file__frames_sampled_in_time(name: str, codec: str, tmp_path: Path) -> None:
    drawn = write_video(tmp_path / name, codec=codec)
    found = decode_video(tmp_path / name, "r", fps=2.0)
    assert (found.indices, found.total, found.fps) == ((0, 12, 24, 36), 48, 24.0)
    assert numbers(found.frames) == [0, 12, 24, 36]
    assert found.frames.shape == (4, 64, 96, 3)
    assert np.abs(found.frames[:, 8:-8, 8:40].astype(int) - drawn[[0, 12, 24, 36], 8:-8, 8:40]).max() < 40


@pytest.mark.parametrize(
    ("fps", "expected"), [(0.1, [0]), (5.0, [0, 5, 10, 15, 20]), (24.0, [*range(24)]), (99.0, [*range(24)])]
)
def test_decode_video__fps_below_above_between__frames_by_hand(fps: float, expected: list[int], tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=24)
    assert list(decode_video(str(tmp_path / "a.mp4"), "r", fps=fps).indices) == expected


def test_decode_video__one_frame_or_bytes__read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=1)
    found = decode_video({"bytes": (tmp_path / "a.mp4").read_bytes(), "path": "gone.mp4"}, "r")
    assert (found.indices, found.total) == ((0,), 1)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_decode_video__display_matrix__upright(turn: int, tmp_path: Path) -> None:
    """The oracle: where the red half lies after turning the image counter-clockwise."""
    write_video(tmp_path / "a.mp4", frames=2, turn=turn)
    frame = decode_video(tmp_path / "a.mp4", "r").frames[0].astype(int)
    height, width = frame.shape[:2]
    assert (height, width) == ((64, 96) if turn == 180 else (96, 64))
    red = frame[..., 0] - frame[..., 1] > 100
    share = {
        "left": red[:, : width // 2],
        "right": red[:, width // 2 :],
        "top": red[: height // 2],
        "bottom": red[height // 2 :],
    }
    side = {90: "bottom", 180: "right", -90: "top"}[turn]
    assert share[side].mean() > 0.95
    assert red.mean() < 0.55


def reason(path: Any, **limits: Any) -> tuple[str, str]:
    with pytest.raises(SampleError) as caught:
        decode_video(path, "sample 7", **limits)
    assert str(caught.value).startswith("sample 7: ")
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.7, 0.9])
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])
def test_decode_video__truncated_mp4__refused(share: float, options: dict[str, str], tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", **options)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: int(len(whole) * share)])
    assert reason(tmp_path / "a.mp4")[0] == "unreadable_video"


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")])
def test_decode_video__other_truncated_files__refused_half_a_second_before_the_end(
    name: str, codec: str, tmp_path: Path
) -> None:
    write_video(tmp_path / name, codec=codec)
    whole = (tmp_path / name).read_bytes()
    for share in (0.3, 0.6):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        assert reason(tmp_path / name)[0] == "unreadable_video"


def test_decode_video__sound_text_folders__refused(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.mp4")
    assert reason(tmp_path / "a.mp4") == (
        "unreadable_video",
        f"sample 7: cannot read video '{tmp_path}/a.mp4': it has no video track (1 of other kinds)",
    )
    (tmp_path / "b.mp4").write_bytes(b"no video")
    assert reason(tmp_path / "b.mp4")[0] == "unreadable_video"
    assert reason(tmp_path)[0] == reason(tmp_path / "none.mp4")[0] == "missing_file"
    write_video(tmp_path / "c.mp4", frames=1)
    assert reason(tmp_path / "c.mp4", fps=-1.0)[0] == "malformed"


def test_decode_video__playlist__opens_no_address(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    assert reason(tmp_path / "a.mp4")[0] == "unreadable_video"


def test_decode_video__pixel_limit__for_one_frame_and_for_all(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=24)
    assert decode_video(tmp_path / "a.mp4", "r", 6144).total == 24
    kind, text = reason(tmp_path / "a.mp4", max_pixels=6143)
    assert kind == "image_too_large"
    assert "frames of 96 x 64 = 6,144 pixels" in text
    assert len(decode_video(tmp_path / "a.mp4", "r", 6144, fps=16.0).frames) == 16
    kind, text = reason(tmp_path / "a.mp4", max_pixels=6144, fps=24.0)
    assert (kind, "17 of them kept" in text, "98,304 together" in text) == ("image_too_large", True, True)


def written(folder: Path) -> Path:
    """Eight usable samples in both formats and eight that are not, two of each kind of error."""
    write_video(folder / "clip.mp4")
    write_video(folder / "big.mp4", frames=2, size=(640, 480))
    write_sound(folder / "sound.mp4")
    whole = (folder / "clip.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    lines: list[dict[str, Any]] = []
    for name in ("clip", "clip", "clip", "clip", "cut", "empty", "sound", "big", "none"):
        ask = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "red"}]
        lines.append({"video": f"{name}.mp4", "conversations": ask})
        content = [{"type": "video"}, {"type": "text", "text": "what?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
        lines.append({"messages": turns, "videos": [f"{name}.mp4"], "fps": 4.0})
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "samples.jsonl"


EXPECTED = {"unreadable_video": 6, "image_too_large": 2, "missing_file": 2}


def test_prepare__video_files__used_or_counted_by_reason(tmp_path: Path) -> None:
    collator = ConversationCollator(build("qwen3_vl")[1], max_pixels=200_000)
    given = load_samples(str(written(tmp_path)))
    found = prepare(given, collator, max_bad_samples=1.0, workers=1, cache=tmp_path / "cache")
    assert found.report["rejected"] == EXPECTED
    assert found.numbers.tolist() == [*range(8)]
    for number in (0, 1):  # 4 frames at 2 a second, 8 at 4 a second: LLaVA's sample and the messages sample
        batch = collator([given[number]])
        assert batch["video_grid_thw"][0, 0] == (2, 4)[number]
        assert batch["input_ids"].shape[1] == found.lengths[number]


def test_collate__qwen25_video_seconds__those_of_the_file(tmp_path: Path) -> None:
    """Two frames make a grid step: at 4 frames a second it lasts half a second, whatever the file's own rate."""
    batch = ConversationCollator(build("qwen2_5_vl")[1])([load_samples(str(written(tmp_path)))[1]])
    assert [float(seconds) for seconds in batch["second_per_grid_ts"]] == [0.5]


def test_undecoded__video_column__left_as_bytes(tmp_path: Path) -> None:
    import datasets

    write_video(tmp_path / "clip.mp4")
    content = [{"type": "video"}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    video = {"bytes": (tmp_path / "clip.mp4").read_bytes(), "path": None}
    given = datasets.Dataset.from_list([{"messages": turns, "videos": [video]}])
    given = given.cast_column("videos", datasets.List(datasets.Video(decode=False)))
    given.cast_column("videos", datasets.List(datasets.Video())).to_parquet(str(tmp_path / "samples.parquet"))
    found = prepare(
        load_samples(str(tmp_path / "samples.parquet")),
        ConversationCollator(build("qwen3_vl")[1]),
        cache=tmp_path / "cache",
    )
    assert found.report["usable"] == 1


WITHOUT = """
import sys
from grace_plugin.data import ConversationCollator, load_samples, prepare
from grace_plugin.data.video import DecoderMissingError
from tests.tiny import build, make_samples

collator = ConversationCollator(build("qwen3_vl")[1])
for workers in (0, 1):
    try:
        prepare(load_samples(sys.argv[1]), collator, max_bad_samples=1.0, workers=workers)
    except DecoderMissingError as error:
        print(error)
print(prepare(make_samples(2), collator).report["usable"])
"""


@pytest.mark.slow
def test_video__no_pyav__run_stops_and_says_how_to_install_it(tmp_path: Path) -> None:
    """In a process whose `av` cannot be imported."""
    path, cache = written(tmp_path), tmp_path / "cache"
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "av.py").write_text("raise ModuleNotFoundError('no av')")
    places = os.pathsep.join([str(tmp_path / "none"), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": places, "GRACE_CACHE": str(cache)},
    )
    *said, usable = [line for line in done.stdout.splitlines() if line.startswith("sample") or line == "2"]
    assert len(said) == 2 and usable == "2"
    for line in said:
        assert re.match(r"sample 0: video '.*clip\.mp4' is a file and PyAV.*pip install grace-plugin\[video\]", line)
    assert not any(
        file.read_text() for file in cache.glob("*.jsonl")
    )  # nothing is remembered of samples that nobody could read
