"""`grace report`: where a checkpoint differs from another, or how a training went, as a page and a JSON file."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

__all__ = ["report"]


def report(args: Namespace) -> None:
    """Run what was asked for.

    Raises:
        ValueError: neither or both of a run and two checkpoints, a comparison without rows, or what cannot be compared.
    """
    if (args.run is None) == (args.compare is None):
        raise ValueError(
            "say what to report on: a training (grace report student-int4) or two checkpoints (grace report --compare "
            "bf16-student student-int4 --dataset rows.jsonl)"
        )
    console, page = Console(file=sys.stdout, markup=False), Path(args.output_dir) / "page.html"
    if args.compare is not None:
        _damage(args, console)
    else:
        from grace_plugin.report import training

        found = training(args.run, output_dir=args.output_dir)
        for warning in found["warnings"]:
            console.print(warning)
    console.print(f"{page} and the report beside it", soft_wrap=True)


def _damage(args: Namespace, console: Console) -> None:
    if args.dataset is None:
        raise ValueError("--compare A B needs rows to compare on: --dataset ROWS")
    from grace_plugin.report import damage

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr, markup=False)) as progress:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            task = tasks.setdefault(what, None)
            if task is None:
                task = tasks[what] = progress.add_task(what, total=total)
            progress.update(task, completed=done)

        found = damage(
            args.compare[0], args.compare[1], args.dataset, output_dir=args.output_dir, images=args.images,
            limit=args.limit or None,
            max_length=args.max_length, batch_size=args.batch_size, worst=args.worst, seed=args.seed, device=args.device,
            progress=tell,
        )  # fmt: skip
    _print(found, console)


def _print(found: dict[str, Any], console: Console) -> None:
    all_rows, modality = found["overall"], found["modality"]
    console.print(
        f"{found['rows']['used']:,} of {found['rows']['given']:,} rows, {all_rows['tokens']:,} supervised tokens: KL(A || B) "
        f"{all_rows['kl']:.4g} nats a token, top-1 agreement {all_rows['agreement']:.2%}",
        soft_wrap=True,
    )
    if modality["compared_rows"]:
        console.print(
            f"the {modality['compared_rows']:,} rows with pictures: {modality['kl_image_conditioned']:.4g} nats a token, and "
            f"{modality['kl_text_only']:.4g} with the pictures taken out of the prompt",
            soft_wrap=True,
        )
    if "questions" in all_rows:
        console.print(
            f"greedy answers right, of {all_rows['questions']:,}: A {all_rows['accuracy_a']:.2%}, "
            f"B {all_rows['accuracy_b']:.2%}",
            soft_wrap=True,
        )
    table = Table(
        Column("layer", overflow="fold"), "output error", "weight error", "codes at bounds", title="most damaged layers"
    )
    for one in found["layers"][:5]:
        errors = ("-" if one[key] is None else f"{one[key]:.2%}" for key in ("output_error", "weight_error"))
        table.add_row(one["name"], *errors, f"{one['clip_share']:.2%}")
    console.print(table)
