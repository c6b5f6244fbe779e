"""Count the compositions of each part of the demo, and refuse one that two parts share.

The parts are the training samples of the demo, its test, and the training of the bundled teacher and student. The streams
are drawn again without pixels, which takes about 12 seconds of one core, most of them for the questions of the models'
training, because these take random numbers between the scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import combinations, product

import numpy as np

from .build import NAMED_IMAGES, STUDENT, TEACHER, Plan
from .packing import draw_asked
from .scenes import HELDOUT_SEED, TEST_SEED, TRAINING_SEED, draw_scene

__all__ = ["check_disjoint", "count_compositions", "stream_compositions", "training_compositions"]


def training_compositions(plan: Plan) -> set[bytes]:
    """Return the compositions that a bundled model was trained on, each as the bytes of its cells."""
    found: set[bytes] = set()
    for step in range(plan.naming_steps):
        rng = np.random.default_rng((plan.naming_seed, step))
        found.update(scene.cells.tobytes() for scene, _ in draw_asked(rng, NAMED_IMAGES, 1))
    for step in range(plan.steps):
        rng = np.random.default_rng((plan.answer_seed, step))
        asked = draw_asked(rng, plan.images, plan.questions, plan.types(step))
        found.update(scene.cells.tobytes() for scene, _ in asked)
    return found


def stream_compositions(seed: int, count: int, heldout: bool = False) -> set[bytes]:
    """Return the compositions of the first `count` samples of a stream."""
    return {draw_scene(np.random.default_rng((seed, index)), heldout).cells.tobytes() for index in range(count)}


def check_disjoint(parts: Mapping[str, Set[bytes]], members: Mapping[str, Set[bytes]]) -> None:
    """Refuse a composition that two of `parts` share, or that one of `parts` shares with a bundled model's training.

    Raises:
        ValueError: names the two and how many compositions they have in common.
    """
    for first, second in (*combinations(parts, 2), *product(parts, members)):
        common = len(parts[first] & {**members, **parts}[second])
        if common:
            raise ValueError(
                f"{common} compositions of the demo's {first} are in {second} too; give {first} another seed"
            )


def count_compositions(samples: int, questions: int, plans: Sequence[Plan] = (TEACHER, STUDENT)) -> dict[str, int]:
    """Return the number of compositions of each part.

    Args:
        samples: number of the demo's training samples.
        questions: number of the test's questions.
        plans: of the bundled models, teacher and student.

    Raises:
        ValueError: two of training, test and the models' training share a composition, or a seed is used twice.
    """
    seeds = [
        TRAINING_SEED,
        TEST_SEED,
        HELDOUT_SEED,
        *(s for plan in plans for s in (plan.naming_seed, plan.answer_seed)),
    ]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a stream of scenes is used for two purposes: the seeds are {seeds}; give each part its own")
    parts = {
        "training": stream_compositions(TRAINING_SEED, samples),
        "test": stream_compositions(TEST_SEED, questions, True),
    }
    members = dict(zip(("teacher", "student"), map(training_compositions, plans), strict=True))
    check_disjoint(parts, members)
    return {name: len(found) for name, found in (parts | members).items()}
