"""The report of a training, from the log that it writes: every metric over the optimizer steps.

Reads `metrics.jsonl` of `<output_dir>.run`, which a run writes as it goes, so it may still be running; else the log inside the
latest `checkpoint-*/trainer_state.json`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_plugin.export.stage import check_destination
from grace_plugin.objective.terms import TERMS, Chart
from grace_plugin.report.charts import line_chart
from grace_plugin.report.html import write_report
from grace_plugin.run.grace_run import run_folder
from grace_plugin.run.metrics import METRICS

STATE = "trainer_state.json"

RUN_CHARTS = (
    Chart("Clipped weights", "share of quantized weights", {"clip_share": "clipped"}),
    Chart("Loss as trained", "sum of all terms", {"loss": "loss"}),
    Chart("Evaluation", "nats per token", {"eval_loss": "eval loss"}),
    Chart("Learning rate", "of the weights", {"learning_rate": "learning rate"}),
    Chart("Norm of the gradient", "before clipping", {"grad_norm": "norm"}),
)
"""Of what Trainer and the quantizer log; the loss terms name their own charts."""


def _charts(entries: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return the charts of all registered loss terms, of losses that none of them shows, and of the run."""
    terms = [chart for term in TERMS.values() for chart in term.charts]
    known = {key for chart in terms for key in chart.series}
    # a term from outside the package is not registered in the process that makes the report
    others = sorted({key for entry in entries for key in entry if key.startswith("loss_")} - known)
    return [
        *terms,
        *(Chart(f"Loss term {key.removeprefix('loss_')}", "as logged", {key: key}) for key in others),
        *RUN_CHARTS,
    ]


def _numbered(folder: Path) -> int:
    found = re.search(r"(\d+)$", folder.name)
    return int(found[1]) if found else -1


def _find(run: Path) -> Path | None:
    if run.is_file():
        return run
    for folder in (run, run_folder(run)):
        if (folder / METRICS).is_file():
            return folder / METRICS
        # by number: as text checkpoint-10 comes before checkpoint-9
        states = sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda path: _numbered(path.parent))
        found = [folder / STATE, *states[-1:]]
        for path in found:
            if path.is_file():
                return path
    return None


def read_log(run: str | os.PathLike[str]) -> tuple[Path, list[dict[str, Any]]]:
    """Return the file and the entries of a run's log, each with its optimizer step.

    Args:
        run: the run's output_dir, its `.run` folder, a resume state in it, or one of the two files.

    Raises:
        ValueError: no log there, or nothing logged yet.
    """
    path = _find(Path(run))
    if path is None:
        raise ValueError(
            f"no log of a training at {os.fspath(run)!r}: neither {METRICS} nor a resume state's {STATE} there or in "
            f"{run_folder(run)}. Give the output_dir of `grace train`, or two checkpoints with --compare A B --dataset FILE"
        )
    text = path.read_text(encoding="utf-8")
    try:
        if path.name.endswith(".jsonl"):
            # a running training may be about to write the rest of the last line
            whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
            entries = [json.loads(line) for line in whole]
        else:
            entries = json.loads(text)["log_history"]
        entries = [entry for entry in entries if isinstance(entry.get("step"), int)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not the log of a training: {error}") from error
    if not entries:
        raise ValueError(f"{path} holds no logged step yet; --set logging_steps=N says how often a run logs")
    return path, entries


def _points(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float | None]]:
    return [(entry["step"], entry[key]) for entry in entries if key in entry]


def _spread(name: str, points: Sequence[tuple[float, float | None]]) -> dict[str, Any]:
    known = [value for _, value in points if value is not None]
    return {
        "name": name,
        "first": known[0] if known else None,
        "last": known[-1] if known else None,
        "least": min(known, default=None),
        "most": max(known, default=None),
        "not_finite": len(points) - len(known),
    }


def training(run: str | os.PathLike[str], *, output_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Report on a finished or running training; the report is written to `output_dir` when that is given.

    Args:
        run: the run's output_dir, its `.run` folder, a resume state in it, or one of the two files.
        output_dir: where `report.json` and `page.html` appear; must not hold anything.

    Raises:
        ValueError: no log, or nothing logged yet.
        FileExistsError: `output_dir` holds something.
    """
    if output_dir is not None:
        check_destination(output_dir)
    path, entries = read_log(run)
    # an entry of an evaluation or of the end lacks the step's metrics, so the last value of each is taken
    last = {key: value for entry in entries for key, value in entry.items()}
    charts, table = [], []
    for title, unit, names in _charts(entries):
        series = {said: _points(entries, key) for key, said in names.items()}
        series = {said: points for said, points in series.items() if points}
        if series:
            table += [_spread(f"{title}: {said}", points) for said, points in series.items()]
            charts.append({"title": title, "unit": unit, "svg": line_chart(series)})
    warnings = []
    if last.get("nonfinite_steps"):
        warnings.append(
            f"{last['nonfinite_steps']:g} steps had a loss or gradient that was not finite and were skipped."
        )
    report = {
        "run": os.fspath(run),
        "log": str(path),
        "steps": last["step"],
        "epoch": last.get("epoch"),
        "entries": entries,
        "finished": "train_runtime" in last,
        "warnings": warnings,
        "values": table,
    }
    if output_dir is not None:
        write_report(Path(output_dir), "training.html.j2", report, title=os.fspath(run), charts=charts)
    return report
