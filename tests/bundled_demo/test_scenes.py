"""Scenes: the split, the determinism, and every right answer recomputed by an oracle that parses the question's text."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from examples.bundled_demo import pair, pictures, questions, scenes

COUNT = 1500


def scene_of(row: dict) -> scenes.Scene:
    """The scene behind a row, drawn again from its id."""
    split, seed, index = row["id"].split("-")
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
    grid = np.array(pictures.NAMES, dtype=object)[cells]
    animals, foods, vehicles = set(pictures.ANIMALS), set(pictures.FOODS), set(pictures.VEHICLES)
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


@pytest.mark.parametrize("rows", [scenes.training_rows(7, COUNT), scenes.heldout_rows(COUNT)], ids=["train", "heldout"])
def test_right_answers_are_those_of_the_oracle(rows):
    seen = set()
    for row in rows:
        text, label = row["messages"][0]["content"][1]["text"], row["messages"][1]["content"][0]["text"]
        assert set(row["accept"]) == oracle(text, scene_of(row).cells), text
        assert len(row["accept"]) == len(set(row["accept"])) and label in row["accept"]
        seen.add(row["type"])
    assert seen == set(questions.TYPES)


def test_labels_of_open_questions_use_every_right_answer():
    rows = [row for row in scenes.training_rows(3, 4000) if len(row["accept"]) == 3]
    places = [row["accept"].index(row["messages"][1]["content"][0]["text"]) for row in rows]
    share = np.bincount(places, minlength=3) / len(rows)
    assert len(rows) > 200 and np.all(np.abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / len(rows)))


def test_no_training_row_shows_a_heldout_composition():
    for rows, wanted in ((scenes.training_rows(11, COUNT), False), (scenes.heldout_rows(COUNT), True)):
        assert all(scenes.is_heldout(scene_of(row).cells) is wanted for row in rows)
    cells = np.random.default_rng(0).integers(len(pictures.NAMES), size=(8000, 3, 3))
    share = np.mean([scenes.is_heldout(grid) for grid in cells])
    assert abs(share - 1 / scenes.HELDOUT_SHARE) < 4 * np.sqrt(0.125 * 0.875 / 8000)


def test_rule_of_the_split_does_not_depend_on_integer_type_or_memory_layout():
    for seed in range(50):
        cells = np.random.default_rng(seed).integers(24, size=(3, 3))
        assert scenes.is_heldout(cells) == scenes.is_heldout(np.asfortranarray(cells.astype(np.uint8)))


def test_a_row_depends_on_seed_and_index_alone():
    rows = scenes.training_rows(5, 40)
    later = scenes.training_rows(5, 400)
    for index in (39, 0, 17):
        first, second = rows[index], later[index]
        pixels = [np.asarray(row.pop("images")[0]) for row in (first, second)]
        assert first == second and np.array_equal(*pixels)
    assert scenes.training_rows(6, 40)[0]["id"] != rows[0]["id"]
    assert any(rows[i]["messages"] != scenes.training_rows(6, 40)[i]["messages"] for i in range(5))
    assert [row["id"] for row in rows[3:5]] == ["train-5-3", "train-5-4"] and rows[-1]["id"] == "train-5-39"
    with pytest.raises(IndexError, match="row 40 of 40"):
        rows[40]


def test_image_holds_each_picture_in_its_cell():
    row = scenes.training_rows(2, 1)[0]
    scene, image = scene_of(row), np.asarray(row["images"][0])
    assert image.shape == (96, 96, 3) and row["images"][0].mode == "RGB"
    for y, x in np.ndindex(3, 3):
        tile = image[y * 32 : (y + 1) * 32, x * 32 : (x + 1) * 32]
        every = pictures.atlas()[scene.background]
        kind, shift = np.argwhere((every == tile).all(axis=(2, 3, 4)))[0]
        assert (kind, shift) == (scene.cells[y, x], scene.shifts[y, x])


def test_questions_that_do_not_fit_name_the_types():
    full = [0, 0, 0, 1, 1, 1, 2, 2, 2]  # every kind three times: nothing stands anywhere only once
    with pytest.raises(ValueError, match="locate"):
        questions.ask(full, np.random.default_rng(0), ("locate",))


def test_every_word_is_in_the_vocabulary():
    words = questions.vocabulary()
    assert len(words) == len(set(words))
    for row in scenes.training_rows(9, COUNT):
        for text in [row["messages"][0]["content"][1]["text"], *row["accept"]]:
            assert set(text.split()) <= set(words), text


@pytest.mark.parametrize("member", ["teacher", "student"])
def test_bundled_tokenizer_holds_the_vocabulary_in_its_order(member):
    table = json.loads((pictures.ASSETS / member / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(table, key=table.__getitem__) == list(pair.WORDS)
