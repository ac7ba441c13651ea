"""Attributes that belong to a thing: "a red cube and a blue ball" is not "a blue cube and a red ball"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wordsight.evaluate.failures.chance import Draw
from wordsight.evaluate.failures.drawing import COLOURS, FLATS, PATTERNS, SOLIDS, Scene, Shape
from wordsight.evaluate.failures.items import FailureMode, Item
from wordsight.evaluate.failures.names import a

_ROWS = ("colour", "size", "pattern")


@dataclass(frozen=True, kw_only=True)
class Binding(FailureMode):
    """Groups of two pictures of the same two shapes at the same places, which have changed colours, sizes or patterns."""

    name: ClassVar[str] = "attribute_binding"

    def _item(self, i: int, draw: Draw) -> Item:
        row = _ROWS[i % len(_ROWS)]
        forms = draw.some(SOLIDS if draw.coin() else FLATS, 2) if row != "pattern" else draw.some(FLATS, 2)
        colours = draw.some(list(COLOURS), 2)
        xs = (62, 162) if draw.coin() else (162, 62)
        ys = draw.between(98, 126), draw.between(98, 126)
        sizes = [draw.between(74, 84)] * 2
        patterns: list[str | None] = [None, None]
        if row == "colour":
            words = list(colours)
        elif row == "size":
            words, sizes, colours = ["large", "small"], [draw.between(84, 90), draw.between(36, 42)], [colours[0]] * 2
        else:
            words = draw.some(PATTERNS, 2)
            patterns, colours = list(words), [colours[0]] * 2
            if "yellow" in colours:  # white on yellow can hardly be seen
                colours = ["blue", "blue"]

        def shown(swap: bool) -> Scene:
            order = (1, 0) if swap else (0, 1)
            return Scene(tuple(Shape(forms[k], colours[j], xs[k], ys[k], sizes[j], patterns[j]) for k, j in enumerate(order)))

        def said(swap: bool) -> str:
            order = (1, 0) if swap else (0, 1)
            return " and ".join(a(f"{words[j]} {forms[k]}") for k, j in enumerate(order))

        return Item(
            key=f"{self.name}/{i}",
            rows=(row,),
            group="+".join(sorted(forms)),
            pictures=(shown(False), shown(True)),
            texts=(said(False), said(True)),
            right=(0, 1),
        )

    def how(self) -> str:
        """Shapes alone are drawn."""
        return "224 px, shapes"
