"""Compare two checkpoints on samples: by layer, by modality, by question type, and on which samples they differ most.

    compare_checkpoints("bf16-student", "student-int4", "heldout.jsonl", output_dir="report")

A is the reference (usually the BF16 model), B has packed integer weights. The result, in `report.json` and on `page.html`:

by layer        output error of each quantized linear on A's inputs, error of the weights, share of codes at their bounds;
                hidden error of each decoder layer (`layer_errors.py` has the formulas)
by modality     KL(A || B) in nats per supervised token of samples with images, and of the same samples without them
by type         the same by a sample's `type`, `source`, set or beginning of its id, with top-1 agreement, and with accuracy of
                greedy answers where a sample says which it accepts (`accept`)
worst samples   the largest KL per supervised token, token by token, with their images

Cost: two models in memory (B dense after its first batch) and their heads in float32; two passes of both over the samples, and
generation for samples with accepted answers. The same samples, models and machine give the same report, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grace_plugin.data import ConversationCollator, Prepared, SampleError, draw_samples, load_samples, prepare
from grace_plugin.data.mix import DrawnSamples
from grace_plugin.export.record import environment
from grace_plugin.export.stage import check_destination
from grace_plugin.report.answers import accepted, answers
from grace_plugin.report.checkpoints import CheckpointPair, read_pair
from grace_plugin.report.html import write_comparison
from grace_plugin.report.layer_errors import stored_formats
from grace_plugin.report.samples import PairRunner, worst_entries
from grace_plugin.report.summary import by_modality, by_type, overall, set_types, type_of
from grace_plugin.report.text_only import prompt_text, text_only_sample


class _TextOnly(NamedTuple):
    """samples: text-only samples by number. with_images: numbers of the samples that have images. said: for the report."""

    samples: dict[int, dict[str, Any]]
    with_images: set[int]
    said: dict[str, Any]


def _usable(samples: DrawnSamples, collator: ConversationCollator) -> tuple[Prepared, list[int]]:
    """Find the samples that can be used, longest first, so that memory runs out at the start or not at all.

    Raises:
        ValueError: there is none; gives the reasons.
    """
    found = prepare(samples, collator, max_bad_samples=1.0, allow_empty=True)
    if not found.report["usable"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.report["rejected"].items())
        raise ValueError(
            f"none of the {len(samples)} samples can be used ({reasons}). The first: {found.rejected[0]['message']}. "
            "`grace data check` inspects the whole dataset"
        )
    usable = [number for number in range(len(samples)) if not found.entries[number].reason]
    return found, sorted(usable, key=lambda n: (-found.entries[n].tokens, n))


def _text_only(
    samples: DrawnSamples, usable: list[int], collator: ConversationCollator, pair: CheckpointPair
) -> _TextOnly:
    found = _TextOnly({}, set(), {"refused": 0, "first_refusal": None})
    for number in usable:
        try:
            made = text_only_sample(samples[number], samples.number(number), collator, pair.family, pair.a.config)
        except SampleError as error:
            found.with_images.add(number)
            found.said["refused"] += 1
            found.said["first_refusal"] = found.said["first_refusal"] or str(error)
            continue
        if made is not None:
            found.with_images.add(number)
            found.samples[number] = made
    if found.samples:
        first = min(found.samples)
        found.said["prompt"] = prompt_text(samples[first], collator)
        found.said["prompt_text_only"] = prompt_text(found.samples[first], collator)
    return found


def compare_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    dataset: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    images: str | None = None,
    limit: int | None = 512,
    max_length: int | None = None,
    batch_size: int = 8,
    worst: int = 12,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare two checkpoints on samples; returns the report, and writes it when `output_dir` is given.

    Args:
        a: the reference, folder or hub id; dense or packed.
        b: the checkpoint compared with it, with packed integer weights.
        dataset: what `load_samples` takes, or samples in the messages or LLaVA format.
        output_dir: where `report.json` and `page.html` appear; must not hold anything.
        images: folder that image paths are relative to, for a dataset read from files.
        limit: samples used, drawn by `seed`; None for all.
        max_length: longest sample in tokens; longer ones are not used, nothing is cut.
        batch_size: samples run at a time.
        worst: samples shown with their images.
        device: where the models run (default: cuda if there is one, else cpu).
        progress: called with (what is done, samples done, samples).

    Raises:
        ValueError: the two cannot be compared, or no sample can be used; before any weights are loaded.
        FileExistsError: `output_dir` holds something.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is a number of samples, at least 1, got {value}")
    if output_dir is not None:
        check_destination(output_dir)
    pair = read_pair(a, b)
    collator = ConversationCollator(pair.a.processor, max_length)
    given: Any = load_samples(os.fspath(dataset), images) if isinstance(dataset, str | os.PathLike) else dataset
    samples = draw_samples(given, len(given) if limit is None else limit, seed)
    # from here on samples are collated: everything that can be refused without that has been
    prepared, usable = _usable(samples, collator)
    text_only = _text_only(samples, usable, collator, pair)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    counts = {"given": len(given), "drawn": len(samples), "used": len(usable), "rejected": prepared.report["rejected"]}
    settings = {"limit": limit, "seed": seed, "batch_size": batch_size, "max_length": max_length, "device": place.type}
    report: dict[str, Any] = {
        "a": {"path": pair.a.path, "quantized": pair.a.scheme is not None},
        "b": {"path": pair.b.path, "quantized": True},
        "family": pair.family.model_type,
        "samples": counts,
        "settings": settings,
        "notes": pair.notes,
        "vocabulary": pair.vocabulary,
    }
    runner, formats = _runner(pair, collator, place, worst)
    report |= _run(runner, formats, samples, usable, text_only, batch_size, progress)
    report["environment"] = environment()
    if output_dir is not None:
        write_comparison(Path(output_dir), report)
    return report


def _runner(
    pair: CheckpointPair, collator: ConversationCollator, device: torch.device, worst: int
) -> tuple[PairRunner, dict[str, Any]]:
    """Load both models; returns what runs them and how each layer of B is stored."""
    a, b = pair.a.load(), pair.b.load()
    formats = stored_formats(b)
    if not formats:
        raise ValueError(
            f"checkpoint B at {pair.b.path!r} loads without a single packed layer; is its config.json its own?"
        )
    for name, stored in stored_formats(a).items():
        if name in formats:
            formats[name] |= {"clip_share_a": stored["clip_share"], "bits_a": stored["bits"]}
    models = (a.to(device), b.to(device))
    return PairRunner(models, pair.family, pair.vocabulary, list(formats), collator, worst), formats


def _run(
    runner: PairRunner,
    formats: dict[str, Any],
    samples: DrawnSamples,
    usable: list[int],
    text_only: _TextOnly,
    batch_size: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, Any]:
    """Run both models over the samples, with images and without."""
    without = [number for number in usable if number in text_only.samples]
    passes: tuple[tuple[str, list[int], Callable[[list[int]], None]], ...] = (
        ("samples", usable, lambda part: runner.run(part, [samples[n] for n in part], text_only.with_images)),
        (
            "samples without images",
            without,
            lambda part: runner.run_text_only(part, [text_only.samples[n] for n in part]),
        ),
    )
    for what, numbers, run in passes:
        for first in range(0, len(numbers), batch_size):
            part = numbers[first : first + batch_size]
            run(part)
            if progress is not None:
                progress(what, first + len(part), len(numbers))
    records = [runner.records[number] for number in sorted(usable)]
    asked = {one.number: one.start for one in records if accepted(samples[one.number])}
    for number, both in answers(runner.models, runner.collator, samples, asked, batch_size).items():
        runner.records[number].answers = both
        runner.records[number].right = [one in accepted(samples[number]) for one in both]
    sets = samples.sets
    names = {n: sets[samples.set_of(n)].name if len(sets) > 1 else None for n in usable}
    set_types(records, {number: type_of(samples[number], name) for number, name in names.items()})
    return {
        "overall": overall(records),
        "layers": runner.layers.linear_findings(formats),
        "decoder_layers": runner.layers.hidden_findings(),
        "modality": by_modality(records) | {"text_only": text_only.said},
        "types": by_type(records),
        "worst": worst_entries(runner, samples, samples.numbers.tolist()),
    }
