"""Inject faults into tiny runs and print a table of what was injected, what was seen, and whether anything was lost.

    python -m integration.faults [--rows N] [--only KIND ...] [--output FILE]

`fault_kinds.py` has the faults and says what counts as lost.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from grace_plugin.export.record import environment
from integration.fault_bench import Bench, Fault
from integration.fault_kinds import KINDS


def write(table: list[Fault], output: Path, *, complete: bool) -> None:
    """Write the table as JSON; `complete` says whether all faults that were asked for are in it."""
    result = {
        "command": "python -m integration.faults " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "complete": complete,
        "injected": len(table),
        "lost": sum(bool(fault.lost) for fault in table),
        "rows": [fault._asdict() for fault in table],
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


def inject(kinds: list[str], most: int, folder: Path, output: Path | None) -> list[Fault]:
    """Inject the faults of some kinds, at most so many of each; print each and add it to the output."""
    bench, found = Bench(folder), []
    for kind in kinds:
        source = KINDS[kind](bench)
        for _ in range(most):
            started = time.monotonic()
            fault = next(source, None)
            if fault is None:
                break
            fault = fault._replace(seconds=round(time.monotonic() - started, 1))
            found.append(fault)
            print(f"{fault.kind:15} | {fault.injected:50} | {fault.seen:60} | {fault.lost or 'nothing'}", flush=True)
            if output is not None:  # after each: a run of half an hour may be stopped
                write(found, output, complete=False)
    return found


def main() -> int:
    """Entry point; the exit status is 1 where a fault was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000, help="at most so many of each kind")
    parser.add_argument("--only", nargs="*", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="grace-faults-"))
    try:
        table = inject(args.only, args.rows, folder, args.output)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    lost = [fault for fault in table if fault.lost]
    print(f"{len(table)} faults injected, {len(lost)} lost")
    if args.output is not None:
        write(table, args.output, complete=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
