"""Of how many runs of the image's token each picture and video of a batch is made, where frames are written as images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["visual_spans"]


def visual_spans(pieces: Sequence[Any], placeholders: Mapping[str, str]) -> list[int]:
    """1 for an image and the number of frames for a video, in the order of the text.

    Args:
        pieces: of all samples, in order, each with its text and the `Video`s in it.
        placeholders: what the chat template writes for an image and for a video.
    """
    pattern = re.compile("|".join(re.escape(text) for text in placeholders.values() if text))
    found = []
    for piece in pieces:
        frames = iter([len(video.frames) for video in piece.videos])
        found += [next(frames) if m.group() == placeholders["video"] else 1 for m in pattern.finditer(piece.text)]
    return found
