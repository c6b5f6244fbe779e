"""`python -m benchmarks.accuracy.blind [--set scenes|captions]`: the share of questions that can be answered without the image.

The baseline gives to each question the answer that this question has most often in the training set, and never sees an image.
It is what a method must pass before anything it says is about images. Written to results/accuracy/blind.json (captions:
results/accuracy/captions/blind.json), which the tables read.

Legend: R samples.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.caption_work import CAPTION_SIZES, CaptionWork
from benchmarks.accuracy.captions import load_images, pack_images
from benchmarks.accuracy.photos import CLASSES, SIZE
from benchmarks.accuracy.rows import RESULTS, Store, revision, scored
from benchmarks.accuracy.scenes import TYPES, Asked, draw
from benchmarks.accuracy.study import SIZES
from benchmarks.accuracy.work import TEST_SEED, TRAIN_SEED

__all__ = ["FILE", "answer_blind", "most_frequent"]

FILE = "blind.json"


def most_frequent(samples: Asked) -> dict[int, int]:
    """Return the answer that each question has most often, by question; of several, the one that is numbered lowest."""
    counted: dict[int, Counter[int]] = defaultdict(Counter)
    for question, answer in zip(samples.question.tolist(), samples.answer.tolist(), strict=True):
        counted[question][answer] += 1
    return {question: min(seen, key=lambda one: (-seen[one], one)) for question, seen in counted.items()}


def answer_blind(train: Asked, test: Asked) -> np.ndarray:
    """Return which test questions the most frequent answer of the training set answers, bool [R]; an unseen one is wrong."""
    known = most_frequent(train)
    asked = zip(test.question.tolist(), test.answer.tolist(), strict=True)
    return np.array([known.get(question) == answer for question, answer in asked])


def _scenes() -> dict[str, Any]:
    """Scenes: questions and answers do not depend on which photographs are shown, so one of each class will do."""
    size, photos = SIZES["gpu"], (np.zeros((len(CLASSES), SIZE, SIZE, 3), np.uint8), np.arange(len(CLASSES)))
    train = draw(TRAIN_SEED, size.samples, photos, augment=True)
    test = draw(TEST_SEED, size.test_samples, photos, augment=False)
    return scored(answer_blind(train, test), test.type, TYPES)


def _captions(images: str, folder: Path) -> dict[str, Any]:
    file = folder / "captions.npz"
    if Path(images).is_file():
        file = Path(images)
    elif not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        pack_images(load_images(images), file)
    work = CaptionWork(CAPTION_SIZES["gpu"], Store(folder / "none"), folder, str(file))
    test = work.samples["test"]
    right = answer_blind(work.samples["student"], test)
    return scored(right, work.images.kind[test.image], work.images.kinds)


def main() -> None:
    """Command line; see the module."""
    from grace_plugin.export.record import environment

    parser = argparse.ArgumentParser(description="The study's questions answered without the image")
    parser.add_argument("--set", choices=("scenes", "captions"), default="scenes", help="the data")
    parser.add_argument("--images", default="debian", help="of --set captions: debian, a folder, or a packed file")
    given = parser.parse_args()
    captions = given.set == "captions"
    results = RESULTS / "captions" if captions else RESULTS
    folder = Path(__file__).parents[2] / "build" / "accuracy" / "captions"
    said = _captions(given.images, folder) if captions else _scenes()
    entry = {
        "what": "each question's most frequent answer in the training set, without the image",
        **said,
        "environment": environment(),
        "revision": revision(),
        "command": "python -m benchmarks.accuracy.blind" + " --set captions" * captions,
    }
    (results / FILE).write_text(json.dumps(entry, indent=1) + "\n")
    print(f"{100 * said['accuracy']:.2f} % of {said['questions']} questions without the image")


if __name__ == "__main__":
    main()
