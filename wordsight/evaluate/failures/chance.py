"""Random choices that are the same on every machine and in every Python: only `random.Random.random` is promised to be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Choices that depend on what it was made of and on nothing else.

    Args:
        parts: what names the stream, e.g. mode, version, seed and number of the item.
    """

    def __init__(self, *parts: str | int) -> None:
        self._random = random.Random("/".join(map(str, parts)))  # a text is seeded through SHA-512, everywhere alike

    def below(self, count: int) -> int:
        """0, 1, ..., count - 1."""
        return int(self._random.random() * count)

    def between(self, low: int, high: int) -> int:
        """low, ..., high, both possible."""
        return low + self.below(high - low + 1)

    def one(self, things: Sequence[T]) -> T:
        """One of `things`."""
        return things[self.below(len(things))]

    def some(self, things: Sequence[T], count: int) -> list[T]:
        """`count` different ones of `things`, in random order.

        Raises:
            ValueError: there are not so many.
        """
        if count > len(things):
            raise ValueError(f"can't draw {count} different ones of {len(things)}")
        left = list(things)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def coin(self) -> bool:
        """True or False."""
        return self._random.random() < 0.5
