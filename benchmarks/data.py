"""How fast `grace data check` is, and what share of a step the model has to itself while images are read from disk.

    python -m benchmarks.data [check|load] [--samples 10000] [--families qwen2_vl smolvlm ...]

check: the command itself, page and report included, on LLaVA samples with one JPEG file each (400 sizes of 640 x 480 and
around, one in ten a megapixel; one sample in ten is text), in two processes and with nothing remembered, for processors with
the image settings of released checkpoints.
load: `train` of the bundled demo pair on its scenes as PNG files, with one loader process (and with none, where loading is
inside the step): time between asking for a batch and having it, over the time of the steps. A third run has every batch
collated before the first step: what loading costs where it shares the cores, waited for or not. The exit status is 1 when a
bar (LIMIT_SECONDS, LEAST_SHARE with one loader) is missed.

Wall seconds and processor seconds (loader processes included) are both in the JSON under results/data, since a busy machine
stretches the first and not the second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.released import SETTINGS, released
from examples.bundled_demo.images import SIZE
from examples.bundled_demo.methods import STUDENT, TEACHER, Budget, read_modifier
from examples.bundled_demo.run import RECIPE
from examples.bundled_demo.scenes import training_samples
from grace_plugin import train
from grace_plugin.cli import commands
from grace_plugin.cli.register_grace import DATA_COMMANDS
from grace_plugin.data import load_samples
from grace_plugin.export.record import environment
from grace_plugin.run.trainer import GraceTrainer

RESULTS = Path(__file__).parent / "results" / "data"
LIMIT_SECONDS, LEAST_SHARE = 120.0, 0.9
PHOTOS = 400


def processor_seconds() -> float:
    """User and system seconds of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def write_photos(folder: Path, samples: int) -> Path:
    """`samples` LLaVA samples with a JPEG file each; smooth noise compresses about as photographs do."""
    (folder / "pictures").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(PHOTOS):
        small = Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        wide = (1280, 768 + number) if number % 10 == 0 else (640, 320 + number % 320)
        sides = wide if number % 3 else wide[::-1]
        small.resize(sides, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)
    photos = [(folder / f"{number}.jpg").read_bytes() for number in range(PHOTOS)]
    with (folder / "samples.jsonl").open("w") as out:
        for number in range(samples):
            text = f"how many dogs are there in sample {number % 3}?"
            answer = {"from": "gpt", "value": "two dogs left of the apple " * (1 + number % 4)}
            sample: dict[str, Any] = {"id": number, "conversations": [{"from": "human", "value": text}, answer]}
            if number % 10 != 9:
                (folder / "pictures" / f"{number}.jpg").write_bytes(photos[draw.integers(PHOTOS)])
                sample["image"] = f"pictures/{number}.jpg"
                sample["conversations"][0]["value"] = f"<image>\n{text}"
            out.write(json.dumps(sample) + "\n")
    return folder / "samples.jsonl"


def check(dataset: Path, samples: int, families: list[str], workers: int) -> dict[str, Any]:
    """The command on `dataset` with each family's processor."""
    found: dict[str, Any] = {"samples": samples, "workers": workers, "limit_seconds": LIMIT_SECONDS, "families": {}}
    name, _help, declare = DATA_COMMANDS[0]
    for family in families:
        folder = dataset.parent / family
        released(family).save_pretrained(folder / "model")
        os.environ["GRACE_CACHE"] = str(folder / "index")
        parser = ArgumentParser()
        declare(parser)
        given = [
            str(dataset),
            "--model",
            str(folder / "model"),
            "--output_dir",
            str(folder / "out"),
            "--workers",
            str(workers),
        ]
        wall, used = time.monotonic(), processor_seconds()
        if status := commands.run(f"data {name}", parser.parse_args(given)):
            raise SystemExit(status)
        report = json.loads((folder / "out" / "data_report.json").read_text())
        found["families"][family] = {
            "wall_seconds": round(time.monotonic() - wall, 1),
            "processor_seconds": round(processor_seconds() - used, 1),
            "usable": report["usable"],
            "visual_tokens_mean": report["visual_tokens"]["mean"],
        }
    return found


class Waiting:
    """Time from asking for an accumulation window to having it, of every step but the first.

    beforehand: all batches are made when the first is requested.
    """

    def __init__(self, beforehand: bool = False) -> None:
        self.beforehand, self.made = beforehand, iter(())  # type: ignore[var-annotated]
        self.waits: list[float] = []
        self.starts: list[float] = []

    def around(self, get: Any) -> Any:
        """`GraceTrainer.get_batch_samples`, timed up to the point where the batches are there."""

        def timed(trainer: GraceTrainer, iterator: Any, *args: Any, **kwargs: Any) -> Any:
            def clocked() -> Any:
                while True:
                    begin = time.monotonic()
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
                    self.waits.append(time.monotonic() - begin)
                    yield batch

            if self.beforehand and not self.starts:
                self.made = iter(list(iterator))
            if self.beforehand:
                iterator = self.made
            self.starts.append(time.monotonic())
            return get(trainer, clocked(), *args, **kwargs)

        return timed


def load(folder: Path, steps: int, workers: int, beforehand: bool = False) -> dict[str, Any]:
    """Return the share of step time in the model for the demo's models, learning rate and batch size."""
    (folder / "scenes").mkdir(parents=True)
    samples = []
    for number, sample in enumerate(training_samples(0, steps * Budget.batch_size)):
        sample["images"][0].save(folder / "scenes" / f"{number}.png")
        samples.append({"id": sample["id"], "messages": sample["messages"], "images": [f"scenes/{number}.png"]})
    (folder / "scenes.jsonl").write_text("\n".join(map(json.dumps, samples)))
    waiting = Waiting(beforehand)
    original = GraceTrainer.get_batch_samples
    GraceTrainer.get_batch_samples = waiting.around(original)  # type: ignore[method-assign]
    used = processor_seconds()
    try:
        train(
            str(STUDENT),
            recipe=read_modifier(RECIPE, 4),
            teacher=TEACHER,
            dataset=load_samples(str(folder / "scenes.jsonl")),
            output_dir=folder / "out",
            max_steps=steps,
            per_device_train_batch_size=Budget.batch_size,
            learning_rate=Budget.learning_rate,
            dataloader_num_workers=workers,
            use_cpu=True,
            disable_tqdm=True,
        )
    finally:
        GraceTrainer.get_batch_samples = original  # type: ignore[method-assign]
    counted = len(waiting.starts) - 2  # the first step warms up, the last has no next one to end it
    total, waited = waiting.starts[-1] - waiting.starts[1], sum(waiting.waits[1 : 1 + counted])
    return {
        "steps": counted,
        "batch_size": Budget.batch_size,
        "image_pixels": SIZE,
        "loader_processes": "beforehand" if beforehand else workers,
        "step_ms": round(1000 * total / counted, 1),
        "wait_ms": round(1000 * waited / counted, 2),
        "share_in_model": round(1 - waited / total, 4),
        "least_share": LEAST_SHARE,
        "processor_seconds": round(processor_seconds() - used, 1),
    }


def keep(name: str, found: dict[str, Any], out: Path) -> None:
    """Write a result with load, command and environment."""
    found |= {
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "command": " ".join(["python", "-m", "benchmarks.data", *sys.argv[1:]]),
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def show(title: str, samples: list[dict[str, Any]]) -> None:
    """Print results as a table."""
    table = Table(*samples[0], title=title)
    for sample in samples:
        table.add_row(*map(str, sample.values()))
    Console(width=150).print(table)


def main() -> int:
    """Run the chosen parts (both by default), print and write the JSON; return 1 when a limit is missed."""
    missed = False
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["check", "load"])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2, help="processes of the check")
    parser.add_argument("--families", nargs="*", choices=[*SETTINGS, []], default=["llava", "qwen2_vl", "smolvlm"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grace-data-") as name:
        folder = Path(name)
        os.environ["GRACE_CACHE"] = str(folder / "index")
        if args.what != "check":
            runs = [load(folder / f"load{workers}", args.steps, workers) for workers in (1, 0)]
            runs.append(load(folder / "beforehand", args.steps, 0, beforehand=True))
            keep("load", {"runs": runs}, args.out)
            show("loading, demo pair", runs)
            missed |= runs[0]["share_in_model"] < LEAST_SHARE
        if args.what != "load":
            found = check(write_photos(folder / "check", args.samples), args.samples, args.families, args.workers)
            keep("check", found, args.out)
            show(
                f"grace data check, {args.samples:,} samples",
                [{"family": k, **v} for k, v in found["families"].items()],
            )
            missed |= max(one["wall_seconds"] for one in found["families"].values()) > LIMIT_SECONDS
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
