"""Speed of head, quantizer and relation beside the matrix products they cannot do without.

    python -m benchmarks [--out FILE]

Each figure is the median of repeated runs (torch.utils.benchmark), forward and backward, in milliseconds; the floor is measured
in the same process. Sizes are small on a CPU and those of a 2B student under a 7B teacher on CUDA. The JSON carries sizes,
environment and command. Nothing here is asserted: speed is judged by reading, not by a test.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.benchmark import Timer

from grace_plugin.artifact.layout import environment
from grace_plugin.losses.head import distillation_head, teacher_gates
from grace_plugin.losses.relational import relational_loss
from grace_plugin.quantizer.attach import attach

RESULTS = Path(__file__).parent / "results" / "speed"


def median_ms(work: Callable[[], Any], seconds: float) -> float:
    """Median time of one call in milliseconds, over at least `seconds` of calls after a warm-up."""
    work()
    return (
        1000
        * Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        .blocked_autorange(min_run_time=seconds)
        .median
    )


def head(sizes: dict[str, int], device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Both heads, CE and gated distillation, against the products logits_t, logits_s, dL/dh and dL/dW alone."""
    n, v, ds, dt = sizes["tokens"], sizes["vocabulary"], sizes["student"], sizes["teacher"]
    make = {"device": device, "dtype": dtype}
    hidden_s, weight_s = torch.randn(n, ds, **make, requires_grad=True), torch.randn(v, ds, **make, requires_grad=True)
    hidden_t, weight_t = torch.randn(n, dt, **make), torch.randn(v, dt, **make)
    targets = torch.randint(v, (n,), device=device)
    gate, _ = teacher_gates(hidden_t, weight_t, None, vocabulary=v)

    def ours() -> None:
        out = distillation_head(hidden_s, weight_s, None, hidden_t, weight_t, None, targets, gate,
                                vocabulary=v, ce_scale=1.0 / n, kd_scale=0.5 / n)  # fmt: skip
        torch.autograd.grad(out.loss, [hidden_s, weight_s])

    def products() -> None:
        with torch.no_grad():
            for rows in range(0, n, 1024):
                h = hidden_s[rows : rows + 1024]
                logits = h @ weight_s.T
                hidden_t[rows : rows + 1024] @ weight_t.T
                logits @ weight_s
                logits.T @ h

    return {"ours": median_ms(ours, seconds), "floor": median_ms(products, seconds)}


def linear(sizes: dict[str, int], device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """A fake-quantized linear layer, quantizing at every call and once per step, against the plain layer."""
    x = torch.randn(sizes["tokens"], sizes["student"], device=device, dtype=dtype, requires_grad=True)

    def timed(cache: bool | None) -> float:
        layer = nn.Linear(sizes["student"], sizes["student"], bias=False, device=device, dtype=torch.float32)
        attached = None
        if cache is not None:
            attached = attach({"layer": layer}, group_size=128, cache=cache)

        def work() -> None:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = layer(x)
            torch.autograd.grad(out.float().square().mean(), [x, *layer.parameters()])

        found = median_ms(work, seconds)
        if attached is not None:
            attached.detach()
        return found

    return {"ours": timed(False), "ours_cached": timed(True), "floor": timed(None)}


def relation(sizes: dict[str, int], device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """CKA of a batch of images against one copy of its inputs."""
    images, tokens = sizes["images"], sizes["image_tokens"]
    student = torch.randn(images * tokens, sizes["student"], device=device, dtype=dtype, requires_grad=True)
    teacher = torch.randn(images * tokens, sizes["teacher"], device=device, dtype=dtype)

    def ours() -> None:
        out = relational_loss(student, teacher, [tokens] * images)
        torch.autograd.grad(out.loss_sum, student)

    return {
        "ours": median_ms(ours, seconds),
        "floor": median_ms(lambda: (student.detach().clone(), teacher.clone()), seconds),
    }


def main() -> None:
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="JSON file (default: results/speed/<device>.json)")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time spent on a figure")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    small = {"tokens": 256, "vocabulary": 8192, "student": 512, "teacher": 1024, "images": 8, "image_tokens": 144}
    full = {"tokens": 4096, "vocabulary": 151936, "student": 2048, "teacher": 4096, "images": 16, "image_tokens": 576}
    sizes = full if device == "cuda" else small
    rooms = {"head": head, "linear": linear, "relation": relation}
    found = {name: room(sizes, device, dtype, args.seconds) for name, room in rooms.items()}
    out = args.out or RESULTS / f"{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(["python -m benchmarks", *sys.argv[1:]]), "environment": environment(), "sizes": sizes,
              "dtype": str(dtype), "milliseconds": found}  # fmt: skip
    out.write_text(json.dumps(record, indent=1) + "\n")
    table = Table(title=f"median milliseconds, forward and backward, {device} {dtype}")
    for column in ("room", "ours", "cached over a step", "floor", "ours / floor"):
        table.add_column(column)
    for name, row in found.items():
        cached = f"{row['ours_cached']:.3f}" if "ours_cached" in row else ""
        table.add_row(name, f"{row['ours']:.3f}", cached, f"{row['floor']:.3f}", f"{row['ours'] / row['floor']:.2f}")
    Console().print(table)
    print(f"written to {out}")
