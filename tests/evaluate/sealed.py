"""Test labels that may be read by the final scoring alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

SCORING = ("wordsight.evaluate.features", "score")


class SealedLabels(Sequence[Any]):
    """Their number is known; who reads one outside of `wordsight.evaluate.features.score` is an error."""

    def __init__(self, labels: Sequence[Any]) -> None:
        self.labels = list(labels)
        self.was_read = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: Any) -> Any:
        self._open()
        return self.labels[i]

    def __iter__(self) -> Iterator[Any]:
        self._open()
        return iter(self.labels)

    def __contains__(self, label: object) -> bool:
        self._open()
        return label in self.labels

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("test labels were turned into an array")

    def _open(self) -> None:
        frame = sys._getframe()
        while frame is not None:
            if (frame.f_globals.get("__name__"), frame.f_code.co_name) == SCORING:
                self.was_read = True
                return
            frame = frame.f_back
        raise AssertionError("test labels were read before the final scoring")
