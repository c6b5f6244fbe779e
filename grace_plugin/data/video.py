"""Videos to frames: lists of frames as they are, files sampled in time; upright, bounded, and never cut off silently.

Frames given as numbers are read by one rule. An array or a list of arrays is [F, H, W, 3]; a torch tensor or a list of tensors
is [F, 3, H, W], as torchvision gives them. Integers are 0 to 255. Floats are 0 to 1 where no value of the video is above 1,
else 0 to 255; they are rounded. Other shapes and values are refused.

Files are decoded by PyAV (`pip install grace-plugin[video]`). Without PyAV a sample that names a file stops the run before
training: counted as an error of samples, a missing package would silently drop every video of a mix.

Sampling: at `fps` frames a second, the first frame that begins at or after each multiple of 1 / fps; a file with fewer frames a
second gives all of them. Times are the file's own, so a variable frame rate keeps its speed. The file is read once, in order,
with one frame in memory in addition to those kept. Frames are turned as the display matrix says.

Refused and counted: a file that is no video or has no video track (sound alone, or sound with a cover image); one that ends
inside a frame, before the frames of its index (MP4, AVI), or half a second before its stated duration (others); frames of
several sizes; a frame above `max_pixels` (from the header, before decoding), or kept frames that together exceed 16 times
`max_pixels`; frames whose long side is more than 200 times the short one, which some processors enlarge beyond any memory.

Legend: F frames kept, H height, W width.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grace_plugin.data.errors import SampleError, malformed
from grace_plugin.data.media import DEFAULT_MAX_PIXELS, decode_image, media_source, shown_source
from grace_plugin.data.shown import shortened, shown

__all__ = ["DecoderMissingError", "Video", "decode_video"]

# transformers' `load_video` is not used: it bounds neither pixels nor duration, takes a truncated file for a short one, and
# opens web addresses
# kept frames of a file may hold this many times `max_pixels` together
_TOTAL_FACTOR = 16
# times the short side that the long side of a frame may be
_LONGEST = 200
# seconds by which a file may end before its stated duration
_SHORT = 0.5
# of a frame: times are fractions, their products floats
_ONE_SECOND_GRID = 1e-6


class DecoderMissingError(ValueError):
    """A sample names a video file and PyAV is not installed."""


@dataclass(frozen=True)
class Video:
    """Decoded frames.

    frames: uint8 [F, H, W, 3]. fps: frames a second of the source. indices: the source's frame numbers of those kept, so that
    index / fps is a frame's time in seconds. total: frames of the source.
    """

    frames: np.ndarray
    fps: float
    indices: tuple[int, ...]
    total: int


def decode_video(video: Any, name: str, max_pixels: int | None = DEFAULT_MAX_PIXELS, fps: float = 2.0) -> Video:
    """Return a video as frames of one size.

    Args:
        video: a list of frames (images as `decode_image` takes them, or arrays), an array [F, H, W, 3], a tensor
            [F, 3, H, W], a `Video`, or a file: a path, a `file://` URL, a data URI, bytes or {"bytes", "path"}.
        name: how errors speak of the sample.
        max_pixels: largest frame in pixels; None for no limit.
        fps: frames a second; of the frames given, or wanted from a file.

    Raises:
        SampleError: no frames, frames of different size or of no known form, above the limit, or a file that is missing or
            cannot be decoded.
        DecoderMissingError: a file, and no PyAV.
    """
    if isinstance(video, Video):
        return video
    if not isinstance(video, (list, tuple, np.ndarray, torch.Tensor)):
        return _from_file(media_source(video, "video", name), shown_source(video), name, max_pixels, fps)
    if len(getattr(video, "shape", (0,))) == 0:
        raise malformed(f"{name}: a video is one number; {_FRAMES_ARE}")
    if len(video) == 0:
        raise SampleError("unreadable_video", f"{name}: a video has no frames")
    frames = [_frame(frame, len(video), name, max_pixels) for frame in video]
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise SampleError(
            "unreadable_video", f"{name}: the frames of a video differ in size: {shown(sorted(shapes), _SHAPES_SHOWN)}"
        )
    return Video(_bytes(frames, name), fps, tuple(range(len(frames))), len(frames))


_FRAMES_ARE = "give images, an array [F, H, W, 3] or a tensor [F, 3, H, W]"
_SHAPES_SHOWN = 120


def _frame(frame: Any, count: int, name: str, max_pixels: int | None) -> np.ndarray:
    """Return one frame of `count`, [H, W, 3], its numbers as they are given."""
    if isinstance(frame, torch.Tensor):
        shape = tuple(frame.shape)
        if frame.ndim == 3 and shape[0] == 3 and frame.dtype != torch.bfloat16:
            frame = frame.detach().cpu().permute(1, 2, 0).numpy()
        elif frame.ndim == 3 and shape[0] == 3:  # numpy has no bfloat16
            frame = frame.detach().cpu().float().permute(1, 2, 0).numpy()
        else:
            raise malformed(f"{name}: a frame of a video is a tensor of shape {list(shape)}; {_FRAMES_ARE}")
    elif not isinstance(frame, np.ndarray):
        frame = np.asarray(decode_image(frame, name, max_pixels))
    if frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
        raise malformed(f"{name}: a frame of a video is an array of shape {list(frame.shape)}; {_FRAMES_ARE}")
    check_frame(f"{name}: a video", frame.shape[1], frame.shape[0], count, max_pixels)
    return frame


def _bytes(frames: list[np.ndarray], name: str) -> np.ndarray:
    """Return uint8 [F, H, W, 3] of frames of one shape, whatever numbers they hold."""
    kinds = {frame.dtype for frame in frames}
    if kinds == {np.dtype(np.uint8)}:
        return np.stack(frames)
    if any(kind.kind not in "biuf" for kind in kinds):
        raise malformed(f"{name}: the frames of a video are of type {shown(sorted(map(str, kinds)))}; give uint8")
    low, high = min(float(frame.min()) for frame in frames), max(float(frame.max()) for frame in frames)
    if not (low >= 0.0 and high <= 255.0):  # also where they are NaN
        raise SampleError(
            "unreadable_video",
            f"{name}: the values of a video are from {low:g} to {high:g}; give integers or floats from 0 to 255, or floats "
            "from 0 to 1",
        )
    # one scale for the whole video: a dark frame of a video in 0 to 255 may have no value above 1
    unit = high <= 1.0 and all(kind.kind in "bf" for kind in kinds)
    scale = 255.0 if unit else 1.0
    return np.stack([np.rint(frame * np.float32(scale)).astype(np.uint8) for frame in frames])


def check_frame(what: str, width: int, height: int, frames: int, max_pixels: int | None) -> None:
    """Refuse frames above the limit, alone or all that are kept, and frames of an extreme shape."""
    if max_pixels is not None and (width * height > max_pixels or frames * width * height > _TOTAL_FACTOR * max_pixels):
        raise SampleError(
            "image_too_large",
            f"{what} has frames of {width} x {height} = {width * height:,} pixels, {frames} of them kept; the limit is "
            f"{max_pixels:,} for one and {_TOTAL_FACTOR * max_pixels:,} together. Scale it down, give the sample a lower fps, "
            "or raise max_pixels (--max_pixels)",
        )
    if max(width, height) > _LONGEST * max(1, min(width, height)):
        raise SampleError(
            "image_shape",
            f"{what} has frames of {width} x {height} pixels; a side may be {_LONGEST} times as long as the other. Crop them",
        )


def _pyav(named: str, name: str) -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise DecoderMissingError(
            f"{name}: video {named} is a file and PyAV, which decodes it, is not installed; "
            "`pip install grace-plugin[video]` (or `pip install av`), or give videos as lists of frames"
        ) from error


def _from_file(source: str | bytes, named: str, name: str, max_pixels: int | None, fps: float) -> Video:
    if not (math.isfinite(fps) and fps > 0):
        raise malformed(f"{name}: fps is {fps}; give frames a second above 0")
    av = _pyav(named, name)
    given = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        # a playlist inside a file can name URLs, which FFmpeg would open
        with av.open(given, options={"protocol_whitelist": "file"}) as container:
            return _sampled(_Reader(container, named, name, max_pixels), fps)
    except SampleError:
        raise
    except Exception as error:  # FFmpeg's errors are many, and damaged metadata raises others
        raise SampleError("unreadable_video", f"{name}: cannot read video {named}: {shortened(error)}") from error


class _Reader:
    """The first video track of an open container, frame by frame with times in seconds from its first frame."""

    def __init__(self, container: Any, shown: str, name: str, max_pixels: int | None) -> None:
        self.container, self.shown, self.name, self.max_pixels = container, shown, name, max_pixels
        # FFmpeg lists the cover image of a sound file as a video track of one frame
        covers = [s for s in container.streams.video if "attached_pic" in str(s.disposition).lower()]
        tracks = [s for s in container.streams.video if s not in covers]
        if not tracks:
            raise self.error(f"it has no video track ({len(container.streams)} of other kinds)")
        self.stream = tracks[0]
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 0.0)
        if self.rate <= 0:
            raise self.error("it states no frame rate")
        self.check_size(self.stream.codec_context.width, self.stream.codec_context.height)

    def error(self, what: str) -> SampleError:
        """Return the sample's error: `what` is wrong with the file."""
        return SampleError("unreadable_video", f"{self.name}: cannot read video {self.shown}: {what}")

    def check_size(self, width: int, height: int, frames: int = 1) -> None:
        """Refuse a frame, or all frames kept so far, above the limit."""
        check_frame(f"{self.name}: video {self.shown}", width, height, frames, self.max_pixels)

    def frames(self) -> Iterator[tuple[float, Any]]:
        """Return (seconds from the first frame, frame) in order of showing, to the end, which must be where the file says."""
        first, reached, count, packets = None, 0.0, 0, 0
        # of MP4 and AVI, where the index is whole from the start
        # FFmpeg reports no error where a file ends early: packets are counted against the index, or the stated duration
        indexed = len(self.stream.index_entries)
        for packet in self.container.demux():
            if packet.pts is not None and packet.time_base is not None:
                reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != self.stream.index:
                continue
            if packet.is_corrupt:
                raise self.error(f"it is cut off inside frame {count}")
            packets += bool(packet.size)
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise self.error(f"frame {count} is damaged")
                time = count / self.rate if frame.time is None else float(frame.time)
                first = time if first is None else first
                count += 1
                yield time - first, frame
        if packets < indexed:
            raise self.error(f"it ends after {packets} of {indexed} frames")
        start = (self.container.start_time or 0) / 1_000_000
        stated = (self.container.duration or 0) / 1_000_000
        if stated - (reached - start) > max(_SHORT, 2 / self.rate):
            raise self.error(f"it ends after {reached - start:.1f} of {stated:.1f} seconds")


def _sampled(reader: _Reader, fps: float) -> Video:
    """Return frames of the track at `fps` a second."""
    kept: list[np.ndarray] = []
    indices: list[int] = []
    wanted, count, last = 0, 0, 0.0
    for time, frame in reader.frames():
        count, last = count + 1, time
        place = time * fps + _ONE_SECOND_GRID
        if place < wanted:
            continue
        wanted = math.floor(place) + 1
        reader.check_size(frame.width, frame.height, len(kept) + 1)
        # decoders ignore the display matrix that phones write instead of turning the pixels
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        if kept and pixels.shape != kept[0].shape:
            raise reader.error(f"its frames differ in size: {kept[0].shape} and {pixels.shape}")
        kept.append(pixels)
        indices.append(round(time * reader.rate))
    if not kept:
        raise reader.error("it has no frames")
    total = max(count, round(last * reader.rate) + 1)
    return Video(np.stack(kept), reader.rate, tuple(indices), total)
