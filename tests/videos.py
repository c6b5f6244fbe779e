"""Short videos for the families that take them, as a decoder hands them over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_text import make_samples

__all__ = ["media_of", "video_samples", "write_sound", "write_video"]


def video_samples(count: int, frames: int = 4) -> list[dict[str, Any]]:
    """Questions with one video each: {"messages", "images": [], "videos": [(uint8 [frames, 64, 96, 3], metadata)]}."""
    asked = []
    for seed in range(count):
        shown = [sample["images"][0].resize((96, 64)) for sample in make_samples(2, seed=60 + seed)]
        video = np.stack([np.asarray(shown[i // ((frames + 1) // 2)]) for i in range(frames)])
        metadata = {
            "fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames)),
            "video_backend": "opencv", "do_sample_frames": False,
        }  # fmt: skip
        content = [{"type": "video"}, {"type": "text", "text": "what is the shape and what is its colour?"}]
        asked.append({"messages": [{"role": "user", "content": content}], "images": [], "videos": [(video, metadata)]})
    return asked


def media_of(question: dict[str, Any]) -> dict[str, Any]:
    """What a processor is given of a question: its images (one list for one text), or its videos frame by frame."""
    if question.get("videos"):
        known = [{k: v for k, v in said.items() if k != "do_sample_frames"} for _, said in question["videos"]]
        videos_only = [frames for frames, _ in question["videos"]]
        return {"videos": videos_only, "video_metadata": known, "do_sample_frames": False}
    return {"images": [question["images"]]} if question["images"] else {}


def write_video(
    path: Path, *, frames: int = 48, rate: int = 24, size: tuple[int, int] = (96, 64), codec: str = "libx264", turn: int = 0,
    **options: str,
) -> np.ndarray:  # fmt: skip
    """A video file written with PyAV; returns its frames as drawn, uint8 [frames, height, width, 3].

    Frame n is noise around the grey level 5 * n, with a red left half; the right half's mean tells which frame it is.
    turn: degrees counter-clockwise that the file asks a player to turn it. options: of the container.
    """
    import av

    width, height = size
    noise = np.random.default_rng(0).integers(-10, 11, (height, width, 3))
    drawn = np.stack([np.clip(noise + 5 * (n % 50), 0, 255) for n in range(frames)]).astype(np.uint8)
    drawn[:, :, : width // 2] = (220, 30, 30)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for image in drawn:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return drawn


def write_sound(path: Path) -> None:
    """A file with half a second of silence and no image."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, 8192, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
