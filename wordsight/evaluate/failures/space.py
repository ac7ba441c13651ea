"""Where things are to each other, which is larger, which is nearer: swaps of two things in pictures and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wordsight.evaluate.failures.chance import Draw
from wordsight.evaluate.failures.drawing import COLOURS, Layer, Lines, Scene, Shape, Thing
from wordsight.evaluate.failures.items import FailureMode, Item
from wordsight.evaluate.failures.names import OBJECTS, a

# relation -> its opposite; the words between the two nouns
RELATIONS = {
    "to the left of": "to the right of",
    "above": "below",
    "inside": "around",
    "in front of": "behind",
    "to the right of": "to the left of",
    "below": "above",
    "around": "inside",
    "behind": "in front of",
}
OUTER_FORMS = ("circle", "square", "diamond", "hexagon")  # whose outline leaves room
INNER_FORMS = OUTER_FORMS  # the same, as each of the two must be able to be the outer one


@dataclass(frozen=True, kw_only=True)
class Spatial(FailureMode):
    """Groups of two pictures in which two things have changed places. Rows are the relations.

    In turns the texts differ in the order of the things ("a dog to the left of a cat", "a cat to the left of a dog") and in the
    relation ("a dog to the left of a cat", "a dog to the right of a cat").
    """

    name: ClassVar[str] = "spatial"

    def _item(self, i: int, draw: Draw) -> Item:
        relation = list(RELATIONS)[i % len(RELATIONS)]
        swap_nouns = (i // len(RELATIONS)) % 2 == 0
        if relation in ("inside", "around"):
            first, second = draw.some(INNER_FORMS, 2)
            colours = dict(zip((first, second), draw.some(list(COLOURS), 2), strict=True))
            x, y, small = draw.between(102, 122), draw.between(102, 122), draw.between(52, 64)

            def nested(inner: str, outer: str) -> Scene:
                return Scene(
                    (
                        Shape(outer, colours[outer], x, y, 168, hollow=True),
                        Shape(inner, colours[inner], x, y, small),
                    )
                )

            ordered = [(first, second), (second, first)]
            pictures = [nested(*(pair if relation == "inside" else pair[::-1])) for pair in ordered]
        else:
            first, second = draw.some(OBJECTS, 2)
            pictures = _swapped(relation, first, second, draw)
        texts = [
            f"{a(first)} {relation} {a(second)}",
            f"{a(second)} {relation} {a(first)}" if swap_nouns else f"{a(first)} {RELATIONS[relation]} {a(second)}",
        ]
        return Item(
            key=f"{self.name}/{i}",
            rows=(relation, "things swapped in the text" if swap_nouns else "relation swapped in the text"),
            group="+".join(sorted((first, second))),
            pictures=tuple(pictures),
            texts=tuple(texts),
            right=(0, 1),
        )


def _swapped(relation: str, first: str, second: str, draw: Draw) -> list[Scene]:
    """`first` in the relation to `second`, and the other way round, at the same places."""
    size = draw.between(70, 82)
    if relation in ("in front of", "behind"):
        side = 1 if draw.coin() else -1
        near = (112 - side * draw.between(16, 24), draw.between(132, 142), draw.between(112, 122))
        far = (112 + side * draw.between(28, 36), draw.between(80, 90), draw.between(84, 94))
        places = (near, far) if relation == "in front of" else (far, near)
    else:
        low, high, low_shift, high_shift = 62, 162, draw.between(-14, 14), draw.between(-14, 14)
        if relation in ("above", "below"):
            places = (112 + low_shift, low, size), (112 + high_shift, high, size)
        else:
            places = (low, 112 + low_shift, size), (high, 112 + high_shift, size)
        if relation in ("below", "to the right of"):
            places = places[::-1]
    return [_at(places, names) for names in ((first, second), (second, first))]


def _at(places: tuple[tuple[int, int, int], ...], names: tuple[str, ...], back: tuple[Layer, ...] = ()) -> Scene:
    """Names at (x, y, size), the larger in front of the smaller."""
    things = [Thing(name, *place) for name, place in zip(names, places, strict=True)]
    return Scene((*back, *sorted(things, key=lambda thing: thing.size)))


_ROWS = ("larger", "nearer", "apart", "smaller", "farther", "together")
_SIZE_WORDS = {"larger": "larger than", "smaller": "smaller than"}


@dataclass(frozen=True, kw_only=True)
class SizeDistance(FailureMode):
    """Groups of two pictures: which of two things is larger, which is nearer (on a road), are they close together.

    Rows are what the first text says: larger, smaller, nearer, farther, together, apart.
    """

    name: ClassVar[str] = "size_distance"

    def _item(self, i: int, draw: Draw) -> Item:
        row = _ROWS[i % len(_ROWS)]
        first, second = draw.some(OBJECTS, 2)
        side = 1 if draw.coin() else -1
        if row in _SIZE_WORDS:
            large = 112 - side * 40, draw.between(104, 120), draw.between(100, 110)
            small = 112 + side * 66, draw.between(96, 128), draw.between(44, 52)
            places = (large, small) if row == "larger" else (small, large)
            pictures = [_at(places, names) for names in ((first, second), (second, first))]
            texts = [f"{a(x)} {_SIZE_WORDS[row]} {a(y)}" for x, y in ((first, second), (second, first))]
        elif row in ("nearer", "farther"):
            near, far = (112 - side * 26, 152, draw.between(98, 108)), (112 + side * 12, 62, draw.between(34, 40))
            road = Lines(paths=(((20, 58), (204, 58)), ((96, 58), (24, 206)), ((128, 58), (200, 206))))
            places = (near, far) if row == "nearer" else (far, near)
            pictures = [_at(places, names, (road,)) for names in ((first, second), (second, first))]
            words = ("close by", "far away") if row == "nearer" else ("far away", "close by")
            texts = [f"{a(x)} {words[0]} and {a(y)} {words[1]}" for x, y in ((first, second), (second, first))]
        else:
            height, size = draw.between(80, 144), draw.between(52, 58)
            middle = draw.between(104, 120)
            close = (middle - side * 30, height, size), (middle + side * 30, height, size)
            wide = (112 - side * 66, height, size), (112 + side * 66, height, size)
            order = ((close, "close together"), (wide, "far apart"))
            if row == "apart":
                order = order[::-1]
            pictures = [_at(places, (first, second)) for places, _ in order]
            texts = [f"{a(first)} and {a(second)} {words}" for _, words in order]
        return Item(
            key=f"{self.name}/{i}",
            rows=(row,),
            group="+".join(sorted((first, second))),
            pictures=tuple(pictures),
            texts=tuple(texts),
            right=(0, 1),
        )
