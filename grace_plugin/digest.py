"""SHA-256 of values, tensors, models and files: every fingerprint of the package is made here.

Files are read whole, by several threads, and their result is remembered until they change. Parts of a file do not tell one set
of weights from another: in a file of 7 GB, 1.8 million weights can change between samples of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn

from grace_plugin.data.index import cache_folder

__all__ = ["file_digest", "file_digests", "model_digest", "tensor_digest", "value_digest"]

_SETTLED = 2.0  # seconds after which a write shows in a file's times on every file system
_PATIENCE = 600.0  # seconds to wait for another process that reads the same file


def value_digest(value: Any) -> str:
    """Return the SHA-256 of a value's JSON text with sorted keys; images, arrays and bytes count with their content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_content).encode()).hexdigest()


def _content(value: Any) -> Any:
    """Return what stands for a value that JSON does not know."""
    if isinstance(value, Image.Image):
        return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    return str(value)


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{flat.dtype} {tuple(flat.shape)} ".encode())
    if flat.numel():
        found.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Return one SHA-256 of the names, dtypes, shapes and bytes of all parameters and buffers.

    A tensor on the meta device (an offloaded layer) counts with name, dtype and shape.
    """
    tensors = model.state_dict(keep_vars=True)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        digests = pool.map(lambda t: f"{t.dtype} {tuple(t.shape)}" if t.is_meta else tensor_digest(t), tensors.values())
        return value_digest(dict(zip(tensors, digests, strict=True)))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of files by name.

    Remembered in `$GRACE_CACHE` by path, size, times of content and entry, inode and device; where that folder cannot be
    written, each call reads the files again.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(_remembered, files.values()), strict=True))


def _stamp(path: Path) -> list[str | int]:
    at = path.stat()
    # st_ctime as well: a tool may set the time of the content back, as cp -p and rsync do
    return [str(path.resolve()), at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino, at.st_dev]


def _read(note: Path) -> str | None:
    try:
        text = note.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _remembered(path: Path) -> str:
    folder, stamp = cache_folder() / "sha256", _stamp(path)
    note = folder / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    found = _read(note)
    if found is not None:
        return found
    lock = FileLock(f"{note}.lock", timeout=_PATIENCE)  # of several processes of a run, one reads
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, Timeout):
        return file_digest(path)
    try:
        found = _read(note) or file_digest(path)
        # a file that was written a moment ago may change again within the resolution of its times
        if stamp == _stamp(path) and time.time() - max(int(t) for t in stamp[2:4]) / 1e9 > _SETTLED:
            with suppress(OSError):
                partial = Path(f"{note}.{os.getpid()}.partial")
                partial.write_text(found, encoding="ascii")
                partial.replace(note)
        return found
    finally:
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink()  # a process that still waits for it reads the file itself
