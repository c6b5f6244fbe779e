"""`grace report`: how a checkpoint differs from another one, or how a training went, as a page and a JSON file."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table


def report(args: Namespace) -> None:
    """Write the report that was asked for, and print its summary.

    Raises:
        ValueError: neither or both of a run and two checkpoints, a comparison without a dataset, or what cannot be compared.
    """
    if (args.run is None) == (args.compare is None):
        raise ValueError(
            "say what to report on: a training (grace report student-int4) or two checkpoints (grace report --compare "
            "bf16-student student-int4 --dataset heldout.jsonl)"
        )
    console, page = Console(file=sys.stdout, markup=False), Path(args.output_dir) / "page.html"
    if args.compare is not None:
        _compare(args, console)
    else:
        from grace_plugin.report import training

        found = training(args.run, output_dir=args.output_dir)
        for warning in found["warnings"]:
            console.print(warning)
    console.print(f"{page} and report.json next to it", soft_wrap=True)


def _compare(args: Namespace, console: Console) -> None:
    if args.dataset is None:
        raise ValueError("--compare A B needs samples to compare on: --dataset FILE")
    from grace_plugin.report import compare_checkpoints

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr, markup=False)) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        found = compare_checkpoints(
            args.compare[0],
            args.compare[1],
            args.dataset,
            output_dir=args.output_dir,
            images=args.images,
            limit=args.limit or None,
            max_length=args.max_length,
            batch_size=args.batch_size,
            worst=args.worst,
            seed=args.seed,
            device=args.device,
            progress=show,
        )
    _print(found, console)


def _print(found: dict[str, Any], console: Console) -> None:
    everything, modality, samples = found["overall"], found["modality"], found["samples"]
    lines = [
        f"{samples['used']:,} of {samples['given']:,} samples, {everything['tokens']:,} supervised tokens: KL(A || B) "
        f"{everything['kl']:.4g} nats per token, top-1 agreement {everything['agreement']:.2%}"
    ]
    if modality["compared_samples"]:
        lines.append(
            f"the {modality['compared_samples']:,} samples with images: {modality['kl_image_conditioned']:.4g} nats per token, "
            f"and {modality['kl_text_only']:.4g} with the images taken out of the prompt"
        )
    if "questions" in everything:
        lines.append(
            f"greedy answers right, of {everything['questions']:,}: A {everything['accuracy_a']:.2%}, "
            f"B {everything['accuracy_b']:.2%}"
        )
    for line in lines:
        console.print(line, soft_wrap=True)
    table = Table(
        Column("layer", overflow="fold"),
        "output error",
        "weight error",
        "codes at bounds",
        title="largest output errors",
    )
    for one in found["layers"][:5]:
        errors = ("-" if one[key] is None else f"{one[key]:.2%}" for key in ("output_error", "weight_error"))
        table.add_row(one["name"], *errors, f"{one['clip_share']:.2%}")
    console.print(table)
