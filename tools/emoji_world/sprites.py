"""Pictures of the things, from one committed sheet (Fluent emoji, MIT: see LICENSE-fluent-emoji beside it)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image

SHEET = Path(__file__).with_name("sprites.png")
CELL = 64
COLUMNS = 9
MARGIN = 1
"""Transparent px around each picture of the sheet: a bilinear sample beyond its edge finds nothing."""

CODES: dict[str, str] = {
    "cat": "1f431",
    "dog": "1f436",
    "fox": "1f98a",
    "panda": "1f43c",
    "penguin": "1f427",
    "car": "1f697",
    "rocket": "1f680",
    "football": "26bd",
    "lion": "1f981",
    "frog": "1f438",
    "koala": "1f428",
    "tiger": "1f42f",
    "rabbit": "1f430",
    "pig": "1f437",
    "monkey": "1f435",
    "bear": "1f43b",
    "owl": "1f989",
    "taxi": "1f695",
    "bus": "1f68c",
    "fire engine": "1f692",
    "tractor": "1f69c",
    "helicopter": "1f681",
    "balloon": "1f388",
    "apple": "1f34e",
    "sunglasses": "1f576-fe0f",
    "top hat": "1f3a9",
    "crown": "1f451",
}
"""Name to Unicode code points, in the order of the sheet's cells: 24 things, then 3 accessories."""

_SIDES = (64, 50, 40, 32, 25, 20, 16)


@cache
def _levels(name: str) -> tuple[tuple[int, Image.Image], ...]:
    """The picture at each of `_SIDES`, the largest first: (side of the picture in px, premultiplied with margins)."""
    column, row = list(CODES).index(name) % COLUMNS, list(CODES).index(name) // COLUMNS
    with Image.open(SHEET) as sheet:
        cell = sheet.convert("RGBA").crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    picture = cell.crop((MARGIN, MARGIN, CELL - MARGIN, CELL - MARGIN)).convert("RGBa")
    levels = []
    for side in _SIDES:
        level = Image.new("RGBa", (side + 2, side + 2))
        level.paste(picture.resize((side, side), Image.Resampling.LANCZOS if side < CELL else 1), (1, 1))
        levels.append((side, level))
    return tuple(levels)


def level(name: str, size: float) -> tuple[int, Image.Image]:
    """The smallest of a thing's pictures that is not enlarged where it is drawn `size` px large.

    Returns its side in px, and an "RGBa" image (premultiplied) of that side with 1 px of margin on each side.
    """
    levels = _levels(name)
    return next((found for found in reversed(levels) if found[0] >= size), levels[0])
