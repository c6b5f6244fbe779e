"""What proving a resume state costs: seconds of sync, hashes and rename over those of a run with 50 states.

    python -m benchmarks.resume_cost [--steps 1000] [--states 50] [--output FILE]

The run is a tiny pair on the CPU with one thread. Timed is what comes after the files of a state are written: sync, hashes,
manifest and rename. The share for other sizes follows from `bytes_per_second`: a state of S bytes adds S / bytes_per_second
seconds, and 50 times that is the time between two states from which on at most 2 % are added.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch

from grace_plugin.export.record import environment
from grace_plugin.run import resume, states
from tests.pairs import pair, run
from tests.tiny import make_samples


def measure(steps: int, count: int, folder: Path) -> dict[str, Any]:
    """Run once, and time each state."""
    torch.set_num_threads(1)
    made = pair("llava", folder / "pair")
    publish, added, written = states.publish, [], []

    def timed(partial: Path, final: Path, **facts: Any) -> None:
        written.append(sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()))
        begun = time.perf_counter()
        publish(partial, final, **facts)
        added.append(time.perf_counter() - begun)

    states.publish = timed  # type: ignore[attr-defined]
    started = time.perf_counter()
    try:
        run(
            made,
            folder / "out",
            make_samples(8, seed=3),
            max_steps=steps,
            save_strategy="steps",
            save_steps=steps // count,
            save_total_limit=2,
            logging_steps=steps,
        )
    finally:
        states.publish = publish  # type: ignore[attr-defined]
    seconds = time.perf_counter() - started
    assert all(resume.damage(one) == "" for one in resume.states(folder / "out.run"))
    return {
        "states": len(added),
        "steps": steps,
        "bytes_of_a_state": written[0],
        "seconds_of_the_run": round(seconds, 2),
        "seconds_added": round(sum(added), 3),
        "share": round(sum(added) / seconds, 5),
        "longest_state_seconds": round(max(added), 4),
        "bytes_per_second": round(sum(written) / sum(added)),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--states", type=int, default=50)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="grace-resume-cost-") as folder:
        found = measure(args.steps, args.states, Path(folder))
    command = "python -m benchmarks.resume_cost " + " ".join(sys.argv[1:])
    result = {"command": command, "environment": environment(), "load_average": round(load, 1), **found}
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
