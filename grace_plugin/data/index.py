"""Every sample of a dataset looked at once, in worker processes, and remembered on disk.

The index is one JSON line per sample, in order, appended in chunks: a scan that was stopped goes on behind the last whole
line. Its name is a hash of the dataset's fingerprint and of everything of the processor that decides tokens, so another model,
another template or a changed file starts another index. Each line carries a stamp of the size and time of the sample's
picture and
video files: a sample whose files were put in place, changed or removed since is looked at again, at the cost of one `stat` a
file. Each line also carries a hash of its sample and is used for no other (`index_file.py` says why).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.index_file import IndexFile
from grace_plugin.data.key import processor_settings
from grace_plugin.data.measure import Entry, Measure
from grace_plugin.data.mix import Samples
from grace_plugin.data.parts import inline_media
from grace_plugin.data.video import DecoderMissingError
from grace_plugin.data.workers import WORKER_SECONDS, bounded

__all__ = ["cache_folder", "index_file", "number_of", "scan"]

_CHUNK = 64
_VERSION = 7


def cache_folder() -> Path:
    """Where indexes lie: `$GRACE_CACHE`, or `grace_plugin/index` in the user's cache."""
    if os.environ.get("GRACE_CACHE"):
        return Path(os.environ["GRACE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grace_plugin" / "index"


def index_file(fingerprint: str, collator: ConversationCollator, decode: bool, folder: Path | None = None) -> Path:
    """The index of a dataset for a processor."""
    settings = processor_settings(collator.processor)
    segmenter = collator.segmenter
    parts: list[Any] = [_VERSION, fingerprint, decode, collator.max_pixels, segmenter.template, settings]
    parts.append(sorted(segmenter.special_tokens))
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return (folder or cache_folder()) / f"{key}.jsonl"


def _files(value: Any) -> Iterator[str]:
    """Paths of files in an image or video field, at any depth; what is no path is left for `check_sample` to refuse."""
    if isinstance(value, (str, os.PathLike)):
        yield os.fspath(value)
    elif isinstance(value, Mapping):
        path = value.get("path") or value.get("url")
        if value.get("bytes") is None and isinstance(path, (str, os.PathLike)):
            yield os.fspath(path)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _files(part)


def stamp(sample: Any) -> str:
    """Digest of size and modification time of the files a sample names; "" when it names none."""
    marks = []
    named = [sample.get(key) for key in ("image", "images", "video", "videos")] if isinstance(sample, Mapping) else []
    named += [part[key] for part, key in inline_media(sample)] if isinstance(sample, Mapping) else []
    for value in named:
        for path in _files(value):
            try:
                found = os.stat(path)
                marks.append(f"{found.st_size} {found.st_mtime_ns}")
            except (OSError, ValueError):
                marks.append("none")
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16] if marks else ""


@dataclass
class _Chunks(Dataset[list[Entry]]):
    """The entries of chunk i; one that is known is kept where it is this sample's and the files it names are as they were.

    hashed: give each entry its sample's hash, as an index needs it.
    """

    samples: Sequence[Any]
    measure: Measure
    known: list[Entry]
    hashed: bool

    def __len__(self) -> int:
        return -(-len(self.samples) // _CHUNK)

    def __getitem__(self, chunk: int) -> list[Entry]:
        return [self.entry(i) for i in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.samples)))]

    def entry(self, i: int) -> Entry:
        """The entry of sample i."""
        if not self.hashed:
            return self.measure(self.samples[i], number_of(self.samples, i))
        known, content = self.known[i] if i < len(self.known) else None, sample_hash(self.samples, i)
        if known is not None and (
            known.content != content or not content
        ):  # of another place, or of a file that was written over
            known = None
        if known is not None and not known.stamp:
            return known
        sample = self.samples[i]
        mark = stamp(sample)
        if known is not None and known.stamp == mark:
            return known
        return self.measure(sample, number_of(self.samples, i))._replace(stamp=mark, content=content)


def _bytes_of(value: Any) -> str:
    """What stands for a value of a sample that JSON does not know."""
    return hashlib.blake2b(value, digest_size=12).hexdigest() if isinstance(value, bytes) else str(value)


_ENCODER = json.JSONEncoder(default=_bytes_of)


def sample_hash(samples: Sequence[Any], index: int) -> str:
    """24 hexadecimal digits of a sample's content as it is stored; of a line of a file without parsing it."""
    stored = samples.stored(index) if isinstance(samples, Samples) else samples[index]
    if not isinstance(stored, bytes):
        try:
            stored = _ENCODER.encode(stored).encode()
        except (
            TypeError,
            ValueError,
            RecursionError,
        ):  # keys of odd types, loops; such a sample is inspected every time
            return ""
    return hashlib.blake2b(stored, digest_size=12).hexdigest()


def number_of(samples: Sequence[Any], index: int) -> int:
    """The number by which reports and messages speak of a sample."""
    return samples.number(index) if isinstance(samples, Samples) else index


def _quiet_worker(_worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _as_they_are(entries: list[Entry]) -> list[Entry]:
    return entries  # the default walks through every field of them


def _entries(chunks: _Chunks, workers: int) -> Iterator[list[Entry]]:
    loader = DataLoader(
        chunks,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        collate_fn=_as_they_are,
        worker_init_fn=_quiet_worker,
        multiprocessing_context="fork" if workers else None,
    )
    try:
        yield from bounded(loader, WORKER_SECONDS if workers else 0)
    except DecoderMissingError as error:  # from a worker it comes with the worker's traceback as its text
        said = [line for line in str(error).splitlines() if line.strip()][-1]
        raise DecoderMissingError(said.partition(f"{DecoderMissingError.__name__}: ")[2] or said) from None


def scan(
    samples: Sequence[Any],
    collator: ConversationCollator,
    *,
    workers: int = 0,
    decode: bool = True,
    file: Path | None = None,
    write: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Entry]:
    """Look at every sample.

    Args:
        samples: any sequence of samples.
        workers: processes that decode and tokenise; 0 does it here.
        decode: decode every image; False looks at headers only.
        file: the index to go on with; None keeps nothing.
        write: whether this process writes the index; one of several should.
        progress: called with (samples done, samples).

    Returns:
        One entry per sample, in order.
    """
    entries: list[Entry] = []
    with IndexFile(file, len(samples), write) as index:
        for chunk in _entries(_Chunks(samples, Measure(collator, decode), index.known, file is not None), workers):
            index.append(chunk[max(0, len(index.known) - len(entries)) :])
            entries += chunk
            if progress is not None:
                progress(len(entries), len(samples))
        if entries[: len(index.known)] != index.known:
            index.replace(entries)
    return entries
