"""What is asked about a scene, and which answers are right.

A scene is a grid of kinds (row-major list of GRID * GRID indices into NAMES). Every type draws one question that has at least one
right answer and returns all of them; where several are right ("name one animal") the label of a training row is one of
them, drawn evenly, as one annotator would write it, and a held-out answer counts when it is any of them. All words are one
token each: prompts have 3 to 8 of them.

A type returns None when the scene does not allow it (no cell left of the apple); the caller then draws another type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .pictures import CATEGORIES, GRID, NAMES

COLUMNS = "abc"  # places are named as in a spreadsheet: columns a to c from the left, rows 1 to 3 from the top
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


class Question(NamedTuple):
    """One question: its type, its text, every right answer (without repetition, in a fixed order)."""

    type: str
    text: str
    accept: tuple[str, ...]


Asker = Callable[[Sequence[int], np.random.Generator], Question | None]


def _pick(rng: np.random.Generator, items: Sequence) -> object:
    return items[int(rng.integers(len(items)))]


def _unique(values) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _single(cells: Sequence[int], rng: np.random.Generator) -> int | None:
    """The position of a kind that stands in the grid exactly once."""
    counts = Counter(cells)
    once = [position for position, kind in enumerate(cells) if counts[kind] == 1]
    return int(rng.choice(once)) if once else None


def _row(cells: Sequence[int], row: int) -> Sequence[int]:
    return cells[row * GRID : (row + 1) * GRID]


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


def between(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """What stands two steps away: the neighbour of the neighbour, in two directions at a right angle."""
    position = _single(cells, rng)
    if position is None:
        return None
    around = _neighbours(position)
    vertical = _pick(rng, [name for name in ("above", "below") if name in around])
    side = _pick(rng, [name for name in ("left of", "right of") if name in around])
    target = around[vertical] + DIRECTIONS[side][1]
    return Question("between", f"what is {vertical} and {side} the {NAMES[cells[position]]}", (NAMES[cells[target]],))


def count(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """How often a kind stands in the grid."""
    kind = int(_pick(rng, cells)) if rng.random() < 0.85 else int(rng.integers(len(NAMES)))
    return Question("count", f"how many cells show the {NAMES[kind]}", (str(list(cells).count(kind)),))


def tally(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """How many cells hold a kind of a category."""
    category = str(_pick(rng, list(CATEGORIES)))
    article = "an" if category == "animal" else "a"
    number = sum(NAMES[kind] in CATEGORIES[category] for kind in cells)
    return Question("tally", f"how many cells show {article} {category}", (str(number),))


def exists(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """Whether a kind stands in the grid."""
    if rng.random() < 0.5:
        return Question("exists", f"do you see the {NAMES[int(_pick(rng, cells))]}", ("yes",))
    absent = sorted(set(range(len(NAMES))) - set(cells))
    return Question("exists", f"do you see the {NAMES[int(_pick(rng, absent))]}", ("no",))


def most(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Which row holds a kind most often, where one row does."""
    repeated = [kind for kind, number in Counter(cells).items() if number > 1]
    if not repeated:
        return None
    kind = int(_pick(rng, repeated))
    per_row = [list(_row(cells, row)).count(kind) for row in range(GRID)]
    if per_row.count(max(per_row)) != 1:
        return None
    return Question("most", f"which row has most {NAMES[kind]}", (str(per_row.index(max(per_row)) + 1),))


def some_in_row(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """Any thing of a row."""
    row = int(rng.integers(GRID))
    return Question("some_in_row", f"name one thing in row {row + 1}", _unique(NAMES[k] for k in _row(cells, row)))


def some_beside(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Any neighbour of a thing."""
    position = _single(cells, rng)
    if position is None:
        return None
    names = _unique(NAMES[cells[place]] for place in _neighbours(position).values())
    return Question("some_beside", f"name one thing next to the {NAMES[cells[position]]}", names)


def some_of_category(cells: Sequence[int], rng: np.random.Generator) -> Question | None:
    """Any animal, food or vehicle in the grid."""
    category = str(_pick(rng, list(CATEGORIES)))
    names = _unique(NAMES[kind] for kind in cells if NAMES[kind] in CATEGORIES[category])
    return Question("some_of_category", f"name one {category}", names) if names else None


def list_row(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """A row from left to right."""
    row = int(rng.integers(GRID))
    return Question("list_row", f"list row {row + 1}", (" ".join(NAMES[kind] for kind in _row(cells, row)),))


def list_column(cells: Sequence[int], rng: np.random.Generator) -> Question:
    """A column from top to bottom."""
    column = int(rng.integers(GRID))
    names = [NAMES[cells[row * GRID + column]] for row in range(GRID)]
    return Question("list_column", f"list column {COLUMNS[column]}", (" ".join(names),))


TYPES: dict[str, Asker] = {
    asker.__name__: asker
    for asker in (
        cell, locate, beside, between, count, tally, exists, most, some_in_row, some_beside, some_of_category, list_row, list_column,
    )
}  # fmt: skip


def ask(cells: Sequence[int], rng: np.random.Generator, types: Sequence[str] = tuple(TYPES)) -> Question:
    """One question of a type drawn evenly from `types`; a type that the scene does not allow is drawn again.

    Raises ValueError naming the types when none of them fits after 100 draws.
    """
    for _ in range(100):
        question = TYPES[types[int(rng.integers(len(types)))]](cells, rng)
        if question is not None:
            return question
    raise ValueError(f"no question of the types {list(types)} fits the grid {[NAMES[kind] for kind in cells]}")


def vocabulary() -> list[str]:
    """Every word that a question or an answer can hold, in a fixed order."""
    words = "what is at in row column which holds has most the left right of above below and how many cells show a an do you see".split()
    words += "name one thing next to animal food vehicle list yes no".split()
    numbers = [str(number) for number in range(GRID * GRID + 1)]
    return list(dict.fromkeys([*words, *COLUMNS, *numbers, *NAMES]))
