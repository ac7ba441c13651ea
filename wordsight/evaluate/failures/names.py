"""What can be drawn and how it is called: embedded pictures with plain English names, all trained concepts."""

from __future__ import annotations

# Whole animals and people: they can carry, think and look.
BEINGS = (
    "ant cat dog cow elephant giraffe lion tiger rabbit pig monkey bear duck owl penguin frog snake crab spider dolphin "
    "shark kangaroo goat rat chipmunk butterfly lizard crocodile donkey robot ghost man woman boy girl"
).split()

# Things that are told by one look. Nothing here is a kind or a part of another (no bird beside an owl, no door beside a house),
# so that "no owl" and "three owls" are true or false.
THINGS = (
    *"axe bell bicycle bus taxi tractor train airplane helicopter rocket sailboat house castle tulip sunflower pear lemon carrot "
    "pizza hamburger cookie doughnut egg hammer umbrella guitar trumpet pencil camera television telephone laptop "
    "basketball balloon crown kite mushroom tomato avocado candle magnet anchor wrench screwdriver toothbrush dress motorcycle "
    "sled peach pineapple eggplant melon".split(),
    "top hat",
)
OBJECTS = (*BEINGS, *THINGS)

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PLURALS = {"man": "men", "woman": "women", "tomato": "tomatoes"}


def a(noun: str) -> str:
    """The noun with its article: "a dog", "an owl"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """More than one of them."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
