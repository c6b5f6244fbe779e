"""A sample: a conversation with its images and videos, in one form whatever format it came in.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "..."}]}],
     "images": [PIL.Image | path | {"bytes": ..., "path": ...}], "videos": [[frame, ...] | path | {"bytes": ...}], "fps": 2.0}

Other formats are translated first (`formats.py`). The k-th image placeholder of the conversation takes the k-th image, and so
for videos. A placeholder is a content part; a part may hold its image itself (`parts.py`). Where the content of a user turn
is a plain string and the sample has the field `images`, the tags `<image>` in it are placeholders, in order; where no string
has a tag, the sample's images are put before the text of the first user turn, as TRL puts them. In a sample without that field
a tag is text; where the field is there and empty, a tag is a placeholder without its image. So it is for `videos` and
`<video>`, but for the place of videos without a tag, which is not guessed.

Only assistant turns are supervised from, and of those not the ones that say `train: false` or `weight: 0` (`turns.py`). Which
fields a sample may have is in `schema.py`. Refused with the sample named and the reason to count it by (`errors.REASONS`):
placeholders and images that do not match in number, unknown roles, turns out of order, empty turns, invalid Unicode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grace_plugin.data.errors import SampleError, malformed, raise_unreadable
from grace_plugin.data.formats import to_messages
from grace_plugin.data.media import DEFAULT_MAX_PIXELS, decode_image
from grace_plugin.data.parts import BOUNDS, media_value
from grace_plugin.data.schema import is_empty
from grace_plugin.data.shown import shown
from grace_plugin.data.turns import check_order, read_tools, read_turn
from grace_plugin.data.video import Video, decode_video

__all__ = ["Sample", "check_sample", "check_samples", "read_sample", "sample_name"]

KINDS = ("image", "video")
_BOXES = ("<bbox>", "<ref-object>")
_HELD = re.compile(r"<img>[^<>]+</img>", re.IGNORECASE)  # a path in the text
_MARKS = re.compile(r"<\|?(?:[a-z]{1,9}_){0,2}(?:image|img)(?:_[a-z]{1,9})?[ _-]?\d{0,3}\|?>|\[img\]", re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """A checked sample: `messages` with content as lists of parts, `images` and `videos` in placeholder order, `name` to say.

    tools: what the assistant may call. unused: names of fields that nothing reads.
    """

    name: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[Any, ...]
    videos: tuple[Any, ...] = ()
    fps: float = 2.0
    tools: tuple[dict[str, Any], ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def bounds(self) -> list[dict[str, int]]:
        """What each image's part says of its size in pixels; empty for most."""
        parts = [part for message in self.messages for part in message["content"] if part["type"] == "image"]
        return [{key: part[key] for key in BOUNDS if key in part} for part in parts]

    def as_sample(self) -> dict[str, Any]:
        """Return the sample in the form that `check_sample` gives back unchanged."""
        return {
            "id": self.name.removeprefix("sample "),
            "messages": list(self.messages),
            "images": list(self.images),
            "videos": list(self.videos),
            "fps": self.fps,
            "tools": list(self.tools),
        }


def sample_name(sample: Any, number: int | None = None) -> str:
    """Return how messages speak of a sample: by its id or name, its number, or its beginning."""
    sample = sample if isinstance(sample, Mapping) else {"messages": sample}
    for key in ("id", "name"):
        if sample.get(key) is not None:
            return f"sample {shown(sample[key])}"
    return f"the sample {shown(sample.get('messages'))}" if number is None else f"sample {number}"


def _listed(sample: Mapping[str, Any], kind: str, name: str) -> list[Any] | None:
    """Return the sample's own list of images or videos; None when it has no such field."""
    many, one = sample.get(f"{kind}s"), sample.get(kind)
    if isinstance(one, str) and not one:
        one = None
    if many is not None and (isinstance(many, (str, bytes, Mapping)) or not hasattr(many, "__iter__")):
        raise malformed(f"{name}: {kind}s is a {type(many).__name__}; give a list")
    if one is not None and not is_empty(many):
        raise malformed(f"{name} has {kind} and {kind}s; give one of them")
    # a column that is there and empty makes tags placeholders as well, so that a lost image is found
    if one is None:
        if many is None:
            return [] if kind in sample or f"{kind}s" in sample else None
        return [media_value(value) for value in many if value is not None]
    several = kind == "image" and isinstance(one, (list, tuple))
    return [media_value(value) for value in (one if several else [one])]


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two values are one image or video: the same path, bytes, pixels or frames."""
    if one is other:
        return True
    # numpy arrays compare element by element, tensors too
    equal = one == other  # of PIL images: their pixels
    return equal if isinstance(equal, bool) else bool(np.all(equal))


def _attached(kind: str, listed: list[Any] | None, inline: list[Any], name: str) -> tuple[Any, ...]:
    """Return the sample's images or videos, one for each placeholder; `inline` has None for a part that holds none itself."""
    given, bare = listed or [], sum(value is None for value in inline)
    if given and inline and not bare:
        if len(given) == len(inline) and all(map(_is_same, given, inline)):
            return tuple(inline)
        raise SampleError(
            "placeholder_mismatch",
            f"{name} holds {len(inline)} {kind}(s) in its content and {len(given)} other(s) in {kind}s; give each once",
        )
    if bare != len(given):
        raise SampleError(
            "placeholder_mismatch",
            f"{name} has {bare} {kind} placeholder(s) and {len(given)} {kind}(s); "
            f'give one {{"type": "{kind}"}} part, or one <{kind}> in plain text, per {kind}, in order',
        )
    rest = iter(given)
    return tuple(next(rest) if value is None else value for value in inline)


def _fps(value: Any, name: str) -> float:
    """Return frames a second, 2 where the sample says nothing."""
    try:
        fps = 2.0 if value is None else float(value)
    except (TypeError, ValueError):
        fps = math.nan
    if not (math.isfinite(fps) and fps > 0):
        raise malformed(f"{name}: fps is {shown(value)}; give frames a second above 0, or leave it out")
    return fps


def _rate(sample: Mapping[str, Any], media: list[tuple[str, Any, Any]], name: str) -> float:
    """Return the sample's frames a second: its own field, or what the parts of its videos say alike."""
    videos = [fps for kind, _, fps in media if kind == "video"]
    told = {_fps(fps, name) for fps in [sample.get("fps"), *videos] if fps is not None}
    if len(told) > 1 or (sample.get("fps") is None and told and None in videos):
        raise malformed(f"{name} asks for several values of fps; give one for all of its videos")
    return told.pop() if told else 2.0


def _check_boxes(sample: Mapping[str, Any], messages: list[dict[str, Any]], name: str) -> None:
    """Refuse tags that another tool replaces by the sample's `objects`."""
    if is_empty(sample.get("objects")):
        return
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    if any(tag in text for text in texts for tag in _BOXES):
        raise SampleError(
            "unknown_field",
            f"{name} has the tags <bbox> or <ref-object> in its text, and `objects` is not read; write the boxes into the text "
            "as the model reads them (special tokens: special_tokens=)",
        )


def _check_marks(messages: list[dict[str, Any]], unplaced: bool, name: str) -> None:
    """Refuse other tools' marks of images, which would stay text.

    Args:
        unplaced: the sample has images and no placeholder for them.
    """
    for message in messages if unplaced else [one for one in messages if one["role"] == "user"]:
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        found = (_MARKS if unplaced and message["role"] != "assistant" else _HELD).search(text)
        if found is not None:
            raise SampleError(
                "placeholder_mismatch",
                f"{name} has {shown(found.group())} in a text of the {message['role']}, which is no placeholder; write <image> "
                "into the user's text for each image, and give the images in the field images",
            )


def check_sample(sample: Mapping[str, Any], number: int | None = None) -> Sample:
    """Normalise a sample without opening its images.

    Raises:
        SampleError (a ValueError): names the sample, what is wrong with it and how to fix it.
    """
    name = sample_name(sample, number)
    if not isinstance(sample, Mapping):
        raise malformed(f"{name} is a {type(sample).__name__}, not an object")
    raise_unreadable(sample)
    made, unused = to_messages(sample, name)
    listed = {kind: _listed(made, kind, name) for kind in KINDS}
    kinds = tuple(kind for kind in KINDS if listed[kind] is not None)
    messages, media, plain = [], [], []
    for turn in made["messages"]:
        message, found, said_plainly = read_turn(turn, name, kinds)
        messages.append(message)
        media += found
        plain.append(said_plainly)
    check_order(messages, name)
    _check_boxes(sample, messages, name)
    inline = {kind: [value for one, value, _ in media if one == kind] for kind in KINDS}
    _check_marks(messages, bool(listed["image"]) and not inline["image"], name)
    if all(plain) and listed["image"] and not inline["image"]:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"} for _ in listed["image"]] + first["content"]
        inline["image"] = [None] * len(listed["image"])
    images, videos = (_attached(kind, listed[kind], inline[kind], name) for kind in KINDS)
    tools = read_tools(sample.get("tools"), name)
    return Sample(name, tuple(messages), images, videos, _rate(made, media, name), tools, unused)


def read_sample(
    sample: Mapping[str, Any], number: int | None = None, *, max_pixels: int | None = DEFAULT_MAX_PIXELS
) -> Sample:
    """Check a sample as `check_sample` does, with every image decoded to RGB and every video to frames.

    Args:
        max_pixels: largest image in pixels, None for no limit; inspected before an image is decoded.

    Raises:
        SampleError (a ValueError): as `check_sample`, or an image that is missing, unreadable or too large, named with its
            path.
    """
    checked = check_sample(sample, number)
    images = tuple(decode_image(image, checked.name, max_pixels) for image in checked.images)
    videos: tuple[Video, ...] = tuple(
        decode_video(video, checked.name, max_pixels, checked.fps) for video in checked.videos
    )
    return replace(checked, images=images, videos=videos)


def check_samples(samples: Iterable[Mapping[str, Any]], limit: int = 1000) -> int:
    """Check the first samples of a dataset before a run; returns how many were inspected.

    Raises:
        ValueError: the first sample that cannot be used, or a dataset without samples.
    """
    inspected = 0
    for number, sample in enumerate(samples):
        if number >= limit:
            break
        check_sample(sample, number)
        inspected += 1
    if not inspected:
        raise ValueError("the dataset has no samples")
    return inspected
