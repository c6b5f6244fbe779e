"""Compose the image of a scene from the bundled emoji.

Twenty-four emoji of the Noto set (Apache-2.0, taken from the npm package emoji-datasource-google) are in
`assets/emoji/<name>.png`, 32 x 32 pixels with transparency. A scene is a grid of GRID x GRID cells of CELL pixels; the emoji
of every cell is shifted by up to one pixel in each direction, on a pale background, so that two images of one grid are rarely
equal byte for byte. Composition is one table look-up per cell: about 20 microseconds an image.

Shapes: B scenes, G = GRID, C = CELL, K kinds of emoji.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

GRID = 3
CELL = 32
SIZE = GRID * CELL
SHIFTS = 9  # 3 x 3 positions of an emoji within its cell
BACKGROUNDS = np.array(
    [(255, 255, 255), (238, 242, 250), (250, 240, 230), (235, 248, 236), (247, 236, 246), (240, 240, 232)],
    dtype=np.uint8,
)
ASSETS = Path(__file__).parent / "assets"

# name -> code point of its file in emoji-datasource-google
ANIMALS = {
    "dog": "1f436",
    "cat": "1f431",
    "pig": "1f437",
    "frog": "1f438",
    "tiger": "1f42f",
    "monkey": "1f412",
    "penguin": "1f427",
    "fish": "1f41f",
}
FOODS = {
    "apple": "1f34e",
    "banana": "1f34c",
    "grapes": "1f347",
    "strawberry": "1f353",
    "carrot": "1f955",
    "pizza": "1f355",
    "bread": "1f35e",
    "lemon": "1f34b",
}
VEHICLES = {
    "car": "1f697",
    "bus": "1f68c",
    "train": "1f68b",
    "rocket": "1f680",
    "boat": "26f5",
    "truck": "1f69a",
    "tractor": "1f69c",
    "helicopter": "1f681",
}
CODE_POINTS = ANIMALS | FOODS | VEHICLES
NAMES = tuple(CODE_POINTS)
CATEGORIES = {"animal": frozenset(ANIMALS), "food": frozenset(FOODS), "vehicle": frozenset(VEHICLES)}


@cache
def atlas(folder: Path = ASSETS / "emoji") -> np.ndarray:
    """Return every emoji at each of its shifts on each background, uint8 [backgrounds, K, SHIFTS, C, C, 3] (about 4 MB).

    Raises:
        FileNotFoundError: a file of `folder` is missing, because the assets were not built.
    """
    inner = CELL - 2
    table = np.empty((len(BACKGROUNDS), len(NAMES), SHIFTS, CELL, CELL, 3), np.uint8)
    table[:] = BACKGROUNDS[:, None, None, None, None, :]
    for kind, name in enumerate(NAMES):
        emoji = np.asarray(Image.open(folder / f"{name}.png").convert("RGBA").resize((inner, inner)), np.uint16)
        colour, opacity = emoji[..., :3], emoji[..., 3:]
        for pale, shift in np.ndindex(len(BACKGROUNDS), SHIFTS):
            y, x = divmod(shift, 3)
            mixed = (colour * opacity + BACKGROUNDS[pale] * (255 - opacity)) // 255
            table[pale, kind, shift, y : y + inner, x : x + inner] = mixed
    return table


def compose(cells: np.ndarray, shifts: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
    """Return images uint8 [B, SIZE, SIZE, 3] of grids of kinds [B, G, G], shifts [B, G, G] and backgrounds [B]."""
    pixels = atlas()[backgrounds[:, None, None], cells, shifts]
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(len(cells), SIZE, SIZE, 3)
