"""Counting: how many of a thing are there, 1 to 10, half of the time among other things (CLIP, arXiv 2103.00020, section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wordsight.evaluate.failures.chance import Draw
from wordsight.evaluate.failures.drawing import MARGIN_PX, SIZE_PX, Layer, Scene, Thing
from wordsight.evaluate.failures.items import FailureMode, Item
from wordsight.evaluate.failures.names import NUMBERS, OBJECTS, plural

GRID = 4  # cells a side; 16 hold ten things and five others
CELL_PX = (SIZE_PX - 2 * MARGIN_PX) // GRID


@dataclass(frozen=True, kw_only=True)
class Counting(FailureMode):
    """Which of "one dog", "two dogs", ..., "ten dogs"? Chance 1/10. Rows are the numbers, and all of them alone and among others.

    All things of a picture have one size, at random places of a grid of 4 x 4 cells.
    """

    name: ClassVar[str] = "counting"

    def _item(self, i: int, draw: Draw) -> Item:
        number, among_others = i % len(NUMBERS), (i // len(NUMBERS)) % 2 == 1
        noun, other = draw.some(OBJECTS, 2)
        others = draw.between(1, 5) if among_others else 0
        size = draw.between(34, 42)
        slack = (CELL_PX - size) // 2
        layers: list[Layer] = []
        for k, cell in enumerate(draw.some(range(GRID * GRID), number + 1 + others)):
            row, column = divmod(cell, GRID)
            x = MARGIN_PX + column * CELL_PX + CELL_PX // 2 + draw.between(-slack, slack)
            y = MARGIN_PX + row * CELL_PX + CELL_PX // 2 + draw.between(-slack, slack)
            layers.append(Thing(noun if k <= number else other, x, y, size))
        return Item(
            key=f"{self.name}/{i}",
            rows=(NUMBERS[number], "among others" if among_others else "alone"),
            group=noun,
            pictures=(Scene(tuple(layers)),),
            texts=tuple(f"{word} {noun if word == 'one' else plural(noun)}" for word in NUMBERS),
            right=(number,),
        )
