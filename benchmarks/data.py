"""How fast rows are looked at, and what share of a step the model has to itself while images are read from disk.

    python -m benchmarks.data [--rows 10000] [--steps 40] [--out FILE]

The check reads LLaVA rows with JPEG pictures of 640 x 480 (one file a row) in two processes, as `grace data check` does.
The loading figure is a real `train` of a LLaVA pair in the demo's shapes on scenes saved as PNG files, with one loader
process: time between asking the loader for a window and having it, over the time of the steps. Wall seconds and processor
seconds both stand in the JSON, since a busy machine stretches the first and not the second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from grace_plugin import train
from grace_plugin.artifact.layout import environment
from grace_plugin.data import ConversationCollator, load_rows, prepare
from grace_plugin.data.page import write_page
from grace_plugin.demo.pair import make_config, make_processor, save_pair_member
from grace_plugin.demo.scenes import training_rows
from grace_plugin.run.trainer import GraceTrainer

LIMIT_SECONDS, LEAST_SHARE = 120.0, 0.9


def processor_seconds() -> float:
    """User and system seconds of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def check(folder: Path, rows: int, workers: int) -> dict[str, float]:
    """Look at `rows` rows with a picture each and write the page."""
    (folder / "pictures").mkdir(parents=True)
    draw = np.random.default_rng(0)
    photos = []
    for _ in range(16):  # smooth noise compresses about as photographs do
        small = Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        photos.append(small.resize((640, 480), Image.Resampling.BICUBIC))
    with (folder / "rows.jsonl").open("w") as out:
        for number in range(rows):
            name = f"pictures/{number}.jpg"
            photos[number % len(photos)].save(folder / name, quality=85)
            talk = [{"from": "human", "value": f"<image>\nhow many dogs are there in row {number % 3}?"},
                    {"from": "gpt", "value": "two dogs left of the apple " * (1 + number % 4)}]  # fmt: skip
            out.write(json.dumps({"id": number, "image": name, "conversations": talk}) + "\n")
    collator = ConversationCollator(make_processor())
    wall, used = time.monotonic(), processor_seconds()
    found = prepare(load_rows(str(folder / "rows.jsonl")), collator, workers=workers, cache=folder / "cache")
    write_page(folder / "page.html", found, collator, title="benchmark", model="demo")
    return {
        "rows": rows, "workers": workers, "usable": found.report["usable"],
        "wall_seconds": round(time.monotonic() - wall, 2), "processor_seconds": round(processor_seconds() - used, 2),
        "limit_seconds": LIMIT_SECONDS,
    }  # fmt: skip


class Waiting:
    """Time from asking for an accumulation window to having it, of every step but the first."""

    def __init__(self) -> None:
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

            self.starts.append(time.monotonic())
            return get(trainer, clocked(), *args, **kwargs)

        return timed


def load(folder: Path, steps: int, batch_size: int) -> dict[str, float]:
    """Share of step time in the model for a pair in the demo's shapes."""
    import torch
    from transformers import LlavaForConditionalGeneration

    for name, shape in {"student": (128, 2, 256, 32), "teacher": (256, 3, 512, 64)}.items():
        torch.manual_seed(0)
        save_pair_member(LlavaForConditionalGeneration(make_config(*shape)), folder / name)
    (folder / "scenes").mkdir()
    rows = []
    for number, row in enumerate(training_rows(0, steps * batch_size)):
        row["images"][0].save(folder / "scenes" / f"{number}.png")
        rows.append({"id": row["id"], "messages": row["messages"], "images": [f"scenes/{number}.png"]})
    (folder / "scenes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"scheme": "W4A16", "teacher": {"model": str(folder / "teacher"), "dtype": "float32"}}
    recipe = yaml.safe_dump({"grace_stage": {"grace_modifiers": {"GraceModifier": asked}}})
    waiting = Waiting()
    original = GraceTrainer.get_batch_samples
    GraceTrainer.get_batch_samples = waiting.around(original)  # type: ignore[method-assign]
    try:
        train(
            str(folder / "student"), recipe=recipe,
            dataset=load_rows(str(folder / "scenes.jsonl")), output_dir=folder / "out", max_steps=steps,
            per_device_train_batch_size=batch_size, dataloader_num_workers=1, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
    finally:
        GraceTrainer.get_batch_samples = original  # type: ignore[method-assign]
    counted = len(waiting.starts) - 2  # the first step warms up, the last has no next one to end it
    total, waited = waiting.starts[-1] - waiting.starts[1], sum(waiting.waits[1 : 1 + counted])
    return {
        "steps": counted, "batch_size": batch_size, "step_ms": round(1000 * total / counted, 1),
        "wait_ms": round(1000 * waited / counted, 2), "share_in_model": round(1 - waited / total, 4),
        "least_share": LEAST_SHARE,
    }  # fmt: skip


def main() -> None:
    """Run both, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grace-data-") as folder:
        os.environ["GRACE_CACHE"] = str(Path(folder) / "index")
        found: dict[str, Any] = {"load": load(Path(folder) / "load", args.steps, args.batch_size)}
        found["check"] = check(Path(folder) / "check", args.rows, args.workers)
    found["load_average"] = os.getloadavg()
    found["command"] = " ".join(["python", "-m", "benchmarks.data", *sys.argv[1:]])
    found["environment"] = environment()
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("load", "check", "load_average")}, indent=1))


if __name__ == "__main__":
    main()
