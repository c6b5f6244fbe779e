"""Edit a checkpoint in many ways and count the edits that `verify` finds: `python -m integration.verify_edits [OUTPUT.json]`.

200 single bytes over all files and 40 fields of the JSON files, each verified with the number of threads that wrote the
checkpoint and with another. An edit counts as found where `verify` fails in one sentence.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import grace_plugin
from grace_plugin.export.record import environment
from tests.export.edits import byte_edits, field_edits, verdict
from tests.pairs import pair, run

__all__ = ["edit_all"]


def edit_all(folder: Path, *, byte_count: int, field_count: int, threads: int) -> dict[str, Any]:
    """Make each edit, verify, and undo it; return counts by kind and the edits that passed."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    started, found, longest, passed = time.perf_counter(), Counter[str](), 0, []
    try:
        for kind, edits in (
            ("bytes", byte_edits(folder, byte_count, seed=1)),
            ("fields", field_edits(folder, field_count, seed=2)),
        ):
            for edit in edits:
                told = verdict(folder, edit)
                if told is None or len(told.splitlines()) != 1:
                    passed.append(f"{edit.file}: {edit.what}: {told}")
                else:
                    found[kind] += 1
                    longest = max(longest, len(told))
        untouched = grace_plugin.verify(folder)
    finally:
        torch.set_num_threads(before)
    return {
        "threads": threads,
        "bytes": byte_count,
        "bytes_found": found["bytes"],
        "fields": field_count,
        "fields_found": found["fields"],
        "passed": passed,
        "longest_sentence": longest,
        "untouched_verifies": untouched["verified"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Train a tiny pair, edit its checkpoint, print and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=Path("benchmarks/results/verify_edits.json"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="grace-edits-") as name:
        made = run(pair("llava", Path(name)), Path(name) / "out", max_steps=2)
        runs = [edit_all(made.checkpoint, byte_count=200, field_count=40, threads=threads) for threads in (1, 3)]
    report = {"command": "python -m integration.verify_edits", "environment": environment(), "runs": runs}
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    raise SystemExit(0 if all(not run["passed"] and run["untouched_verifies"] for run in runs) else 1)


if __name__ == "__main__":
    main()
