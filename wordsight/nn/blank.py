"""Models whose weights are not drawn: names and shapes, for what is filled from a file.

The memory of such weights is asked for and never touched, so it costs nothing. torch's own way, the meta device, traces every
operation on it and imports its compiler for that, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MADE: dict[Callable[..., Any], Callable[..., Any]] = {torch.randn: torch.empty, torch.rand: torch.empty}
INITS = ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_")
LEFT = {Tensor.uniform_, *(getattr(nn.init, name) for name in INITS)}


class _NothingDrawn(TorchFunctionMode):
    """Leaves random tensors as they are found in memory, or zero."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LEFT:
            return args[0] if args else kwargs["tensor"]
        if func is Tensor.normal_:
            return args[0].zero_()  # not left: `nn.init.trunc_normal_` draws until it is content
        return MADE.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def blank() -> Iterator[None]:
    """Inside, the initialisation of modules draws no random number: every weight must be assigned afterwards."""
    with _NothingDrawn():
        yield
