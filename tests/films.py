"""Short videos for the families that take them, as a decoder hands them over."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.tiny_text import rows

__all__ = ["films", "pictures"]


def films(count: int, frames: int = 4) -> list[dict[str, Any]]:
    """Questions with one video each: {"messages", "images": [], "videos": [(uint8 [frames, 64, 96, 3], metadata)]}."""
    asked = []
    for seed in range(count):
        shown = [row["images"][0].resize((96, 64)) for row in rows(2, seed=60 + seed)]
        video = np.stack([np.asarray(shown[i // ((frames + 1) // 2)]) for i in range(frames)])
        metadata = {
            "fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames)),
            "video_backend": "opencv", "do_sample_frames": False,
        }  # fmt: skip
        content = [{"type": "video"}, {"type": "text", "text": "what is the shape and what is its colour?"}]
        asked.append({"messages": [{"role": "user", "content": content}], "images": [], "videos": [(video, metadata)]})
    return asked


def pictures(question: dict[str, Any]) -> dict[str, Any]:
    """What a processor is given of a question: its images (one list for one text), or its videos frame by frame."""
    if question.get("videos"):
        known = [{k: v for k, v in said.items() if k != "do_sample_frames"} for _, said in question["videos"]]
        films_only = [frames for frames, _ in question["videos"]]
        return {"videos": films_only, "video_metadata": known, "do_sample_frames": False}
    return {"images": [question["images"]]} if question["images"] else {}
