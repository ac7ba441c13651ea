"""Random numbers that belong to a row of the global batch, whatever the micro-batch or process that computes the row.

Patch dropout and stochastic depth draw here. In training the loop numbers the rows of the global batch; the draw of a row is
then a hash of (seed of the step, row, stream, column) - a counter-based generator - so that k micro-batches or k processes drop
exactly what one batch in one process drops, and recomputing (gradient caching, activation checkpointing) repeats it. Elsewhere it
is torch.rand.

Shape legend: B rows at hand, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# splitmix64's constants (Steele et al. 2014) as signed 64-bit integers; int64 multiplication wraps, which is what the hash wants
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)
_WEYL = 0xD1342543DE82EF95 - (1 << 64)

# [2] int64: the step's seed and the number of the first row at hand. A global and not thread-local: on CUDA autograd's own
# threads recompute checkpointed blocks. A tensor, so that a compiled model is not compiled again for every step.
_state: Tensor | None = None
_num_rows: int | None = None  # rows at hand; a tower that is given k times as many has k texts of each


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (right shifts made logical by a mask)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _wrap(x: int) -> int:
    """A Python integer as the int64 with the same low 64 bits."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


@contextmanager
def numbered_rows(seed: int, first_row: int, device: torch.device | str, num_rows: int | None = None) -> Iterator[None]:
    """Inside, `uniform` draws for rows first_row, first_row + 1, ... of the global batch of the step that `seed` stands for.

    Args:
        seed: of the step.
        first_row: number of the first row at hand.
        device: where the numbers will be wanted.
        num_rows: rows at hand. A module that is given k times as many (k texts of each row, one row's after the other's) then
            draws for rows k first_row, k first_row + 1, ..., which are k for each row too. None: one for each.
    """
    global _state, _num_rows
    before, _state = (_state, _num_rows), torch.tensor([seed, first_row], dtype=torch.int64, device=device)
    _num_rows = num_rows
    try:
        yield
    finally:
        _state, _num_rows = before


def uniform(rows: int, columns: int, *, stream: int, device: torch.device | str) -> Tensor:
    """[rows, columns] float32, uniform in [0, 1): numbered by row inside `numbered_rows`, torch.rand elsewhere.

    Args:
        rows: B.
        columns: C, independent numbers a row.
        stream: which of the model's draws this is; see `number_streams`.
        device: where the numbers are wanted.
    """
    if _state is None:
        return torch.rand(rows, columns, device=device)
    state = _state.to(device)
    several = 1 if _num_rows is None else max(1, rows // _num_rows)
    row_B1 = (torch.arange(rows, device=device) + several * state[1])[:, None]
    column_C = torch.arange(columns, device=device)
    key_B1 = _mix(_mix(state[0] + _wrap(stream * _GAMMA)) + row_B1 * _GAMMA)
    bits_BC = _mix(key_B1 + (column_C + 1) * _WEYL)
    return ((bits_BC >> 40) & 0xFFFFFF).float() * 2.0**-24


def number_streams(model: nn.Module) -> None:
    """Give every module that draws (it has an attribute `random_stream`) a number of its own, by its place in the model."""
    drawing = [module for module in model.modules() if hasattr(module, "random_stream")]
    for number, module in enumerate(drawing, start=1):
        setattr(module, "random_stream", number)  # noqa: B010 - a plain attribute that nn.Module's types know nothing of
