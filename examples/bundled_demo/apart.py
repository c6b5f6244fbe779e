"""Count the compositions that the bundled pair, the demo's rows and its test show, and refuse one that a test could remember.

The streams are drawn again, without pixels: about 12 seconds of one core, most of them for the questions of the pair's
training, which take random numbers between the scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import combinations, product

import numpy as np

from .build import NAMED_IMAGES, STUDENT, TEACHER, Plan
from .packing import draw_asked
from .scenes import HELDOUT_SEED, TEST_SEED, TRAINING_SEED, draw_scene

__all__ = ["check_apart", "count_shown", "shown_in_rows", "shown_to"]


def shown_to(plan: Plan) -> set[bytes]:
    """Return the compositions that a bundled member was trained on, its cells as bytes."""
    found: set[bytes] = set()
    for step in range(plan.naming_steps):
        rng = np.random.default_rng((plan.naming_seed, step))
        found.update(scene.cells.tobytes() for scene, _ in draw_asked(rng, NAMED_IMAGES, 1))
    for step in range(plan.steps):
        rng = np.random.default_rng((plan.answer_seed, step))
        asked = draw_asked(rng, plan.images, plan.questions, plan.types(step))
        found.update(scene.cells.tobytes() for scene, _ in asked)
    return found


def shown_in_rows(seed: int, count: int, heldout: bool = False) -> set[bytes]:
    """Return the compositions of the first `count` rows of a stream."""
    return {draw_scene(np.random.default_rng((seed, index)), heldout).cells.tobytes() for index in range(count)}


def check_apart(parts: Mapping[str, Set[bytes]], members: Mapping[str, Set[bytes]]) -> None:
    """Refuse a composition that two of `parts` show, or one of `parts` and what a bundled member was trained on.

    Raises:
        ValueError: names the two and how many compositions they have in common.
    """
    for first, second in (*combinations(parts, 2), *product(parts, members)):
        common = len(parts[first] & {**members, **parts}[second])
        if common:
            raise ValueError(
                f"{common} compositions of the demo's {first} are in {second} too; give {first} another seed"
            )


def count_shown(samples: int, questions: int, plans: Sequence[Plan] = (TEACHER, STUDENT)) -> dict[str, int]:
    """Return how many compositions each part shows.

    Args:
        samples: of the method's training set.
        questions: of the test.
        plans: of the bundled members, teacher and student.

    Raises:
        ValueError: two of training, test and the pair's training have a composition in common, or a seed is used twice.
    """
    seeds = [
        TRAINING_SEED,
        TEST_SEED,
        HELDOUT_SEED,
        *(s for plan in plans for s in (plan.naming_seed, plan.answer_seed)),
    ]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a stream of scenes is used for two purposes: the seeds are {seeds}; give each part its own")
    parts = {"training": shown_in_rows(TRAINING_SEED, samples), "test": shown_in_rows(TEST_SEED, questions, True)}
    members = dict(zip(("teacher", "student"), map(shown_to, plans), strict=True))
    check_apart(parts, members)
    return {name: len(found) for name, found in (parts | members).items()}
