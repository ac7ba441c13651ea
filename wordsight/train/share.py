"""How much of a run's time its evaluations may take: those that would take more are put off.

Evaluations change nothing in training: they draw no random numbers of its, and weights and averages stay. So when they run may
depend on the clock, and a run that goes on is bit-identical all the same in its weights and its lines of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class EvaluationTime:
    """The clock of a run's evaluations, since this start.

    Args:
        max_share: the largest share of the time, evaluations included, that those on the way may take; None: any.
    """

    def __init__(self, max_share: float | None) -> None:
        self.max_share = max_share
        self.waiting = False  # whether one is due that was put off
        self._started = time.monotonic()
        self._spent_s = 0.0
        self._last_s = 0.0

    def allows_one(self) -> bool:
        """Whether another one, as long as the last, keeps within the share; the first shows how long that is."""
        if self.max_share is None:
            return True
        elapsed_s = time.monotonic() - self._started
        return self._spent_s + self._last_s <= self.max_share * (elapsed_s + self._last_s)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Around an evaluation."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._last_s = time.monotonic() - began
            self._spent_s += self._last_s
            self.waiting = False
