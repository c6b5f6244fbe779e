"""Test scenes: the split, determinism, and every correct answer against an oracle that parses the question's text."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from examples.bundled_demo import images, models, questions, scenes

COUNT = 1500


def scene_of(sample: dict) -> scenes.Scene:
    """Draw the scene of a sample again from its id."""
    split, seed, index = sample["id"].split("-")
    return scenes.draw_scene(np.random.default_rng((int(seed), int(index))), heldout=split == "heldout")


def place_in(grid: np.ndarray, name: str) -> tuple[int, int]:
    """Row and column of the one cell that shows `name`."""
    (found,) = np.argwhere(grid == name).tolist()
    return found[0], found[1]


def line_of(grid: np.ndarray, place: str) -> list[str]:
    """The names of "row 2" or "column b"."""
    kind, which = place.split()
    return list(grid[int(which) - 1] if kind == "row" else grid[:, "abc".index(which)])


def oracle(text: str, cells: np.ndarray) -> set[str]:
    """Right answers from the words of the question alone. cells: kinds [G, G]."""
    grid = np.array(images.NAMES, dtype=object)[cells]
    animals, foods, vehicles = set(images.ANIMALS), set(images.FOODS), set(images.VEHICLES)
    categories = {"animal": animals, "food": foods, "vehicle": vehicles}

    if match := re.fullmatch(r"what is at ([a-c]) (\d)", text):
        return {grid[int(match[2]) - 1, "abc".index(match[1])]}
    if match := re.fullmatch(r"which (row|column) holds the (\w+)", text):
        y, x = place_in(grid, match[2])
        return {str(y + 1) if match[1] == "row" else "abc"[x]}
    if match := re.fullmatch(r"what is (left of|right of|above|below) the (\w+)", text):
        y, x = place_in(grid, match[2])
        target = {"left of": (y, x - 1), "right of": (y, x + 1), "above": (y - 1, x), "below": (y + 1, x)}[match[1]]
        assert min(target) >= 0
        return {grid[target]}

    if match := re.fullmatch(r"how many cells show the (\w+)", text):
        return {str(sum(name in categories[match[1]] for name in grid.flat))}
    if match := re.fullmatch(r"how many cells of (\w+ \w) show the (\w+)", text):
        return {str(sum(name in categories[match[2]] for name in line_of(grid, match[1])))}
    if match := re.fullmatch(r"which row has most of the (\w+)", text):
        sums = np.isin(grid.astype(str), list(categories[match[1]])).sum(axis=1)
        assert np.sort(sums)[-1] > np.sort(sums)[-2]
        return {str(int(np.argmax(sums)) + 1)}
    if match := re.fullmatch(r"name one thing in the (row|column) of the (\w+)", text):
        y, x = place_in(grid, match[2])
        return set(grid[y] if match[1] == "row" else grid[:, x]) - {match[2]}
    if match := re.fullmatch(r"name one (\w+) but not the (\w+)", text):
        return (set(grid.flat) & categories[match[1]]) - {match[2]}
    if match := re.fullmatch(r"name one (animal|food|vehicle) next to the (\w+)", text):
        return oracle(f"name one thing next to the {match[2]}", cells) & categories[match[1]]
    if match := re.fullmatch(r"name one thing in (\w+ \w)", text):
        return set(line_of(grid, match[1]))
    if match := re.fullmatch(r"name one (\w+) in (\w+ \w)", text):
        return {name for name in line_of(grid, match[2]) if name in categories[match[1]]}
    if match := re.fullmatch(r"name one thing next to the (\w+)", text):
        y, x = place_in(grid, match[1])
        steps = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        return {grid[at] for at in steps if 0 <= at[0] < 3 and 0 <= at[1] < 3}
    if match := re.fullmatch(r"name one (\w+)", text):
        return {name for name in grid.flat if name in categories[match[1]]}
    if match := re.fullmatch(r"list row (\d)", text):
        return {" ".join(grid[int(match[1]) - 1])}
    match = re.fullmatch(r"list column ([a-c])", text)
    assert match, text
    return {" ".join(grid[:, "abc".index(match[1])])}


@pytest.mark.slow
@pytest.mark.parametrize(
    "samples", [scenes.training_samples(7, COUNT), scenes.heldout_samples(COUNT)], ids=["train", "heldout"]
)
def test_samples__accepted_answers__those_of_the_oracle(samples):
    seen = set()
    for sample in samples:
        text, label = sample["messages"][0]["content"][1]["text"], sample["messages"][1]["content"][0]["text"]
        assert set(sample["accept"]) == oracle(text, scene_of(sample).cells), text
        assert len(sample["accept"]) == len(set(sample["accept"])) and label in sample["accept"]
        seen.add(sample["type"])
    assert seen == set(questions.TYPES)


def test_samples__several_correct_answers__labels_drawn_evenly():
    samples = [sample for sample in scenes.training_samples(3, 4000) if len(sample["accept"]) == 3]
    places = [sample["accept"].index(sample["messages"][1]["content"][0]["text"]) for sample in samples]
    share = np.bincount(places, minlength=3) / len(samples)
    assert len(samples) > 200 and np.all(np.abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / len(samples)))


@pytest.mark.slow
def test_samples__training_and_test__disjoint_compositions():
    for samples, wanted in ((scenes.training_samples(11, COUNT), False), (scenes.heldout_samples(COUNT), True)):
        assert all(scenes.is_heldout(scene_of(sample).cells) is wanted for sample in samples)
    cells = np.random.default_rng(0).integers(len(images.NAMES), size=(8000, 3, 3))
    share = np.mean([scenes.is_heldout(grid) for grid in cells])
    assert abs(share - 1 / scenes.HELDOUT_SHARE) < 4 * np.sqrt(0.125 * 0.875 / 8000)


def test_is_heldout__other_dtype_and_layout__same():
    for seed in range(50):
        cells = np.random.default_rng(seed).integers(24, size=(3, 3))
        assert scenes.is_heldout(cells) == scenes.is_heldout(np.asfortranarray(cells.astype(np.uint8)))


def test_samples__seed_and_index__determine_the_sample():
    samples = scenes.training_samples(5, 40)
    later = scenes.training_samples(5, 400)
    for index in (39, 0, 17):
        first, second = samples[index], later[index]
        pixels = [np.asarray(sample.pop("images")[0]) for sample in (first, second)]
        assert first == second and np.array_equal(*pixels)
    assert scenes.training_samples(6, 40)[0]["id"] != samples[0]["id"]
    assert any(samples[i]["messages"] != scenes.training_samples(6, 40)[i]["messages"] for i in range(5))
    assert [sample["id"] for sample in samples[3:5]] == ["train-5-3", "train-5-4"] and samples[-1]["id"] == "train-5-39"
    with pytest.raises(IndexError, match="sample 40 of 40"):
        samples[40]


def test_image__each_cell__its_emoji():
    sample = scenes.training_samples(2, 1)[0]
    scene, image = scene_of(sample), np.asarray(sample["images"][0])
    assert image.shape == (96, 96, 3) and sample["images"][0].mode == "RGB"
    for y, x in np.ndindex(3, 3):
        tile = image[y * 32 : (y + 1) * 32, x * 32 : (x + 1) * 32]
        every = images.atlas()[scene.background]
        kind, shift = np.argwhere((every == tile).all(axis=(2, 3, 4)))[0]
        assert (kind, shift) == (scene.cells[y, x], scene.shifts[y, x])


def test_ask__type_that_does_not_fit__refused_by_name():
    full = [0, 0, 0, 1, 1, 1, 2, 2, 2]  # every kind three times: nothing stands anywhere only once
    with pytest.raises(ValueError, match="locate"):
        questions.ask(full, np.random.default_rng(0), ("locate",))


def test_vocabulary__words_of_samples__complete():
    words = questions.vocabulary()
    assert len(words) == len(set(words))
    for sample in scenes.training_samples(9, COUNT):
        for text in [sample["messages"][0]["content"][1]["text"], *sample["accept"]]:
            assert set(text.split()) <= set(words), text


@pytest.mark.parametrize("member", ["teacher", "student"])
def test_bundled_tokenizer__vocabulary__in_order(member):
    table = json.loads((images.ASSETS / member / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(table, key=table.__getitem__) == list(models.WORDS)
