"""Measure speed and memory of head, quantizer, relational loss, a whole step and small GPUs, each next to its baseline.

    python -m benchmarks.speed [--parts head linear relation step memory chunks] [--small] [--out FILE]

Times are medians in milliseconds, forward and backward; memory is the peak beyond the inputs, results included. `--small` (the
default without CUDA) takes sizes that a CPU does in seconds. Nothing here is asserted: speed is judged by reading.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.head import chunks_by_turns, head
from benchmarks.speed.linear import layers, linear
from benchmarks.speed.relation import relation
from benchmarks.speed.step import memory, step
from benchmarks.speed.timing import ceilings
from grace_plugin.export.record import environment

RESULTS = Path(__file__).parents[1] / "results" / "speed"
PARTS = ("head", "linear", "relation", "step", "memory", "chunks")
FULL = {"tokens": 4096, "vocabulary": 151936, "student": 2048, "teacher": 4096}
SMALL = {"tokens": 128, "vocabulary": 4096, "student": 256, "teacher": 512}


def heads(device: str, dtype: torch.dtype, small: bool) -> dict[str, Any]:
    """The size of the title, and how cost grows with tokens, vocabulary and width."""
    base = SMALL if small else FULL
    scaled = {
        "tokens": [base["tokens"] // 4, base["tokens"] * (1 if small else 4)],
        "vocabulary": [base["vocabulary"] // 4],
        "student": [base["student"] // 2, base["student"] * 2],
    }
    found = {"title": {"sizes": base, **head(base, device, dtype)}, "scaling": []}
    for name, values in scaled.items():
        for value in values:
            sizes = base | {name: value}
            found["scaling"].append({"sizes": sizes, **head(sizes, device, dtype, rivals=False)})  # type: ignore[attr-defined]
    return found


def measure(asked: list[str], device: str, small: bool) -> dict[str, Any]:
    """Return the measurements of the parts asked for."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found: dict[str, Any] = {"ceilings": ceilings(device)}
    if "head" in asked:
        found["head"] = heads(device, dtype, small)
    if "chunks" in asked:
        found["chunks"] = chunks_by_turns(SMALL if small else FULL, device, dtype)
    if "linear" in asked:
        shapes = [(512, 512)] if small else [(2048, 2048), (6144, 2048), (11008, 4096)]
        found["linear"] = linear(256 if small else 4096, shapes, device)
        if device == "cuda":  # elsewhere layers are done one by one
            found["layers"] = layers(2 if small else 28)
    if "relation" in asked:
        shown = [(4, 144, 256, 512)] if small else [(16, 576, 2048, 4096), (64, 576, 2048, 4096), (16, 256, 2048, 4096)]
        found["relation"] = [
            {"images": i, "tokens": n, "student": s, "teacher": t, **relation(i, n, s, t, device, dtype)}
            for i, n, s, t in shown
        ]
    if "step" in asked:
        found["step"] = step(device, rows=1, length=640, shrink=8) if small else step(device)
    if "memory" in asked:
        small_run = {"rows": 1, "length": 640, "shrink": 8} if small else {}
        found["memory"] = memory(device, {"scales": 24.0, "lora": 24.0, "full": 48.0}, **small_run)
    return found


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]), help="all but chunks by default")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file (default: benchmarks/results/speed/<device>.json)"
    )
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    found = measure(given.parts, device, given.small or device == "cpu")
    record = {
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        "environment": environment(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **found,
    }
    out = given.out or RESULTS / f"{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
