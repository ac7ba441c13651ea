"""Folders that one process writes to at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hold(folder: Path, doing: str) -> Iterator[None]:
    """Make a folder if need be, and keep other processes out of it; the system lets go of it however this one ends.

    Raises:
        ValueError: another process holds it; `doing` says what that does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            import fcntl
        except ImportError:  # Windows has no flock: there nobody guards against two processes at once
            fcntl = None  # type: ignore[assignment]
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise ValueError(f"process {holder} is {doing} {folder}: wait for it, or choose another --run") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
