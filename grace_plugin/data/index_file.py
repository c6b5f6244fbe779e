"""The file of an index: entries by line, read as far as they are whole, written by one process at a time.

Several checks of one dataset may run at once, and any may be stopped at any time. One of them holds the file's lock and
writes; the others read what is there and keep what they find to themselves. A line carries the hash of the sample that it
describes, and an entry is used only for that sample (`index.py`), so a line in a wrong place, by whatever fault, does no harm.

An index saves time and nothing else: when it cannot be written (a full disk, a folder without permission), that is said once
and the check goes on without it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from grace_plugin.data.measure import Entry
from grace_plugin.data.shown import shortened
from grace_plugin.locks import HeldError, held

__all__ = ["IndexFile"]

logger = logging.getLogger(__name__)


class IndexFile:
    """Context manager: the entries of `count` samples on disk, `known` as far as they are there.

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
                pass  # a file system without locks: lines that two processes mix are found by their hashes
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
