"""Test that the demo's training samples, its test and the training of the bundled models share no composition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from examples.bundled_demo import disjoint, scenes
from examples.bundled_demo.build import EASY, NAMED_IMAGES, STUDENT, TEACHER
from examples.bundled_demo.images import NAMES
from examples.bundled_demo.methods import Budget
from examples.bundled_demo.models import WORDS
from examples.bundled_demo.packing import pack
from examples.bundled_demo.run import QUESTIONS

FIRST = list(WORDS).index(NAMES[0])


def compositions(seed: int, index: int, images: int, questions: int, types: tuple[str, ...]) -> set[bytes]:
    kinds = pack(seed, index, images, questions, types).kinds.numpy() - FIRST
    return {grid.astype(np.uint8).tobytes() for grid in kinds}


def test_training_compositions__first_steps_of_a_plan__those_of_its_batches() -> None:
    plan = replace(TEACHER, naming_steps=1, steps=2, easy=1, relations=1, images=3)
    wanted = compositions(9, 0, NAMED_IMAGES, 1, scenes.MIXTURE)
    wanted |= compositions(1, 0, 3, 6, EASY) | compositions(1, 1, 3, 6, scenes.MIXTURE)
    assert disjoint.training_compositions(plan) == wanted and len(wanted) == NAMED_IMAGES + 6


def test_stream_compositions__stream__those_of_its_images() -> None:
    samples = scenes.heldout_samples(3)
    found = disjoint.stream_compositions(samples.seed, 3, heldout=True)
    drawn = [scenes.draw_scene(np.random.default_rng((samples.seed, n)), True) for n in range(3)]
    assert found == {scene.cells.tobytes() for scene in drawn}
    assert all(
        np.array_equal(np.asarray(sample["images"][0]), np.asarray(s.image())) for sample, s in zip(samples, drawn)
    )


@pytest.mark.slow
def test_demo__compositions_of_all_parts__disjoint() -> None:
    samples = Budget.steps * Budget.batch_size
    assert (Budget.data_seed, scenes.heldout_samples(1).seed) == (scenes.TRAINING_SEED, scenes.TEST_SEED)
    shown = disjoint.count_compositions(samples, QUESTIONS)
    assert shown == {"training": 25_600, "test": 8_000, "teacher": 70_400, "student": 44_799}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (replace(TEACHER, seed=scenes.TRAINING_SEED - 1), "used for two purposes"),
        (replace(TEACHER, seed=scenes.TEST_SEED - 9), "used for two purposes"),
    ],
)
def test_count_compositions__a_seed_used_twice__refused(plan: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        disjoint.count_compositions(10, 10, (plan, STUDENT))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "members", "message"),
    [
        ({"training": {b"a", b"b"}, "test": {b"b"}}, {}, "1 compositions of the demo's training are in test"),
        ({"training": {b"a"}, "test": {b"b"}}, {"teacher": {b"c"}, "student": {b"b"}}, "demo's test are in student"),
        ({"training": {b"a"}, "test": {b"b"}}, {"teacher": {b"a", b"c"}}, "demo's training are in teacher"),
    ],
)
def test_check_disjoint__a_common_composition__refused_by_name(parts: dict, members: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        disjoint.check_disjoint(parts, members)
    disjoint.check_disjoint({"training": {b"a"}, "test": {b"b"}}, {"teacher": {b"c"}, "student": {b"c"}})


def test_stream__seed_of_the_teachers_training__same_first_scenes() -> None:
    """The demo's samples once had seed 1: one scene of every batch of the teacher's training was among them."""
    plan = replace(TEACHER, naming_steps=0, steps=40, images=1)
    assert len(disjoint.stream_compositions(1, 40) & disjoint.training_compositions(plan)) == 40
