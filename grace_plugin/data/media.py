"""Image files to pixels: RGB, upright, bounded, and never half read (videos: `video.py`).

Sizes are looked at before a pixel is decoded, so a file that claims 400 million pixels costs a header. Rotation from EXIF
is applied. CMYK, palette, grey, transparent and 16-bit images become 8-bit RGB (16-bit is scaled, not clipped;
transparency is dropped). A truncated file is a fault, never a half-grey picture. An animated file gives its first frame.
`max_pixels` is the only limit: Pillow's own, which has no way out for a run, does not stand while a file is read here.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from grace_plugin.data.faults import RowError

__all__ = ["DEFAULT_MAX_PIXELS", "decode_image", "image_size"]

DEFAULT_MAX_PIXELS = 64_000_000  # 192 MB once decoded
PUT_IT = "put the file there, or pass images= (--images) with the folder that paths are relative to"
WAY_OUT = "scale it down, or raise max_pixels (--max_pixels)"
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112
_LAZY = ("PNG", "JPEG", "TIFF", "BMP", "PPM")  # formats of which opening decodes nothing
_SINGLE = ("PNG", "JPEG")  # formats whose file is closed once it is decoded, unless it is animated
_LIMIT = threading.RLock()  # Pillow's limit is one for the process
_BROKEN = (OSError, UnidentifiedImageError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError)


@contextmanager
def _pillow_limit(max_pixels: int | None) -> Iterator[None]:
    """Inside it, Pillow refuses what is larger than `max_pixels`, and warns of nothing."""
    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if max_pixels is None else max_pixels / 2  # type: ignore[assignment]  # it doubles it
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _opened(image: Any, name: str, max_pixels: int | None) -> Image.Image:
    """An image opened; not decoded, but by formats that decode when opened. To be called within the limit."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Mapping) and (image.get("bytes") is not None or image.get("path")):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    if not isinstance(image, (str, Path, io.BytesIO)):
        raise RowError("malformed", f"{name}: an image is a {type(image).__name__}; give a path or a PIL image")
    try:
        return Image.open(image)
    except Image.DecompressionBombError:
        if isinstance(image, io.BytesIO):
            image.seek(0)
        with _pillow_limit(None), Image.open(image, formats=_LAZY) as whole:  # our own message needs its size
            return whole
    except (OSError, ValueError):
        if isinstance(image, io.BytesIO) or Path(image).is_file():
            raise
        raise RowError("missing_file", f"{name}: cannot read image {str(image)!r}: no such file; {PUT_IT}") from None


def _shown(image: Any) -> str:
    if isinstance(image, Mapping):
        image = image.get("path") or "in the row"
    return repr(str(image)) if isinstance(image, (str, Path)) else "in the row"


def _check_pixels(width: int, height: int, image: Any, name: str, max_pixels: int | None) -> None:
    if max_pixels is not None and width * height > max_pixels:
        raise RowError(
            "image_too_large",
            f"{name}: image {_shown(image)} has {width} x {height} = {width * height:,} pixels and the limit is "
            f"{max_pixels:,}; {WAY_OUT}",
        )


def _faulty(error: Exception, image: Any, name: str, max_pixels: int | None) -> RowError:
    if isinstance(error, RowError):
        return error
    if isinstance(error, Image.DecompressionBombError) or isinstance(error.__context__, Image.DecompressionBombError):
        return RowError(
            "image_too_large",
            f"{name}: image {_shown(image)} holds a picture above the limit of {max_pixels:,} pixels; {WAY_OUT}",
        )
    return RowError("unreadable_image", f"{name}: cannot read image {_shown(image)}: {error}")


def image_size(image: Any, name: str, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of an image as `decode_image` will return it, from its header alone.

    Raises:
        RowError: missing, not an image, or above the limit.
    """
    try:
        with _pillow_limit(max_pixels):
            opened = _opened(image, name, max_pixels)
        width, height = opened.size
        _check_pixels(width, height, image, name, max_pixels)
        turned = opened.getexif().get(_ORIENTATION) in _TRANSPOSED
        if not isinstance(image, Image.Image):
            opened.close()
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise _faulty(error, image, name, max_pixels) from error
    return (width, height) if turned else (height, width)


def decode_image(image: Any, name: str, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Image.Image:
    """An image as upright 8-bit RGB; `image` is a path, a PIL image or {"bytes", "path"}.

    Raises:
        RowError: missing, unreadable, truncated, or above the limit; names the row and the file.
    """
    try:
        with _pillow_limit(max_pixels):
            opened = _opened(image, name, max_pixels)
            _check_pixels(*opened.size, image, name, max_pixels)
            if opened.mode == "RGB" and opened is image and not opened.getexif().get(_ORIENTATION):
                return opened
            opened.load()
        turned = opened.getexif().get(_ORIENTATION, 1) != 1
        animated = getattr(opened, "is_animated", False)
        alone = opened.format in _SINGLE and not animated  # of others a copy lets go of the file
        return _rgb(opened if alone and not turned else ImageOps.exif_transpose(opened))
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise _faulty(error, image, name, max_pixels) from error


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; wider images are scaled, since Pillow's own conversion clips them at 255.

    Modes `I;16` are 16-bit, whatever their largest value; `I` and `F` do not say their range, so the largest value does.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I;16") or (values.size and values.max() > 255) else 255.0
        if image.mode == "F" and values.size and values.max() <= 1.0:
            top = 1.0
        image = Image.fromarray(np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
