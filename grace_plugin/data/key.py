"""The key of a sample: a hash of its conversation and of the bytes of its media, whatever batch it comes in.

Together with the settings of the processor, which are the same for a whole run, the key determines every token, label and pixel
of the sample. Media are hashed as they are given, a file by its bytes, so nothing is decoded for a key; the same image given as
a file and as a `PIL.Image` has two keys. Processors that draw at random (augmentation) have no such key; transformers' own do
not draw.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from grace_plugin.data.conversation import check_sample
from grace_plugin.data.errors import SampleError
from grace_plugin.data.media import media_source, shown_source
from grace_plugin.data.shown import shortened
from grace_plugin.data.video import Video

__all__ = ["SAMPLE_KEY", "processor_settings", "sample_key"]

# the batch entry that holds one key per sample
SAMPLE_KEY = "sample_key"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _media(item: Any, name: str) -> Any:
    """Return the value that represents an image, a video or a frame in the key's text."""
    if isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview, Mapping)):
        source = media_source(item, "image", name)
        if isinstance(source, bytes):
            return _digest(source)
        try:
            with open(source, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise SampleError(
                "missing_file", f"{name}: cannot read {shown_source(item)}: {shortened(error)}"
            ) from error
    if isinstance(item, Image.Image):
        turned = dict(item.getexif()).get(0x0112, 1)
        return [item.mode, item.size, turned, _digest(item.tobytes())]
    if isinstance(item, Video):
        return [_media(item.frames, name), item.fps, list(item.indices), item.total]
    if isinstance(item, np.ndarray):
        return [str(item.dtype), item.shape, _digest(np.ascontiguousarray(item).tobytes())]
    return [_media(frame, name) for frame in item]


def sample_key(sample: Mapping[str, Any], number: int | None = None, special_tokens: Sequence[str] = ()) -> str:
    """Return the SHA-256 of the checked conversation, its images and videos, in hexadecimal; ids and names do not count.

    Args:
        special_tokens: those that samples may write; only those that this sample writes count.

    Raises:
        SampleError (a ValueError): a sample that cannot be used, or media that cannot be read, named.
    """
    checked = check_sample(sample, number)
    parts: dict[str, Any] = {"messages": checked.messages}
    parts |= {kind: [_media(item, checked.name) for item in getattr(checked, kind)] for kind in ("images", "videos")}
    if checked.videos:
        parts["fps"] = checked.fps
    if checked.tools:
        parts["tools"] = checked.tools
    said = str((checked.messages, checked.tools)) if special_tokens else ""
    # `said` is a repr, in which a token's quotes and backslashes are escaped, so the token is escaped alike
    written = sorted(token for token in special_tokens if repr(token)[1:-1] in said)
    if written:
        parts["special_tokens"] = written
    return _digest(json.dumps(parts, sort_keys=True).encode())


def processor_settings(processor: Any) -> dict[str, Any]:
    """Return all settings of a processor that decide tokens, labels and pixels; tokenizer and template as hashes."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    # padding and truncation are settings of the last call, not of the tokenizer
    if backend is not None:
        tokenizer = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        tokenizer = processor.tokenizer.get_vocab()
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    found: dict[str, Any] = {
        "class": type(processor).__name__,
        "tokenizer": _digest(json.dumps(tokenizer, sort_keys=True).encode()),
        "chat_template": _digest(json.dumps(template, sort_keys=True).encode()),
    }
    for name, value in vars(processor).items():
        if isinstance(value, (bool, int, float, str)) and name != "chat_template":
            found[name] = value
    for name in ("image_processor", "video_processor"):
        part = getattr(processor, name, None)
        for key, value in (part.to_dict() if part is not None else {}).items():
            found[f"{name}.{key}"] = value
    return json.loads(json.dumps(found, sort_keys=True, default=str))
