"""Inspect every sample of a dataset once, in worker processes, and keep the results on disk.

The index file holds one JSON line per sample, in order. Its name is a hash of the dataset's fingerprint and of everything of
the processor that decides tokens, so another model, template or dataset file gets another index. A line is used only for the
sample whose content hash it carries, and only while the size and time of the sample's media files are unchanged.

One process holds the file's lock and writes; others read what is there. A check that was stopped continues after the last whole
line. An index only saves time: if it cannot be written (full disk, no permission), one warning says so and the check continues.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.key import processor_settings
from grace_plugin.data.measure import Entry, Measure
from grace_plugin.data.mix import Samples
from grace_plugin.data.parts import inline_media
from grace_plugin.data.shown import shortened
from grace_plugin.data.video import DecoderMissingError
from grace_plugin.data.workers import WORKER_SECONDS, bounded
from grace_plugin.locks import HeldError, held

__all__ = ["IndexFile", "cache_folder", "index_file", "number_of", "sample_hash", "scan", "stamp"]

# `datasets.Dataset.map(num_proc=...)` also maps in processes and caches, but not per sample: a stopped map loses its unfinished
# shards, and one changed image file changes the fingerprint, so that every sample is inspected again
_CHUNK = 64
# of the entries, their messages included
_VERSION = 8


def cache_folder() -> Path:
    """Return where indexes lie: `$GRACE_CACHE`, or `grace_plugin/index` in the user's cache."""
    if os.environ.get("GRACE_CACHE"):
        return Path(os.environ["GRACE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grace_plugin" / "index"


def index_file(fingerprint: str, collator: ConversationCollator, decode: bool, folder: Path | None = None) -> Path:
    """Return the index of a dataset for a processor."""
    settings = processor_settings(collator.processor)
    segmenter = collator.segmenter
    parts: list[Any] = [_VERSION, fingerprint, decode, collator.max_pixels, segmenter.template, settings]
    parts.append(sorted(segmenter.special_tokens))
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return (folder or cache_folder()) / f"{key}.jsonl"


def _files(value: Any) -> Iterator[str]:
    """Return paths of files in an image or video field, at any depth; what is no path is left for `check_sample` to refuse."""
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
    """Return a digest of size and modification time of the files a sample names; "" when it names none."""
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
        """Return the entry of sample i."""
        if not self.hashed:
            return self.measure(self.samples[i], number_of(self.samples, i))
        known, content = self.known[i] if i < len(self.known) else None, sample_hash(self.samples, i)
        # entries are matched by content, not only by place: a file may be overwritten in the same size and second
        if known is not None and (known.content != content or not content):
            known = None
        if known is not None and not known.stamp:
            return known
        sample = self.samples[i]
        mark = stamp(sample)
        if known is not None and known.stamp == mark:
            return known
        return self.measure(sample, number_of(self.samples, i))._replace(stamp=mark, content=content)


def _bytes_of(value: Any) -> str:
    """Return text for a value of a sample that JSON does not have."""
    return hashlib.blake2b(value, digest_size=12).hexdigest() if isinstance(value, bytes) else str(value)


_ENCODER = json.JSONEncoder(default=_bytes_of)


def sample_hash(samples: Sequence[Any], index: int) -> str:
    """Return a hash of a sample's content as it is stored, 24 hexadecimal digits; a line is not parsed for it."""
    stored = samples.stored(index) if isinstance(samples, Samples) else samples[index]
    if not isinstance(stored, bytes):
        try:
            stored = _ENCODER.encode(stored).encode()
        except (TypeError, ValueError, RecursionError):
            # keys of odd types, loops: such a sample is inspected every time
            return ""
    return hashlib.blake2b(stored, digest_size=12).hexdigest()


def number_of(samples: Sequence[Any], index: int) -> int:
    """Return the number by which reports and messages speak of a sample."""
    return samples.number(index) if isinstance(samples, Samples) else index


def _quiet_worker(_worker: int) -> None:
    # a tokenizer's threads in each of several forked workers deadlock or oversubscribe the cores
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _as_they_are(entries: list[Entry]) -> list[Entry]:
    # the default walks through every field of them
    return entries


def _entries(chunks: _Chunks, workers: int) -> Iterator[list[Entry]]:
    loader = DataLoader(
        chunks,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        collate_fn=_as_they_are,
        worker_init_fn=_quiet_worker,
        # fork: spawn would import torch again in each worker and pickle all samples to it
        multiprocessing_context="fork" if workers else None,
    )
    try:
        # the bound is for one sample, and a worker returns a chunk of them
        yield from bounded(loader, _CHUNK * WORKER_SECONDS if workers else 0)
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
    """Inspect every sample.

    Args:
        samples: any sequence of samples.
        workers: processes that decode and tokenize; 0 does it here.
        decode: decode every image; False inspects headers only.
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


logger = logging.getLogger(__name__)


class IndexFile:
    """Context manager of an index file; `known` holds the entries that are on disk.

    Args:
        file: the index; None keeps nothing.
        write: whether this process may write.
    """

    def __init__(self, file: Path | None, count: int, write: bool) -> None:
        self.file, self.count = file, count
        self.write = write and file is not None
        self.known: list[Entry] = []
        self._open = ExitStack()

    def __enter__(self) -> IndexFile:
        if self.file is None:
            return self
        if self.write:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._open.enter_context(held(self.file.with_suffix(".lock")))
            except HeldError as holder:
                self.write = False
                logger.warning(
                    "the index of this dataset, %s, is being written by %s; this check reads it and does not write it",
                    self.file,
                    holder,
                )
            except NotImplementedError:
                # a file system without locks: lines that two processes mix are recognized by their content hash
                pass
            except OSError as error:
                self._give_up(error)
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _read(self) -> None:
        """Take over the whole lines; a torn last line is cut off, an index of more samples than there are is begun again."""
        assert self.file is not None
        size = 0
        try:
            with self.file.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    self.known.append(Entry(*json.loads(line)))
                    size += len(line)
        except FileNotFoundError:
            return
        except OSError as error:
            self._give_up(error)
        except (ValueError, TypeError, RecursionError):
            pass  # damaged from here on
        if len(self.known) > self.count:
            self.known, size = [], 0
        if self.write:
            try:
                os.truncate(self.file, size)
            except OSError as error:
                self._give_up(error)

    def append(self, entries: list[Entry]) -> None:
        """Add the entries of the next samples in one write."""
        if not self.write or self.file is None or not entries:
            return
        try:
            with self.file.open("ab", buffering=0) as out:
                _whole(out.fileno(), _lines(entries))
        except OSError as error:
            self._give_up(error)

    def replace(self, entries: list[Entry]) -> None:
        """Write all entries in the place of those that were there, at once or not at all."""
        if not self.write or self.file is None:
            return
        written = ""
        try:
            # written next to the index and renamed: a reader sees the old entries or the new ones, never a mixture
            handle, written = tempfile.mkstemp(prefix=f"{self.file.stem}-", suffix=".new", dir=self.file.parent)
            try:
                _whole(handle, _lines(entries))
            finally:
                os.close(handle)
            os.replace(written, self.file)
        except OSError as error:
            with suppress(OSError):
                os.unlink(written)
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self.write:
            logger.warning(
                "the index of this dataset, %s, cannot be written (%s); the check goes on without it. Free space there, or "
                "name another folder in $GRACE_CACHE",
                self.file,
                shortened(error),
            )
        self.write = False


def _lines(entries: list[Entry]) -> bytes:
    return "".join(json.dumps(list(entry)) + "\n" for entry in entries).encode()


def _whole(handle: int, content: bytes) -> None:
    """Write all of a content: on a disk that fills, a write may end early without an error."""
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]
