"""Side outputs of a run: the terminal, its log and its reports. Losing one is a warning and never ends the run.

Typical causes are a pipe without a reader (`grace train ... | head`), a closed terminal and a full disk. Checkpoints and resume
states do not go through here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["SideOutput", "kept_streams", "reason"]


def reason(error: OSError) -> str:
    """Return what the system says, without numbers."""
    return error.strerror or str(error) or type(error).__name__


class SideOutput:
    """An output that is given up with a warning when it cannot be written.

    Args:
        what: named in the warning, for instance the file's path.
    """

    def __init__(self, what: str) -> None:
        self.what, self.lost = what, False

    def write(self, action: Callable[[], Any]) -> None:
        """Call `action`, unless an earlier one failed; a failure is a warning."""
        if self.lost:
            return
        try:
            action()
        except OSError as error:
            self.lost = True
            with suppress(OSError, ValueError):
                print(
                    f"grace: {self.what} cannot be written ({reason(error)}); the run goes on without it",
                    file=sys.stderr,
                )


class _KeptStream:
    """A text stream whose failures to write raise nothing; everything else is the stream's own."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a path with letters that a terminal's encoding has not
            coding = getattr(self._stream, "encoding", None) or "ascii"
            return self.write(text.encode(coding, "backslashreplace").decode(coding))
        except OSError as error:
            return self._lose(error, len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error, 0)

    def _lose(self, error: OSError, written: int) -> int:
        """Send the stream to the null device from now on."""
        lost, self._stream = self._stream, open(os.devnull, "w")  # open as long as the process
        # the interpreter flushes its streams at exit and would fail on what is still buffered
        if lost in (sys.__stdout__, sys.__stderr__):
            with suppress(OSError, ValueError):
                os.dup2(self._stream.fileno(), lost.fileno())
        if self._name == "stdout":
            with suppress(OSError, ValueError):
                print(f"grace: nothing more can be printed ({reason(error)}); the run goes on", file=sys.stderr)
        return written


@contextmanager
def kept_streams() -> Iterator[None]:
    """Inside, standard output or error that can no longer be written is one warning and raises nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, _KeptStream) else _KeptStream(stream, name)
        for stream, name in zip(before, ("stdout", "stderr"), strict=True)
    )
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = before
