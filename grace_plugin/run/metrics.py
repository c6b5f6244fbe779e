"""`metrics.jsonl`: the log of a run, one JSON object per line, written while it trains.

Each line is an entry of Trainer's log (step, epoch, losses, controller, gates, clipped weights) and is on disk as soon as it is
made. A resumed run continues after its resume state: lines of an earlier attempt beyond that step are dropped. A value that is
not finite is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_plugin.run.outputs import SideOutput

__all__ = ["METRICS", "MetricsFile"]

METRICS = "metrics.jsonl"


def _line(entry: Mapping[str, Any]) -> str:
    # JSON has no NaN, and readers other than Python's refuse one
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(plain) + "\n"


class MetricsFile:
    """The file of one run, in `folder`; a failure to write it is a warning, and the run continues."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self._output = SideOutput(str(self.path))

    def begin(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write what was logged before: nothing at the start of a run, the earlier steps of a resumed one."""
        self._output.write(lambda: self._write("w", history))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one entry."""
        self._output.write(lambda: self._write("a", [entry]))

    def _write(self, mode: str, entries: Sequence[Mapping[str, Any]]) -> None:
        if mode == "w":
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(map(_line, entries))
