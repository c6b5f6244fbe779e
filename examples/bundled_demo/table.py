"""Summarize the results of the demo and print them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from examples.bundled_demo.jobs import Result
from examples.bundled_demo.score import interval, paired_difference
from grace_plugin.export.record import environment

__all__ = ["print_summary", "summarise"]

ORDER = (
    "teacher BF16",
    "student BF16",
    "BF16 fine-tuned",
    "round-to-nearest INT4",
    "GPTQ INT4",
    "QAT + plain KL INT4",
    "GRACE INT4",
)
OURS, STUDENT = "GRACE INT4", "student BF16"


def summarise(results: dict[str, Result], served: dict[str, Any] | None, seconds: dict[str, float]) -> dict[str, Any]:
    """Return counts, intervals, paired differences, verification and seconds as plain values."""
    methods: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        correct, asked = sum(result.right), len(result.right)
        low, high = interval(correct, asked)
        methods[name] = {
            "questions": asked,
            "correct": correct,
            "accuracy": correct / asked,
            "interval": [low, high],
            "bytes": result.bytes,
            "seconds": result.seconds,
        }
    ours = results[OURS]
    paired = {name: list(paired_difference(ours.right, results[name].right)) for name in ORDER if name != OURS}
    base = methods[STUDENT]["accuracy"]
    recovered = {}
    for bits in sorted(
        (r.job.bits for r in results.values() if r.job.kind == "grace" and r.job.bits != 4), reverse=True
    ):
        rounded, learned = _names(bits)
        lost = base - methods[rounded]["accuracy"]
        gained = methods[learned]["accuracy"] - methods[rounded]["accuracy"]
        difference = list(paired_difference(results[learned].right, results[rounded].right))
        recovered[f"{bits}-bit"] = {
            "lost": lost,
            "gained": gained,
            "share": gained / lost if lost > 0 else None,
            "difference": difference,
        }
    summary: dict[str, Any] = {
        "methods": methods,
        "paired_differences_of_grace_int4": paired,
        "low_bits": recovered,
        "codes_differing": ours.verification["codes_differing"],
        "verification": ours.verification,
        "controller": {
            k: v for h in ours.history for k, v in h.items() if k in ("beta", "tau", "ema", "share_at_bound")
        },
        "seconds": {**seconds, **{f"{name}: {k}": v for name, r in results.items() for k, v in r.seconds.items()}},
        "environment": environment(),
    }
    if served is not None:
        summary |= {"vllm_equal": served["equal"], "vllm_asked": served["asked"], "vllm": served}
    return summary


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the table, then verification, serving and seconds."""
    methods, paired = summary["methods"], summary["paired_differences_of_grace_int4"]
    asked = methods[OURS]["questions"]
    table = Table(
        title=f"accuracy on {asked} test questions; intervals (95 %) are over the questions, of one training seed"
    )
    for column in ("method", "accuracy %", "95 %", f"{OURS} minus the method, paired", "weights, kB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in ORDER:
        table.add_row(
            name, *_cells(methods[name]), _points(paired[name]) if name in paired else "", _kilobytes(methods[name])
        )
    for bits in summary["low_bits"]:
        rounded, learned = _names(bits.removesuffix("-bit"))
        table.add_section()
        table.add_row(rounded, *_cells(methods[rounded]), "", _kilobytes(methods[rounded]))
        found = summary["low_bits"][bits]
        share = "" if found["share"] is None else f" (regains {100 * found['share']:.0f} % of the loss)"
        note = f"{_points(found['difference'])} over rounding{share}"
        table.add_row(learned, *_cells(methods[learned]), note, _kilobytes(methods[learned]))
    console.print(table)
    console.print(_lead(paired))
    if shown := summary.get("compositions_shown"):
        console.print(
            f"compositions: {shown['training']} in the training samples, {shown['test']} in the test, none in both, and none "
            f"among the {shown['teacher']} that trained the bundled teacher and the {shown['student']} of the student"
        )
    proof = summary["verification"]
    console.print(
        f"verified: {proof['codes_differing']} of {proof['codes']} codes and {proof['scales_differing']} scales differ from "
        f"the forward pass with the final weights; {proof['weights_differing']} weights and the logits of the reloaded model "
        f"differ: {not proof['logits_equal']}; processor files changed: {len(proof['processor_files_changed'])}"
    )
    if "vllm" in summary:
        served = summary["vllm"]
        console.print(
            f"vLLM ({served['kernel']}, dtype {served['dtype']}): {served['equal']} of {served['asked']} greedy answers equal "
            "transformers'; correct "
            f"{served['correct']} against {served['correct_transformers']}; started in {served['start_seconds']:.0f} s"
        )
        for one in served["differing"]:
            console.print(
                f"  {one['id']}: vLLM {one['vllm']!r}, transformers {one['transformers']!r}, "
                f"margin {one['margin_nats']:.3f} nats"
            )
    else:
        console.print("vLLM: not run (no --serve_python)")
    console.print(f"seconds: {summary['seconds']['total']:.0f} in all")


def _lead(paired: dict[str, list[float]]) -> str:
    """Return a sentence on what the intervals decide: which methods GRACE leads, trails, or does not differ from."""
    parts = {
        "is more accurate than": [name for name, (_, low, _high) in paired.items() if low > 0],
        "is less accurate than": [name for name, (_, _low, high) in paired.items() if high < 0],
        "does not differ significantly from": [name for name, (_, low, high) in paired.items() if low <= 0 <= high],
    }
    found = [f"{verb} {', '.join(names)}" for verb, names in parts.items() if names]
    return f"{OURS} {'; '.join(found)} (95 % intervals over the questions, one seed)"


def _names(bits: int | str) -> tuple[str, str]:
    return f"round-to-nearest {bits}-bit", f"GRACE {bits}-bit"


def _cells(method: dict[str, Any]) -> tuple[str, str]:
    low, high = method["interval"]
    return f"{100 * method['accuracy']:.2f}", f"{100 * low:.1f} to {100 * high:.1f}"


def _points(difference: list[float]) -> str:
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _kilobytes(method: dict[str, Any]) -> str:
    return f"{method['bytes'] / 1000:.0f}"
