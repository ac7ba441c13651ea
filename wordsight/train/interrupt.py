"""Ctrl-C and SIGTERM: noted, so that the loop can finish its step and save."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from wordsight.train.distributed import orphaned


class Interrupts:
    """Notes SIGINT and SIGTERM while it is entered; a second one of a kind acts at once."""

    def __init__(self) -> None:
        self._noted = 0
        self._before: dict[int, Any] = {}

    @property
    def noted(self) -> int:
        """The signal that asks this process to stop, 0 for none. A launcher that is gone asks too."""
        if not self._noted and orphaned():
            self._noted = signal.SIGTERM
        return self._noted

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = number
