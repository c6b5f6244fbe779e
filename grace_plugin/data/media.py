"""Image files to pixels: RGB, upright, bounded, and never half read (videos: `video.py`).

An image is a PIL image, a path, a `file://` URL, a data URI (`data:image/png;base64,...`), the bytes of a file, or
{"bytes", "path"}. Files are read where they are regular files: a FIFO or a device could be read for ever. Web addresses are
refused: a run that downloads while it trains is neither reproducible nor bounded.

`FORMATS` are the formats read from files and bytes. Pillow knows more, among them EPS, which it hands to Ghostscript, an
interpreter for programs. A PIL image that is given as an object is used whatever it was opened from, an EPS only if it is
decoded already.

Sizes are inspected before a pixel is decoded, so a file that claims 400 million pixels costs a header. Rotation from EXIF
is applied. CMYK, palette, grey, transparent and 16-bit images become 8-bit RGB (16-bit is scaled, not clipped;
transparency is dropped). A truncated file is an error, never a half-grey image. An animated file gives its first frame.
`max_pixels` is the only limit: Pillow's own, which a run cannot change, does not apply while a file is read here.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from grace_plugin.data.errors import SampleError, malformed
from grace_plugin.data.shown import shortened, shown

__all__ = ["DEFAULT_MAX_PIXELS", "FORMATS", "decode_image", "image_size", "is_path", "media_source", "shown_source"]

DEFAULT_MAX_PIXELS = 64_000_000  # 192 MB once decoded
# no EPS: Pillow hands it to Ghostscript, an interpreter of programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")
PUT_IT = "put the file there, or pass images= (--images) with the folder that paths are relative to"
WAY_OUT = "scale it down, or raise max_pixels (--max_pixels)"
# EXIF orientations that swap width and height
_TRANSPOSED = (5, 6, 7, 8)
_ORIENTATION = 0x0112
# formats of which opening decodes nothing
_LAZY = ("PNG", "JPEG", "TIFF", "BMP", "PPM")
# formats whose file is closed once it is decoded, unless it is animated
_SINGLE = ("PNG", "JPEG")
# Pillow's limit is one for the process
_LIMIT = threading.RLock()
_URL = re.compile(r"(data:|[a-z][a-z0-9+.-]+://)", re.IGNORECASE)
# characters of a path in a message
_PATH_SHOWN = 160


def is_path(value: str) -> bool:
    """Return whether a string in an image or video field is a path, and no data URI or URL."""
    return _URL.match(value) is None


def shown_source(given: Any) -> str:
    """Return how messages name an image or a video: its path, the beginning of its data URI, or "in the sample"."""
    if isinstance(given, Mapping):
        given = given.get("path")
    if isinstance(given, str):
        return shown(given, _PATH_SHOWN if is_path(given) else 40)
    return shown(str(given), _PATH_SHOWN) if isinstance(given, os.PathLike) else "in the sample"


def _from_url(url: str, kind: str, name: str) -> str | bytes:
    """Return the file or the bytes that a data URI or a `file://` URL means."""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        header, _, content = url.partition(",")
        if not header.lower().endswith(";base64"):
            raise malformed(f"{name}: {kind} {shown_source(url)} is a data URI without ;base64; give one with it")
        try:
            return base64.b64decode("".join(content.split()), validate=True)
        except (binascii.Error, ValueError) as error:  # ValueError: characters that are not ASCII
            raise SampleError(
                f"unreadable_{kind}", f"{name}: cannot read {kind} {shown_source(url)}: damaged base64: {error}"
            ) from error
    parts = urlsplit(url) if scheme == "file" else None
    if parts is not None and parts.netloc in ("", "localhost"):
        return url2pathname(parts.path)
    raise SampleError(
        "missing_file",
        f"{name}: {kind} {shown_source(url)} is an address, and nothing is downloaded during a run; download it first and "
        "give its path",
    )


def media_source(given: Any, kind: str, name: str) -> str | bytes:
    """Return the path of the regular file, or the bytes, that a sample gives for an image or a video.

    Args:
        given: a path, a `file://` URL, a data URI, bytes, or {"bytes", "path"}.
        kind: "image" or "video"; decides the reason that an error is counted by.
        name: how errors speak of the sample.
    """
    if (
        not isinstance(given, str)
        and isinstance(given, Mapping)
        and (given.get("bytes") is not None or given.get("path"))
    ):
        given = given["bytes"] if given.get("bytes") is not None else given["path"]
    if isinstance(given, (bytes, bytearray, memoryview)):
        return bytes(given)
    if not isinstance(given, str) and not isinstance(given, os.PathLike):
        article, objects = ("an", "a PIL image") if kind == "image" else ("a", "a list of frames")
        raise malformed(
            f"{name}: {article} {kind} is of type {type(given).__name__}; give a path, bytes, a data URI or {objects}"
        )
    try:
        path = _from_url(given, kind, name) if isinstance(given, str) and not is_path(given) else os.fspath(given)
    except SampleError:
        raise
    except ValueError as error:  # urlsplit's, of brackets that do not match
        raise malformed(f"{name}: {kind} {shown_source(given)} is no address: {shortened(error)}") from error
    if isinstance(path, bytes):
        return path
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a null byte
        raise SampleError(
            "missing_file", f"{name}: cannot read {kind} {shown_source(given)}: no such file; {PUT_IT}"
        ) from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise SampleError(
            "missing_file",
            f"{name}: cannot read {kind} {shown_source(given)}: it is {what}, not a regular file; {PUT_IT}",
        )
    return path


@contextmanager
def _pillow_limit(max_pixels: int | None) -> Iterator[None]:
    """Make Pillow refuse what is larger than `max_pixels` and warn of nothing."""
    # the limit is a global of Pillow, hence the lock; it warns above the limit and raises only above twice the limit
    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if max_pixels is None else max_pixels / 2  # type: ignore[assignment]  # it doubles it
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(form for form in FORMATS if form in Image.OPEN)


def _opened(image: Any, name: str) -> Image.Image:
    """Return an image opened; not decoded, but by formats that decode when opened. To be called within the limit."""
    if isinstance(image, Image.Image):
        if image.format == "EPS" and getattr(image, "tile", None):  # not decoded yet
            raise UnidentifiedImageError
        return image
    # a path is checked before Pillow opens it: opening a FIFO waits for a writer without end
    source = media_source(image, "image", name)
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except Image.DecompressionBombError:
        again = io.BytesIO(source) if isinstance(source, bytes) else source
        with _pillow_limit(None), Image.open(again, formats=_LAZY) as whole:  # our own message needs its size
            return whole


def _check_pixels(width: int, height: int, image: Any, name: str, max_pixels: int | None) -> None:
    if max_pixels is not None and width * height > max_pixels:
        raise SampleError(
            "image_too_large",
            f"{name}: image {shown_source(image)} has {width} x {height} = {width * height:,} pixels and the limit is "
            f"{max_pixels:,}; {WAY_OUT}",
        )


def _image_error(error: Exception, image: Any, name: str, max_pixels: int | None) -> SampleError:
    if isinstance(error, SampleError):
        return error
    if isinstance(error, Image.DecompressionBombError) or isinstance(error.__context__, Image.DecompressionBombError):
        return SampleError(
            "image_too_large",
            f"{name}: image {shown_source(image)} holds an image above the limit of {max_pixels:,} pixels; {WAY_OUT}",
        )
    said = shortened(error)
    if isinstance(error, UnidentifiedImageError):
        said = f"it is damaged or in none of the formats that are read ({', '.join(_formats())}); convert it"
    return SampleError("unreadable_image", f"{name}: cannot read image {shown_source(image)}: {said}")


def image_size(image: Any, name: str, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return (height, width) of an image as `decode_image` will return it, from its header alone."""
    try:
        with _pillow_limit(max_pixels):
            opened = _opened(image, name)
        width, height = opened.size
        _check_pixels(width, height, image, name, max_pixels)
        turned = opened.getexif().get(_ORIENTATION) in _TRANSPOSED
        if not isinstance(image, Image.Image):
            opened.close()
    except Exception as error:  # Pillow's plugins raise errors of any type for damaged files
        raise _image_error(error, image, name, max_pixels) from error
    return (width, height) if turned else (height, width)


def decode_image(image: Any, name: str, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Return an image as upright 8-bit RGB.

    Args:
        image: a PIL image, a path, a `file://` URL, a data URI, bytes, or {"bytes", "path"}.
        name: how errors speak of the sample.
        max_pixels: largest image in pixels; None for no limit.
    """
    try:
        with _pillow_limit(max_pixels):
            opened = _opened(image, name)
            _check_pixels(*opened.size, image, name, max_pixels)
            # also what the caller opened: it may not be decoded yet, and its file may be cut off
            opened.load()
            if opened.mode == "RGB" and opened is image and not opened.getexif().get(_ORIENTATION):
                return opened
        turned = opened.getexif().get(_ORIENTATION, 1) != 1
        animated = getattr(opened, "is_animated", False)
        # of others a copy lets go of the file
        alone = opened.format in _SINGLE and not animated
        return _rgb(opened if alone and not turned else ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's plugins raise errors of any type for damaged files
        raise _image_error(error, image, name, max_pixels) from error


def _rgb(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB; wider images are scaled, since Pillow's own conversion clips them at 255.

    Modes `I;16` are 16-bit, whatever their largest value; `I` and `F` do not say their range, so the largest value does.
    """
    # Image.convert("RGB") clips 16-bit and float values at 255, which makes most of such an image white
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        top = 65535.0 if image.mode.startswith("I;16") or (values.size and values.max() > 255) else 255.0
        if image.mode == "F" and values.size and values.max() <= 1.0:
            top = 1.0
        image = Image.fromarray(np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
