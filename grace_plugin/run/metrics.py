"""`metrics.jsonl`: the log of a run, one JSON object a line, written while it trains.

Each line is an entry of Trainer's log (step, epoch, loss terms in nats, controller, gates, clipped weights) and is on disk as
soon as it is made, so a running training can be looked at and a stopped one keeps what it said. A resumed run goes on behind
the step it resumed from; lines that an earlier attempt wrote beyond that step are dropped. A value that is not finite is null.
A file that cannot be written (a full disk) is said once and ends, and the run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_plugin.run.outputs import SideOutput

__all__ = ["METRICS", "MetricsFile", "append_metrics", "begin_metrics"]

METRICS = "metrics.jsonl"


def _line(entry: Mapping[str, Any]) -> str:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(plain) + "\n"


def begin_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the file anew with what was logged before: nothing at the start of a run, the earlier steps of a resumed one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).write_text("".join(map(_line, history)), encoding="utf-8")


def append_metrics(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add one entry."""
    with (folder / METRICS).open("a", encoding="utf-8") as out:
        out.write(_line(entry))


class MetricsFile:
    """The file of one run; nothing that happens to it ends the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._output = SideOutput(str(folder / METRICS))

    def begin(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write what was logged before."""
        self._output.write(lambda: begin_metrics(self.folder, history))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one entry."""
        self._output.write(lambda: append_metrics(self.folder, entry))
