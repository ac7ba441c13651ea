"""What grammar says and the words alone do not: who is on whom, and what is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wordsight.evaluate.failures.chance import Draw
from wordsight.evaluate.failures.drawing import Lines, Scene, Thing, fitted
from wordsight.evaluate.failures.items import FailureMode, Item
from wordsight.evaluate.failures.names import BEINGS, OBJECTS, a

ROLES = ("on", "thinking of", "carrying", "looking at a picture of")


@dataclass(frozen=True, kw_only=True)
class WordOrder(FailureMode):
    """Groups of two pictures and two texts of the same words in another order: "a cow on a man", "a man on a cow".

    Rows are what the first does: on, carrying, thinking of (in a bubble), looking at a picture of (in a frame).
    """

    name: ClassVar[str] = "word_order"

    def _item(self, i: int, draw: Draw) -> Item:
        role = ROLES[i % len(ROLES)]
        first, second = draw.some(BEINGS, 2)
        shift, flip = draw.between(-12, 12), draw.coin()
        return Item(
            key=f"{self.name}/{i}",
            rows=(role,),
            group="+".join(sorted((first, second))),
            pictures=(_acted(role, first, second, shift, flip), _acted(role, second, first, shift, flip)),
            texts=(f"{a(first)} {role} {a(second)}", f"{a(second)} {role} {a(first)}"),
            right=(0, 1),
        )


def _acted(role: str, actor: str, other: str, shift: int, flip: bool) -> Scene:
    if role in ("on", "carrying"):
        upper, lower = (actor, other) if role == "on" else (other, actor)
        top = 206 - fitted(lower, 104)[1]
        return Scene(
            (
                Thing(lower, 112, 206 - fitted(lower, 104)[1] // 2, 104),
                Thing(upper, 112 + shift, top - fitted(upper, 74)[1] // 2 + 10, 74),
            )
        )
    x = (lambda left: 224 - left) if flip else (lambda left: left)
    actor_at = Thing(actor, x(66), 150 + shift // 2, 92)
    if role == "thinking of":
        dots = tuple(_oval(x(cx), cy, r, r) for cx, cy, r in ((88, 92, 4), (100, 80, 6)))
        return Scene((Lines(ovals=(*dots, _oval(x(150), 64, 56, 46))), Thing(other, x(150), 64, 58), actor_at))
    return Scene((Lines(boxes=((x(162) - 44, 32, x(162) + 44, 120),)), Thing(other, x(162), 76, 62), actor_at))


def _oval(x: int, y: int, half_width: int, half_height: int) -> tuple[int, int, int, int]:
    return x - half_width, y - half_height, x + half_width, y + half_height


_DENIALS = ("with no", "without", "is not", "but not")


@dataclass(frozen=True, kw_only=True)
class Negation(FailureMode):
    """Groups of two pictures, of which one has the thing and the other has not.

    Rows: "a picture with a dog" / "a picture with no dog" (another thing is there), "a cat with a dog" / "a cat without a dog"
    (nothing is there), "this is a dog" / "this is not a dog", "a dog but not a cat" / "a cat but not a dog".
    """

    name: ClassVar[str] = "negation"

    def _item(self, i: int, draw: Draw) -> Item:
        row = _DENIALS[i % len(_DENIALS)]
        noun, other, third = draw.some(OBJECTS, 3)
        height, size = draw.between(100, 124), draw.between(76, 86)
        left, right = (62, 162) if draw.coin() else (162, 62)

        def alone(name: str) -> Scene:
            return Scene((Thing(name, 112, height, size + 20),))

        def both(one: str, two: str) -> Scene:
            return Scene((Thing(one, left, height, size), Thing(two, right, height, size)))

        if row == "with no":
            pictures = both(third, noun), both(third, other)
            texts = f"a picture with {a(noun)}", f"a picture with no {noun}"
        elif row == "without":
            pictures = both(other, noun), Scene((Thing(other, left, height, size),))
            texts = f"{a(other)} with {a(noun)}", f"{a(other)} without {a(noun)}"
        elif row == "is not":
            pictures = alone(noun), alone(other)
            texts = f"this is {a(noun)}", f"this is not {a(noun)}"
        else:
            pictures = alone(noun), alone(other)
            texts = f"{a(noun)} but not {a(other)}", f"{a(other)} but not {a(noun)}"
        return Item(
            key=f"{self.name}/{i}",
            rows=(row,),
            group="+".join(sorted((noun, other))),
            pictures=pictures,
            texts=texts,
            right=(0, 1),
        )
