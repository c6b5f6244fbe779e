"""`python -m benchmarks.accuracy.served ROW --serve-python PYTHON`: a row's checkpoint through transformers and through vLLM.

Both read the same folder and the same images, in whole 8-bit steps as a PNG holds them (the study's own scenes have fractions
where photographs are enlarged). transformers is fed the answers (`data.score`), vLLM generates greedily. Written to
results/accuracy/served.json, one entry for each row and device.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.accuracy.data import score
from benchmarks.accuracy.rows import RESULTS, Store, revision
from benchmarks.accuracy.scenes import Album, Samples, compose, sentences
from benchmarks.accuracy.study import SIZES, Row
from benchmarks.accuracy.work import Work
from grace_plugin.export.record import environment
from grace_plugin.export.verify import load
from grace_plugin.serve.launch import kernel_of
from grace_plugin.serve.probe import Job, probe

__all__ = ["compare_engines", "questions_of"]


def questions_of(samples: Samples, album: Album) -> list[dict[str, Any]]:
    """Messages and image of every row, as `grace_plugin.serve.probe.Job` takes them."""
    asked, found = sentences()[0], []
    for start in range(0, len(samples), 1000):
        part = samples.take(np.arange(start, min(len(samples), start + 1000)))
        pixels = ((compose(album, part) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for image, question in zip(pixels, part.question, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": asked[question]}]
            found.append({"messages": [{"role": "user", "content": content}], "images": [Image.fromarray(image)]})
    return found


def compare_engines(
    checkpoint: Path, samples: Samples, work: Work, python: Path, engine: dict[str, Any]
) -> dict[str, Any]:
    """Accuracy of `checkpoint` on `rows` by both engines, in percent, and on how many questions they disagree."""
    album = Album(work.photos["test"], work.device, whole=True)
    begun = time.time()
    mine = score(load(checkpoint).to(work.device), samples, work.text, album)
    between = time.time()
    job = Job(
        checkpoint, questions_of(samples, album), max_tokens=work.text.longest, top=0, max_model_len=96, engine=engine
    )
    (served,), log = probe(python, [job], timeout=3600.0)
    answers = sentences()[1]
    theirs = np.array([one.text.strip() == answers[right] for one, right in zip(served, samples.answer, strict=True)])
    return {
        "questions": len(samples),
        "transformers": 100 * float(mine.mean()),
        "vllm": 100 * float(theirs.mean()),
        "points": 100 * float(theirs.mean() - mine.mean()),
        "disagree": int((mine != theirs).sum()),
        "kernel": kernel_of(log),
        "seconds": {"transformers": between - begun, "vllm": time.time() - between},
    }


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description="A row's checkpoint through transformers and vLLM")
    parser.add_argument("row")
    parser.add_argument("--checkpoint", type=Path, help="its folder (default: where the study keeps it)")
    parser.add_argument("--serve-python", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--photos", default="build/accuracy/photos.npz")
    parser.add_argument("--questions", type=int, help="the first of the test set (default: all)")
    parser.add_argument("--engine", type=json.loads, default={"max_num_seqs": 64}, help="arguments of vLLM's LLM, JSON")
    given = parser.parse_args()
    row, work = Row.parse(given.row), Work(SIZES[given.size], Store(), Path("build/accuracy"), given.photos)
    samples = work.samples["test"]
    samples = samples.take(np.arange(given.questions or len(samples)))
    found = compare_engines(given.checkpoint or work.checkpoint(row), samples, work, given.serve_python, given.engine)
    device = environment()["device"]
    entry = {
        "row": row.name,
        **found,
        "environment": environment(),
        "revision": revision(),
        "command": f"python -m benchmarks.accuracy.served {row.name} --serve-python PYTHON",
    }
    file = RESULTS / "served.json"
    kept = json.loads(file.read_text()) if file.is_file() else []
    kept = [one for one in kept if (one["row"], one["environment"]["device"]) != (row.name, device)]
    file.write_text(json.dumps([*kept, entry], indent=1) + "\n")
    print(json.dumps(entry, indent=1))


if __name__ == "__main__":
    main()
