"""Draw a question about a scene, with all of its correct answers.

A scene is a grid of kinds (row-major list of GRID * GRID indices into NAMES). Every type draws one question that has at
least one correct answer and returns all of them. Where several are correct ("name one animal") the label of a training
sample is one of them, drawn evenly, as one annotator would write it, and a held-out answer counts when it is any of them.
Every word is one token: questions have 3 to 9.

A type returns None when the scene does not allow it (no cell left of the apple); the caller then draws another type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from .images import CATEGORIES, GRID, NAMES

COLUMNS = "abc"  # places are named as in a spreadsheet: columns a to c from the left, rows 1 to 3 from the top
Item = TypeVar("Item")
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


class Question(NamedTuple):
    """One question: its type, its text, every right answer (without repetition, in a fixed order)."""

    type: str
    text: str
    accept: tuple[str, ...]


Asker = Callable[[Sequence[int], np.random.Generator], Question | None]


def _pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _single(cells: Sequence[int], rng: np.random.Generator) -> int | None:
    """The position of a kind that stands in the grid exactly once."""
    counts = Counter(cells)
    once = [position for position, kind in enumerate(cells) if counts[kind] == 1]
    return int(rng.choice(once)) if once else None


def _neighbours(position: int) -> dict[str, int]:
    """Direction -> position of the neighbour inside the grid."""
    row, column = divmod(position, GRID)
    around = {name: (row + dy, column + dx) for name, (dy, dx) in DIRECTIONS.items()}
    return {name: y * GRID + x for name, (y, x) in around.items() if 0 <= y < GRID and 0 <= x < GRID}


def cell(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """What stands at a place."""
    row, column = divmod(int(rng.integers(GRID * GRID)), GRID)
    return Question("cell", f"what is at {COLUMNS[column]} {row + 1}", (NAMES[cells[row * GRID + column]],))


def locate(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Which row or column a thing stands in (its only place)."""
    position = _single(cells, rng)
    if position is None:
        return None
    row, column = divmod(position, GRID)
    if rng.random() < 0.5:
        return Question("locate", f"which row holds the {NAMES[cells[position]]}", (str(row + 1),))
    return Question("locate", f"which column holds the {NAMES[cells[position]]}", (COLUMNS[column],))


def beside(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """What stands left of, right of, above or below a thing."""
    position = _single(cells, rng)
    if position is None:
        return None
    around = _neighbours(position)
    direction = _pick(rng, list(around))
    return Question("beside", f"what is {direction} the {NAMES[cells[position]]}", (NAMES[cells[around[direction]]],))


def _of(category: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in CATEGORIES[category]]


def _line(cells: Sequence[int], rng: np.random.Generator) -> tuple[str, list[str]]:
    """A row or a column: how it is called, and the names in it."""
    number = int(rng.integers(GRID))
    if rng.random() < 0.5:
        return f"row {number + 1}", [NAMES[kind] for kind in cells[number * GRID : (number + 1) * GRID]]
    return f"column {COLUMNS[number]}", [NAMES[kind] for kind in cells[number::GRID]]


def tally(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """How many cells hold a kind of a category."""
    category = _pick(rng, list(CATEGORIES))
    number = len(_of(category, [NAMES[kind] for kind in cells]))
    return Question("tally", f"how many cells show the {category}", (str(number),))


def tally_in_line(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """How many cells of a row or column hold a kind of a category."""
    category = _pick(rng, list(CATEGORIES))
    place, names = _line(cells, rng)
    return Question(
        "tally_in_line", f"how many cells of {place} show the {category}", (str(len(_of(category, names))),)
    )


def most(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Which row holds a category most often, where one row does."""
    category = _pick(rng, list(CATEGORIES))
    names = [NAMES[kind] for kind in cells]
    numbers = [len(_of(category, names[row * GRID : (row + 1) * GRID])) for row in range(GRID)]
    if numbers.count(max(numbers)) != 1:
        return None
    return Question("most", f"which row has most of the {category}", (str(numbers.index(max(numbers)) + 1),))


def some_in_line(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """Any thing of a row or column."""
    place, names = _line(cells, rng)
    return Question("some_in_line", f"name one thing in {place}", _unique(names))


def some_beside(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Any neighbour of a thing."""
    position = _single(cells, rng)
    if position is None:
        return None
    names = _unique(NAMES[cells[place]] for place in _neighbours(position).values())
    return Question("some_beside", f"name one thing next to the {NAMES[cells[position]]}", names)


def some_of_category(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Any animal, food or vehicle in the grid."""
    category = _pick(rng, list(CATEGORIES))
    names = _unique(_of(category, [NAMES[kind] for kind in cells]))
    return Question("some_of_category", f"name one {category}", names) if names else None


def some_of_category_in_line(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Any animal, food or vehicle of a row or column."""
    category = _pick(rng, list(CATEGORIES))
    place, names = _line(cells, rng)
    right = _unique(_of(category, names))
    return Question("some_of_category_in_line", f"name one {category} in {place}", right) if right else None


def sharing_line(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Any other thing of the row or column in which a thing stands."""
    position = _single(cells, rng)
    if position is None:
        return None
    row, column = divmod(position, GRID)
    kind, places = (
        ("row", range(row * GRID, (row + 1) * GRID))
        if rng.random() < 0.5
        else ("column", range(column, GRID * GRID, GRID))
    )
    names = _unique(NAMES[cells[place]] for place in places if place != position)
    return Question("sharing_line", f"name one thing in the {kind} of the {NAMES[cells[position]]}", names)


def category_beside(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Any neighbour of a thing that belongs to a category."""
    position = _single(cells, rng)
    if position is None:
        return None
    category = _pick(rng, list(CATEGORIES))
    right = _unique(_of(category, [NAMES[cells[place]] for place in _neighbours(position).values()]))
    return (
        Question("category_beside", f"name one {category} next to the {NAMES[cells[position]]}", right)
        if right
        else None
    )


def another(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Any member of a category but the named one."""
    named = NAMES[_pick(rng, cells)]
    category = next(name for name, members in CATEGORIES.items() if named in members)
    right = _unique(name for name in _of(category, [NAMES[kind] for kind in cells]) if name != named)
    return Question("another", f"name one {category} but not the {named}", right) if right else None


def list_row(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """A row from left to right."""
    row = int(rng.integers(GRID))
    return Question(
        "list_row", f"list row {row + 1}", (" ".join(NAMES[kind] for kind in cells[row * GRID : (row + 1) * GRID]),)
    )


def list_column(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """A column from top to bottom."""
    column = int(rng.integers(GRID))
    names = [NAMES[cells[row * GRID + column]] for row in range(GRID)]
    return Question("list_column", f"list column {COLUMNS[column]}", (" ".join(names),))


TYPES: dict[str, Asker] = {
    asker.__name__: asker
    for asker in (
        cell,
        locate,
        beside,
        tally,
        tally_in_line,
        most,
        some_in_line,
        some_beside,
        some_of_category,
        some_of_category_in_line,
        sharing_line,
        category_beside,
        another,
        list_row,
        list_column,
    )
}

WEIGHTS = {
    "beside": 2,
    "locate": 2,
    "most": 2,
    "some_beside": 3,
    "sharing_line": 4,
    "category_beside": 4,
    "another": 3,
}
"""How often a type is drawn relative to the others (1): what the decoder must work out comes more often."""
MIXTURE = tuple(name for name in TYPES for _ in range(WEIGHTS.get(name, 1)))


def ask(cells: Sequence[int], rng: np.random.Generator, types: Sequence[str] = MIXTURE) -> Question:
    """One question of a type drawn evenly from `types` (a name may stand there several times).

    A type that the scene does not allow is drawn again. Raises ValueError naming the types when none fits after 100 draws.
    """
    for _ in range(100):
        question = TYPES[types[int(rng.integers(len(types)))]](cells, rng)
        if question is not None:
            return question
    raise ValueError(f"no question of the types {list(types)} fits the grid {[NAMES[kind] for kind in cells]}")


def vocabulary() -> list[str]:
    """The words that the tokenizer knows: those of every question and answer, and some more.

    The bundled pair depends on their order.
    """
    words = (
        "what is at in row column which holds has most the left right of above below and how many cells show".split()
    )
    words += "a an do you see name one thing next to animal food vehicle list yes no".split()
    numbers = [str(number) for number in range(GRID * GRID + 1)]
    return list(dict.fromkeys([*words, *COLUMNS, *numbers, *NAMES, "outside", "but", "not", "seen", "twice"]))
