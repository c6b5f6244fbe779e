"""Where checkpoint B differs from checkpoint A on given rows: by layer, by modality, by question type, and on which rows most.

    damage("bf16-student", "student-int4", "heldout.jsonl", output_dir="report")

A is the reference (usually the BF16 model), B has packed integer weights (usually INT4). Everything that can be refused is
refused before a model is loaded. Findings, all in `report.json` and on `page.html`:

by layer      output error of each quantized linear on A's inputs, error of the weights, share of codes at their bounds; hidden
              error of each decoder layer, accumulated (`layers.py` has the formulas)
by modality   KL(A || B) in nats per supervised token of rows with pictures, and of the same rows with the pictures taken out of
              the prompt (`blind.py` says how)
by type       the same by a row's `type`, `source`, set or id's beginning, with top-1 agreement, and with accuracy of greedy
              answers where a row says which it accepts (`accept`)
worst rows    the largest KL per supervised token, token by token, with their pictures

Costs two models in memory (B dense after its first batch) and their heads in float32; two passes of both over the rows, and
generation for rows with accepted answers. The same rows, models and machine give the same report, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grace_plugin.data import ConversationCollator, Prepared, SampleError, load_samples, prepare
from grace_plugin.data.order import shuffled
from grace_plugin.export.record import environment
from grace_plugin.export.stage import check_destination
from grace_plugin.report.answers import accepted, answers
from grace_plugin.report.blind import blind_row, prompt_text
from grace_plugin.report.examples import examples
from grace_plugin.report.layers import stored_formats
from grace_plugin.report.measure import Measure, over
from grace_plugin.report.page import write_damage
from grace_plugin.report.pair import Pair, read_pair
from grace_plugin.report.summary import by_modality, by_type, overall, set_types, type_of

__all__ = ["damage"]


class _Drawn(Sequence[Any]):
    """`limit` rows of a dataset, drawn by a seed and kept in the dataset's order."""

    def __init__(self, rows: Sequence[Any], limit: int | None, seed: int) -> None:
        self.rows = rows
        everything = range(len(rows))
        some = limit is not None and limit < len(rows)
        self.numbers = sorted(shuffled(len(rows), seed)[:limit].tolist()) if some else list(everything)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.numbers[index]]

    def set_name(self, index: int) -> str | None:
        """The set of a row, where the dataset is a mix of several."""
        sets = getattr(self.rows, "sets", ())
        return sets[self.rows.set_of(self.numbers[index])].name if len(sets) > 1 else None  # type: ignore[attr-defined]


def _usable(rows: _Drawn, collator: ConversationCollator) -> Prepared:
    """Raises ValueError when no row can be used, with the reasons."""
    found = prepare(rows, collator, max_bad_samples=1.0, allow_empty=True)
    if not found.report["usable"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.report["rejected"].items())
        raise ValueError(
            f"none of the {len(rows)} rows can be used ({reasons}). The first: {found.rejected[0]['message']}. `grace data "
            "check` looks at the whole dataset"
        )
    return found


def _blind(rows: _Drawn, usable: list[int], collator: ConversationCollator, pair: Pair) -> tuple[dict, set[int], dict]:
    """Rows without their pictures by number, numbers of the rows with pictures, and what to say of it."""
    blind: dict[int, Any] = {}
    pictured: set[int] = set()
    said: dict[str, Any] = {"refused": 0, "first_refusal": None}
    for number in usable:
        try:
            found = blind_row(rows[number], number, collator, pair.family, pair.a.config)
        except SampleError as error:
            pictured.add(number)
            said["refused"] += 1
            said["first_refusal"] = said["first_refusal"] or str(error)
            continue
        if found is not None:
            pictured.add(number)
            blind[number] = found
    if blind:
        first = min(blind)
        said |= {"prompt": prompt_text(rows[first], collator), "prompt_text_only": prompt_text(blind[first], collator)}
    return blind, pictured, said


def damage(
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
    """Compare two checkpoints on rows; returns the report, and writes it when `output_dir` is given.

    Args:
        a: the reference, folder or hub id; dense or packed.
        b: the checkpoint that is judged, with packed integer weights.
        dataset: what `load_samples` takes, or rows in the messages or LLaVA format.
        output_dir: where `report.json` and `page.html` appear; must not hold anything.
        images: folder that image paths are relative to, for a dataset read from files.
        limit: rows used, drawn by `seed`; None for all.
        max_length: longest row in tokens; longer ones are not used, nothing is cut.
        batch_size: rows run at a time.
        worst: rows shown with their pictures.
        device: where the models run (default: cuda if there is one, else cpu).
        progress: called with (what is done, rows done, rows).

    Raises:
        ValueError: the two cannot be compared, or no row can be used; before a model is loaded.
        FileExistsError: `output_dir` holds something.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is a number of rows, at least 1, got {value}")
    if output_dir is not None:
        check_destination(output_dir)
    pair = read_pair(a, b)
    collator = ConversationCollator(pair.a.processor, max_length)
    given: Any = load_samples(os.fspath(dataset), images) if isinstance(dataset, str | os.PathLike) else dataset
    rows = _Drawn(given, limit, seed)
    prepared = _usable(rows, collator)
    usable = sorted(range(len(rows)), key=lambda n: (-prepared.entries[n].tokens, n))
    usable = [number for number in usable if not prepared.entries[number].reason]
    blind, pictured, said = _blind(rows, usable, collator, pair)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report: dict[str, Any] = {
        "a": {"path": pair.a.path, "quantized": pair.a.scheme is not None},
        "b": {"path": pair.b.path, "quantized": True}, "family": pair.family.model_type,
        "rows": {"given": len(given), "drawn": len(rows), "used": len(usable), "rejected": prepared.report["rejected"]},
        "settings": {"limit": limit, "seed": seed, "batch_size": batch_size, "max_length": max_length, "device": place.type},
        "notes": pair.notes, "vocabulary": pair.vocabulary,
    }  # fmt: skip
    report |= _run(pair, collator, rows, usable, (blind, pictured), place, batch_size, worst, progress)
    report["modality"]["text_only"] = said
    report["environment"] = environment()
    if output_dir is not None:
        write_damage(Path(output_dir), report)
    return report


def _run(
    pair: Pair, collator: ConversationCollator, rows: _Drawn, usable: list[int], pictures: tuple[dict[int, Any], set[int]],
    device: torch.device, batch_size: int, worst: int, progress: Callable[[str, int, int], None] | None,
) -> dict[str, Any]:  # fmt: skip
    """Load both models and measure; the findings."""
    blind, pictured = pictures
    a, b = pair.a.load(), pair.b.load()
    formats = stored_formats(b)
    if not formats:
        raise ValueError(
            f"checkpoint B at {pair.b.path!r} loads without a single packed layer; is its config.json its own?"
        )
    for name, stored in stored_formats(a).items():
        if name in formats:
            formats[name] |= {"clip_share_a": stored["clip_share"], "bits_a": stored["bits"]}
    measure = Measure(
        (a.to(device), b.to(device)), pair.family, pair.vocabulary, list(formats), collator, worst
    )  # fmt: skip
    done = dict.fromkeys(("rows", "rows without pictures"), 0)

    def tell(what: str, total: int) -> Callable[[int], None]:
        def advance(count: int) -> None:
            done[what] += count
            if progress is not None:
                progress(what, done[what], total)

        return advance

    over(
        usable,
        batch_size,
        lambda part: measure.batch(part, [rows[n] for n in part], pictured),
        tell("rows", len(usable)),
    )
    unseen = [number for number in usable if number in blind]
    over(
        unseen, batch_size, lambda part: measure.blind(part, [blind[n] for n in part]),
        tell("rows without pictures", len(unseen)),
    )  # fmt: skip
    records = [measure.records[number] for number in sorted(usable)]
    asked = {one.number: one.start for one in records if accepted(rows[one.number])}
    for number, both in answers(measure.models, collator, rows, asked, batch_size).items():
        measure.records[number].answers = both
        measure.records[number].right = [one in accepted(rows[number]) for one in both]
    set_types(records, {one.number: type_of(rows[one.number], rows.set_name(one.number)) for one in records})
    return {
        "overall": overall(records), "layers": measure.layers.linear_findings(formats),
        "decoder_layers": measure.layers.hidden_findings(), "modality": by_modality(records), "types": by_type(records),
        "worst": examples(measure, rows, rows.numbers),
    }  # fmt: skip
