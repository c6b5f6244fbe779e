"""`grace data check`: inspect a dataset with a model's processor before a GPU is needed."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["data_check"]


def _processor(model: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read a processor from {model!r}: {error}") from error


def _limits(args: Namespace) -> tuple[int | None, int | None]:
    """Token ids and tokens of a sample that the model takes, and the teacher if one is named."""
    from transformers import AutoConfig, AutoTokenizer

    from grace_plugin.vlm import context_length, shared_vocabulary, vocabulary_rows

    read = {}
    for model in (args.model, *([args.teacher] if args.teacher else [])):
        try:
            read[model] = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError):
            if model == args.teacher:
                raise
            return None, None  # a processor alone, without a model's config, says nothing of its limits
    vocabularies = [vocabulary_rows(config) for config, _ in read.values()]
    contexts = [context_length(config) for config, _ in read.values()]
    vocabulary = vocabularies[0]
    if len(read) > 1 and None not in vocabularies:
        (_, student), (_, teacher) = read.values()
        vocabulary = shared_vocabulary(
            student, teacher, student_rows=vocabularies[0] or 0, teacher_rows=vocabularies[1] or 0
        )
    return vocabulary, min((length for length in contexts if length is not None), default=None)


def _tables(report: dict[str, Any], console: Console) -> None:
    console.print(
        f"{report['usable']:,} of {report['samples']:,} samples can be used ({report['usable_share']:.2%}); "
        f"{report['images_and_videos']:,} images and videos, {report['samples_without_images']:,} samples without any"
    )
    if not report["images_and_videos"]:
        console.print("no usable sample has an image or a video: the relational term would be absent")
    if report["repeated_ids"]:
        shown = ", ".join(f"{one['id']!r} (sample {one['number']})" for one in report["repeated"][:5])
        console.print(
            f"{report['repeated_ids']:,} samples repeat an earlier id with other content; they are used: {shown}"
            f"{', ...' if report['repeated_ids'] > 5 else ''}",
            markup=False,
            soft_wrap=True,
        )
    for key, told in (
        ("unused_fields", "fields that nothing reads"),
        (
            "spelled_special_tokens",
            "special tokens that samples spell and that stay text (--special_tokens allows some)",
        ),
    ):
        if report[key]:
            listed = ", ".join(f"{name} ({count:,})" for name, count in list(report[key].items())[:20])
            more = ", ..." if len(report[key]) > 20 else ""
            console.print(f"{told}: {listed}{more}", markup=False, soft_wrap=True)
    if report["rejected"]:
        reasons = Table("reason", "samples", title="samples that cannot be used")
        for reason, count in report["rejected"].items():
            reasons.add_row(reason, f"{count:,}")
        console.print(reasons)
    lengths = Table("tokens per sample", "min", "median", "p95", "max", "mean", "sum")
    for key in ("tokens", "visual_tokens", "supervised_tokens"):
        lengths.add_row(key, *(f"{report[key][part]:,.10g}" for part in ("min", "median", "p95", "max", "mean", "sum")))
    console.print(lengths)


def data_check(args: Namespace) -> None:
    """Inspect every sample, print the tables, write report, list and page.

    Raises:
        ValueError: nothing readable, no sample that can be used, or more than `--max_bad_samples` that cannot (the page is
            written first).
    """
    from grace_plugin.data import BadSamplesError, ConversationCollator, load_samples, prepare
    from grace_plugin.data.page import write_page

    start, console = time.monotonic(), Console(file=sys.stdout, markup=False)
    folder = Path(args.output_dir)
    vocabulary, context = _limits(args)
    collator = ConversationCollator(
        _processor(args.model),
        args.max_length,
        args.max_pixels,
        special_tokens=args.special_tokens,
        vocabulary=vocabulary,
        context=context,
    )
    samples = load_samples(args.dataset, args.images)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr, markup=False)) as progress:
        task = progress.add_task("inspecting every sample", total=len(samples))
        found = prepare(
            samples,
            collator,
            max_bad_samples=1.0,
            workers=args.workers,
            decode=not args.headers_only,
            allow_empty=True,
            progress=lambda done, _total: progress.update(task, completed=done),
        )
    found.write_report(folder)
    page = write_page(
        folder / "page.html",
        found,
        collator,
        title=args.dataset,
        model=args.model,
        samples=args.samples,
        seed=args.seed,
    )
    _tables(found.report, console)
    console.print(f"{page} and the report next to it, in {time.monotonic() - start:.1f} s", soft_wrap=True)
    if not found.report["usable"]:
        first = next((entry.message for entry in found.entries if entry.reason), "")
        raise BadSamplesError(f"no sample can be used; the first: {first}")
    bad = 1.0 - found.report["usable"] / found.report["samples"]
    if bad > args.max_bad_samples:
        raise BadSamplesError(
            f"{bad:.1%} of the samples cannot be used, above --max_bad_samples {args.max_bad_samples:.1%}; see "
            f"{folder}/data_rejected.jsonl"
        )
