"""Work shared by the processes of a run with the result of one: whole pieces of a fixed grid, put together in their order.

Floating point sums depend on what is summed together. So the grid of batches and blocks is that of one process, piece k is done
by process k mod N, and the parts are gathered as they are, before anything is counted or averaged.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Processes(Protocol):
    """The processes that share the work; `wordsight.train.distributed.World` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Any small object of every process, in rank order."""
        ...

    def gather_rows(self, rows_BX: Tensor, sizes: Sequence[int]) -> Tensor:
        """Every process's rows one after the other, where process r has sizes[r] of them."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def gather_rows(self, rows_BX: Tensor, sizes: Sequence[int]) -> Tensor:
        return rows_BX


ALONE = Alone()


def own_pieces(world: Processes, count: int) -> range:
    """Which of `count` pieces of work are this process's."""
    return range(world.rank, count, world.size)


def together(world: Processes, work: Callable[[], T]) -> list[T]:
    """What `work` returns in every process, in rank order; a small object.

    Raises:
        ValueError, OSError: the error of the first process that had one, in every process, so that none waits for it.
    """
    if world.size == 1:
        return [work()]
    value, error = None, None
    try:
        value = work()
    except (ValueError, OSError) as caught:
        error = caught
    found = world.gather_objects((value, None if error is None else _portable(error)))
    for rank, (_, other) in enumerate(found):
        if other is not None:
            raise error if rank == world.rank and error is not None else other
    return [one for one, _ in found]


def from_main(world: Processes, work: Callable[[], T]) -> T:
    """What `work` returns in the main process; the others do not call it."""
    return together(world, lambda: work() if world.rank == 0 else None)[0]  # type: ignore[return-value]


def in_order(world: Processes, mine: Mapping[int, Tensor]) -> Tensor:
    """The rows of all pieces, by the number of the piece; [rows, ...] on the CPU, at least one piece in all.

    Args:
        mine: piece number -> its rows, this process's; the shape after the first axis is the same everywhere.
    """
    if world.size == 1:
        return torch.cat([mine[k] for k in sorted(mine)])
    sizes = {k: len(mine[k]) for k in sorted(mine)}
    about = world.gather_objects((sizes, None if not mine else (mine[min(mine)].dtype, tuple(mine[min(mine)].shape[1:]))))
    dtype, shape = next(form for _, form in about if form is not None)
    rows = torch.cat([mine[k] for k in sizes]) if mine else torch.empty(0, *shape, dtype=dtype)
    everyone = world.gather_rows(rows, [sum(found.values()) for found, _ in about])
    numbers = [k for found, _ in about for k in found]
    parts = dict(zip(numbers, everyone.split([size for found, _ in about for size in found.values()]), strict=True))
    return torch.cat([parts[k] for k in sorted(parts)])


def _portable(error: Exception) -> Exception:
    """The error as it can be sent to another process, where it need not be said once more."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # an error class with a constructor of its own
        copy = ValueError(str(error))
    copy.said = True
    return copy
