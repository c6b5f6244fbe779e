"""The demo's training samples, its test and the bundled pair's training have no composition in common."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from examples.bundled_demo import apart, scenes
from examples.bundled_demo.build import EASY, NAMED_IMAGES, STUDENT, TEACHER
from examples.bundled_demo.methods import Budget
from examples.bundled_demo.packing import pack
from examples.bundled_demo.pair import WORDS
from examples.bundled_demo.pictures import NAMES
from examples.bundled_demo.run import QUESTIONS

FIRST = list(WORDS).index(NAMES[0])


def compositions(seed: int, index: int, images: int, questions: int, types: tuple[str, ...]) -> set[bytes]:
    kinds = pack(seed, index, images, questions, types).kinds.numpy() - FIRST
    return {grid.astype(np.uint8).tobytes() for grid in kinds}


def test_shown_to__first_steps_of_a_plan__those_of_the_batches_it_trains_on() -> None:
    plan = replace(TEACHER, naming_steps=1, steps=2, easy=1, relations=1, images=3)
    wanted = compositions(9, 0, NAMED_IMAGES, 1, scenes.MIXTURE)
    wanted |= compositions(1, 0, 3, 6, EASY) | compositions(1, 1, 3, 6, scenes.MIXTURE)
    assert apart.shown_to(plan) == wanted and len(wanted) == NAMED_IMAGES + 6


def test_shown_in_rows__of_a_stream__what_its_images_show() -> None:
    rows = scenes.heldout_rows(3)
    found = apart.shown_in_rows(rows.seed, 3, heldout=True)
    drawn = [scenes.draw_scene(np.random.default_rng((rows.seed, n)), True) for n in range(3)]
    assert found == {scene.cells.tobytes() for scene in drawn}
    assert all(np.array_equal(np.asarray(row["images"][0]), np.asarray(s.image())) for row, s in zip(rows, drawn))


def test_the_demo__all_that_it_shows__apart() -> None:
    samples = Budget.steps * Budget.batch_size
    assert (Budget.data_seed, scenes.heldout_rows(1).seed) == (scenes.TRAINING_SEED, scenes.TEST_SEED)
    shown = apart.count_shown(samples, QUESTIONS)
    assert shown == {"training": 25_600, "test": 8_000, "teacher": 70_400, "student": 44_799}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (replace(TEACHER, seed=scenes.TRAINING_SEED - 1), "used for two purposes"),
        (replace(TEACHER, seed=scenes.TEST_SEED - 9), "used for two purposes"),
    ],
)
def test_count_shown__a_seed_used_twice__refused(plan: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apart.count_shown(10, 10, (plan, STUDENT))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "members", "message"),
    [
        ({"training": {b"a", b"b"}, "test": {b"b"}}, {}, "1 compositions of the demo's training are in test"),
        ({"training": {b"a"}, "test": {b"b"}}, {"teacher": {b"c"}, "student": {b"b"}}, "demo's test are in student"),
        ({"training": {b"a"}, "test": {b"b"}}, {"teacher": {b"a", b"c"}}, "demo's training are in teacher"),
    ],
)
def test_check_apart__a_common_composition__refused_by_name(parts: dict, members: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apart.check_apart(parts, members)
    apart.check_apart({"training": {b"a"}, "test": {b"b"}}, {"teacher": {b"c"}, "student": {b"c"}})


def test_a_stream_with_the_teachers_seed__the_same_first_scenes() -> None:
    """Seed 1 was that of the demo's samples: one scene of every batch of the teacher's was among them."""
    plan = replace(TEACHER, naming_steps=0, steps=40, images=1)
    assert len(apart.shown_in_rows(1, 40) & apart.shown_to(plan)) == 40
