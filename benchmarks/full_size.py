"""A whole `train` at the shapes of Qwen3-VL-2B under its 8B teacher, random weights: from files to a verified checkpoint.

    python -m benchmarks.full_size [--teacher resident|cached|self] [--method full|scales|lora] [--steps 8] [--batch 4]

What is real: `train` itself with its checks, Trainer, the kernels, the files. What is not: the weights, drawn at random, and a
tokenizer of some hundred words below a head of 151,936 rows. Rows hold two images of 256 tokens each and about 500 supervised
tokens. Seconds of each part, peak memory of the device and of the process, and what verification found, as JSON.

`--serve FOLDER` leaves the checkpoint, questions and transformers' answers there as `integration.serve_cuda` reads them:
`python -m integration.serve_cuda serve FOLDER qwen3_vl --serve-python PYTHON` then asks vLLM. Answers of random weights have no
margin: what counts there are log-probabilities, not tokens. `--shrink` divides the shapes (by 8 by default without CUDA).
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import grace_plugin
from benchmarks.speed.step import STUDENT, TEACHER, shaped
from grace_plugin.export.record import environment
from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher import build_cache
from integration.serve_cuda import record
from tests.tiny import build, make_samples

RESULTS = Path(__file__).parent / "results" / "full_size"
SIDE, PICTURES, SENTENCES = 512, 2, 12
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def make_pair(folder: Path, shapes: dict[str, Any], device: str, shrink: int) -> None:
    """Write models of these shapes in bfloat16, each with the processor of the tiny Qwen3-VL, its images larger."""
    tiny, processor = build("qwen3_vl")
    size = {"shortest_edge": 256 * 256, "longest_edge": 1024 * 1024}
    processor.image_processor.size = size  # type: ignore[attr-defined]
    for name, shape in shapes.items():
        torch.manual_seed(len(name))
        model = shaped(shape, device, torch.bfloat16, shrink)
        for one in IDS:
            setattr(model.config, one, getattr(tiny.config, one))
        for one in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config.text_config, one, getattr(tiny.config.text_config, one))
        model.generation_config = tiny.generation_config
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        del model
        gc.collect()


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose answers say of the images what they show, several times."""
    made = make_samples(count, seed=seed, images=PICTURES, size=SIDE)
    for row in made:
        (said,) = row["messages"][-1]["content"]
        said["text"] = ". ".join([said["text"]] * SENTENCES)
    return made


class Clock:
    """Of one part after the other: seconds, peak GiB of the device, and the process's highest GiB so far."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float | None]] = {}

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a part and keep what it took."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        value = work()
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.parts[name] = {"seconds": time.monotonic() - start, "device_gib": peak, "host_gib_so_far": highest}
        print(f"{name}: {self.parts[name]}", flush=True)
        return value


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Everything from the pair on disk to the verified checkpoint, and that checkpoint verified again from its files."""
    clock, device = Clock(), "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"student": STUDENT} | ({} if given.teacher == "self" else {"teacher": TEACHER})
    clock.take("pair", lambda: make_pair(folder, shapes, device, given.shrink))
    data = conversations(given.batch * given.steps, seed=1)
    teacher: dict[str, Any] = {"kind": given.teacher}
    if given.teacher != "self":
        teacher["model"] = str(folder / "teacher")
    if given.teacher == "cached":
        teacher["cache"] = str(folder / "cache")
        source = TeacherRecipe(model=teacher["model"])
        clock.take(
            "cache",
            lambda: build_cache(
                folder / "student", teacher=source, dataset=data, output_dir=folder / "cache", batch_size=given.batch
            ),
        )
    asked = {"scheme": "W4A16", "teacher": teacher, "training": {"method": given.method}}
    recipe = json.dumps({"grace_stage": {"grace_modifiers": {"GraceModifier": asked}}})  # JSON is YAML
    done = clock.take(
        "train",
        lambda: grace_plugin.train(
            folder / "student",
            recipe=recipe,
            dataset=data,
            output_dir=folder / "out",
            max_steps=given.steps,
            logging_steps=1,
            per_device_train_batch_size=given.batch,
            gradient_checkpointing=True,
            learning_rate=1e-5,
            use_cpu=device == "cpu",
        ),
    )
    history = done.history
    verified = dict(done.verification)
    del done
    gc.collect()
    again = clock.take("verify", lambda: grace_plugin.verify(folder / "out"))
    found: dict[str, Any] = {
        "parts": clock.parts,
        **{name: getattr(given, name) for name in ("teacher", "method", "shrink", "steps", "batch")},
        "loop_seconds": next(row["train_runtime"] for row in history if "train_runtime" in row),
        "supervised_tokens": history[-2].get("supervised_tokens"),
        "losses": [row["loss"] for row in history if "loss" in row],
        "checkpoint_bytes": sum(file.stat().st_size for file in (folder / "out").rglob("*") if file.is_file()),
        "verification": verified,
        "verified_again": again["verified"],
    }
    if given.serve is not None:
        clock.take("answers", lambda: record("qwen3_vl", folder / "out", given.serve, verified))
    return found


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", choices=["resident", "cached", "self"], default="resident")
    parser.add_argument("--method", choices=["full", "scales", "lora"], default="full")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--shrink", type=int, default=1 if torch.cuda.is_available() else 8)
    parser.add_argument("--folder", type=Path, help="of the pair and the checkpoint (default: a temporary one)")
    parser.add_argument("--serve", type=Path, help="leave the checkpoint and questions here")
    parser.add_argument("--out", type=Path, help="JSON file (default: below benchmarks/results/full_size)")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="grace-full-size-"))
    try:
        found = measure(folder, given)
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    command = " ".join(["python -m benchmarks.full_size", *sys.argv[1:]])
    out = given.out or RESULTS / f"{given.teacher}_{given.method}_{given.shrink}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"command": command, "environment": environment(), **found}, indent=1, default=str) + "\n"
    )
    print(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
