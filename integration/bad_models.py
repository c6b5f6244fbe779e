"""Students, teachers and checkpoints that are incomplete, quantized, adapted, mismatched or corrupted, through every command.

    python -m integration.bad_models [CASE ...] [--output FILE.json] [--work FOLDER]

Each case is one made folder of a tiny model. It goes through `train`, `oneshot` and `teacher cache` as student or teacher, or
through `verify` as a finished checkpoint. A case passes where every command does what the case expects, and

- a refusal is a ValueError, FileExistsError or FileNotFoundError (for `verify` a VerificationError too) of at most ten lines
  and 2,000 characters whose text names the cause, raised before the first step, with no file left and the input unchanged;
- a run that works ends verified, with the weights of the run that it must equal where the case names one.

The exit status is 1 where a case does something else. About 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import TrainerCallback

import grace_plugin
from grace_plugin import VerificationError
from grace_plugin.export.record import environment
from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher import build_cache
from integration.bad_model_cases import CACHE, Case, Materials, cases
from tests.pairs import Pair, recipe_text, run
from tests.tiny import make_samples

REFUSALS = (ValueError, FileExistsError, FileNotFoundError)
LINES, CHARACTERS = 10, 2_000


# ---- commands ---------------------------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """Count the steps that a run begins."""

    def __init__(self) -> None:
        self.begun = 0

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self.begun += 1


def commands(case: Case, made: Materials, folder: Any, out: Path, steps: Steps) -> dict[str, Callable[[], Any]]:
    """Return the commands of a case by name; each call writes to a folder of its own under `out`."""
    if case.role == "checkpoint":
        return {"verify": lambda: grace_plugin.verify(folder)}
    given: Pair = getattr(made, case.pair)
    if case.name.startswith("student: one layer"):
        given = made.shallow
    used = given._replace(**{case.role: folder})
    block = {"model": str(used.teacher), "dtype": "auto" if case.role == "teacher" else "float32"}

    def recipe(**teacher: Any) -> str:
        rates = {"epochs": 1.0, "learning_rate": 1e-3}
        return recipe_text(None, teacher=block | teacher, oneshot=rates, **case.recipe)

    def train(kind: str) -> Any:
        where = out / kind / "checkpoint"
        more = {"cache": str(out / "cache")} if kind == "cached" else {}
        return run(used, where, recipe=recipe(kind=kind, **more), max_steps=1, callbacks=[steps])

    def oneshot() -> Any:
        return grace_plugin.oneshot(
            str(used.student), recipe=recipe(), dataset=make_samples(4), output_dir=out / "oneshot" / "checkpoint",
            batch_size=2,
            num_calibration_samples=4,
        )  # fmt: skip

    def cache() -> Any:
        asked = TeacherRecipe(model=block["model"], dtype=block["dtype"])
        visual = case.recipe.get("relational", {}).get("enabled", True)
        return build_cache(
            str(used.student),
            teacher=asked,
            dataset=make_samples(4),
            output_dir=out / "cache",
            batch_size=2,
            visual=visual,
        )

    found: dict[str, Callable[[], Any]] = {"train": lambda: train("resident"), "oneshot": oneshot, CACHE: cache}
    if case.role == "teacher":
        found |= {"train offload": lambda: train("offload"), "train cached": lambda: train("cached")}
    return found


@dataclass
class Outcome:
    """The outcome of a command. lines: of the message. problem: what it should not have done; empty where it passed."""

    case: str
    command: str
    outcome: str
    said: str
    lines: int
    seconds: float
    problem: str


def listing(folder: Any) -> dict[str, tuple[int, int]]:
    """Return length and modification time of every file under a folder."""
    path = Path(folder)
    return {
        str(file.relative_to(path)): (file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def attempt(command: Callable[[], Any]) -> tuple[str, str, Any]:
    """Run a command; return ("works" | "refused" | "failed", message, result)."""
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "works", "", command()
    except (*REFUSALS, VerificationError) as error:
        return "refused", str(error), None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})", None


def problem_of(case: Case, name: str, done: tuple[str, str, Any], left: list[str], steps: int, changed: bool) -> str:
    """Return what is wrong with an outcome, "" where nothing is."""
    outcome, said, result = done
    expected = "works" if case.refused is None or name in case.works_in else "refused"
    if outcome != expected:
        return f"{outcome}, expected: {expected}"
    if outcome == "refused":
        length = f"{len(said.splitlines())} lines, {len(said)} characters"
        checks = {
            f"says nothing like {case.refused!r}": re.search(str(case.refused), said, re.DOTALL) is None,
            f"{length} of message": len(said.splitlines()) > LINES or len(said) > CHARACTERS,
            f"left {', '.join(left[:3])}": bool(left),
            f"{steps} step(s) begun": steps > 0,
            "changed the input": changed and case.role != "checkpoint",  # `verify` writes its verdict into the folder
        }
        return "; ".join(text for text, wrong in checks.items() if wrong)
    verified = getattr(result, "verification", result if isinstance(result, dict) else {"verified": True})["verified"]
    return "" if verified else "not verified"


def try_case(case: Case, made: Materials, work: Path, kept: dict[tuple[str, str], bytes]) -> list[Outcome]:
    """Run the commands of a case; `kept` holds the weights of runs that others must equal."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with contextlib.redirect_stderr(io.StringIO()):
        folder, outcomes, out = case.make(made, work / "model"), [], work / "out"
    steps = Steps()
    for name, command in commands(case, made, folder, out, steps).items():
        if name == "train cached" and not (out / "cache").is_dir():
            continue  # there is no cache of a teacher that was refused
        before, steps.begun, started = listing(folder), 0, time.monotonic()
        held = set(listing(out)) if out.is_dir() else set()
        done = attempt(command)
        seconds = time.monotonic() - started
        left = sorted(set(listing(out)) - held) if out.is_dir() else []
        problem = problem_of(case, name, done, left, steps.begun, listing(folder) != before)
        if done[0] == "works" and hasattr(done[2], "checkpoint") and not problem:
            bits = (done[2].checkpoint / "model.safetensors").read_bytes()
            kept[case.name, name] = bits
            if case.like is not None and kept.get((case.like, name)) != bits:
                problem = f"other weights than {case.like!r}"
        outcomes.append(
            Outcome(case.name, name, done[0], done[1], len(done[1].splitlines()), round(seconds, 2), problem)
        )
    shutil.rmtree(work, ignore_errors=True)
    return outcomes


def try_all(chosen: Iterable[Case], work: Path, show: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
    """Run the cases and return every outcome, in order."""
    made, kept, found = Materials(work / "materials"), {}, []  # type: ignore[var-annotated]
    (work / "materials").mkdir(parents=True, exist_ok=True)
    for case in chosen:
        for outcome in try_case(case, made, work / "case", kept):
            found.append(outcome)
            show(outcome)
    return found


def shown(outcome: Outcome) -> None:
    text = re.sub(r"\S*/(case|materials)/", "", " ".join((outcome.problem or outcome.said).split()))
    mark = "FAIL" if outcome.problem else "ok"
    print(
        f"{mark:4} {outcome.case:48} {outcome.command:14} {outcome.outcome:8} {outcome.seconds:5.1f} s  {text[:120]}",
        flush=True,
    )


def main() -> int:
    """Try every case that was named, or all; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="parts of the names of cases; all by default")
    parser.add_argument("--output", type=Path, help="write every outcome as JSON")
    parser.add_argument("--work", type=Path, help="folder for models; a temporary one by default")
    asked = parser.parse_args()
    chosen = [case for case in cases() if not asked.cases or any(part in case.name for part in asked.cases)]
    with tempfile.TemporaryDirectory(prefix="bad-models-") as folder:
        work, started = asked.work or Path(folder), time.monotonic()
        found = try_all(chosen, work, shown)
        seconds = round(time.monotonic() - started, 1)
        bad = [outcome for outcome in found if outcome.problem]
        counts = {kind: sum(outcome.outcome == kind for outcome in found) for kind in ("works", "refused", "failed")}
        summary = {"folders": len(chosen), "commands": len(found), **counts, "violations": len(bad), "seconds": seconds}
        print(json.dumps(summary))
        if asked.output is not None:
            written = [asdict(one) | {"said": one.said.replace(str(work), "WORK")} for one in found]
            record = {
                "command": " ".join(["python -m integration.bad_models", *sys.argv[1:]]), "environment": environment(),
                "summary": summary, "outcomes": written,
            }  # fmt: skip
            asked.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
