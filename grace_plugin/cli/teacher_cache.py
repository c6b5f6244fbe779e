"""`grace teacher cache`: print the predicted size, run the teacher over a dataset, print what was written."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["teacher_cache"]


def _bytes(count: int) -> str:
    units = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    size, unit = next(((count / size, unit) for size, unit in units if count >= size), (float(count), "B"))
    return f"{count:,} bytes ({size:.1f} {unit})"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def teacher_cache(args: Namespace) -> None:
    """Build the cache of a recipe's teacher.

    Raises:
        ValueError: as for `build_cache`.
    """
    from grace_plugin.data import load_samples
    from grace_plugin.run.inputs import grace_modifier, read_recipe
    from grace_plugin.teacher import CachePlan, build_cache

    modifier = grace_modifier(read_recipe(Path(args.recipe)))
    modifier.use_teacher(args.teacher)
    console, tasks = Console(file=sys.stdout, markup=False), dict[str, TaskID]()

    def announce(plan: CachePlan) -> None:
        if plan.seconds is not None:
            console.print(f"predicted time from here: {_time(plan.seconds)}")
            return
        for name in plan.dropped:
            console.print(f"{name} is not what was written: dropped, its samples are run again", soft_wrap=True)
        console.print(
            f"predicted size: {_bytes(plan.total_bytes)} of states{' at most' if plan.at_most else ''} for "
            f"{plan.samples:,} samples, {_bytes(plan.bytes)} of them to be written; {plan.stored:,} samples are there, "
            f"{plan.tokens:,} tokens to run",
            soft_wrap=True,
        )

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr, markup=False)) as progress:

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done)

        plan = build_cache(
            args.model,
            teacher=modifier.teacher,
            dataset=load_samples(args.dataset, args.images),
            output_dir=args.output_dir,
            max_length=args.max_length,
            max_pixels=args.max_pixels,
            max_bad_samples=args.max_bad_samples,
            batch_size=args.batch_size,
            workers=args.workers,
            special_tokens=args.special_tokens,
            visual=modifier.reads_visual_states,
            shard_bytes=args.shard_bytes,
            device=args.device,
            announce=announce,
            progress=show,
        )
    files = sorted(Path(args.output_dir).glob("*.safetensors"))
    written, seconds = sum(file.stat().st_size for file in files), plan.seconds or 0.0
    console.print(
        f"teacher cache: {args.output_dir}, {plan.samples:,} samples in {len(files):,} files of {_bytes(written)}, "
        f"{_time(seconds)}; "
        f"train with teacher: {{kind: cached, cache: {args.output_dir}}}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
