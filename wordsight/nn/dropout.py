"""Dropout (Srivastava et al. 2014) whose random numbers belong to rows of the global batch.

Shape legend: B rows, ... places of a row.
"""

from __future__ import annotations

from torch import Tensor, nn

from wordsight.nn.random import uniform


class Dropout(nn.Module):
    """In training, zero each number with probability `rate` and scale the rest up.

    The draw of a number depends on its row of the global batch and its place in the row, so neither micro-batches nor padding
    behind a text change it.

    Args:
        rate: in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.random_stream = 0

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training or self.rate == 0.0:
            return x
        draw = uniform(x.shape[0], x[0].numel(), stream=self.random_stream, device=x.device).view(x.shape)
        return x * ((draw >= self.rate).to(x.dtype) / (1.0 - self.rate))
