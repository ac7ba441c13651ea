"""A stochastic code of features: mean, log variance, and a draw in training (arXiv 1312.6114; 1612.00410).

What the code costs is `losses.rate_distortion.gaussian_rate`.

Shape legend: B batch, W feature width, D code width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wordsight.nn.random import uniform


def normal(rows: int, columns: int, *, stream: int, device: torch.device | str) -> Tensor:
    """[rows, columns] float32, standard normal: numbered by row inside `numbered_rows`, as `uniform` is.

    One uniform number of 24 bits each through the inverse of the normal's law, so nothing lies further out than 5.4.
    """
    centred = (
        2 * uniform(rows, columns, stream=stream, device=device) - 1 + 2.0**-24
    )  # odd multiples of 2^-24: exact, and never +-1
    return math.sqrt(2) * torch.erfinv(centred)


class GaussianHead(nn.Module):
    """Features -> a code z ~ N(mean, exp(log_variance)), whose prior r(z) is a Gaussian with a learned mean and variance.

    In training z is drawn, with the row's own random numbers (see `nn.random`), so that micro-batches and processes draw what one
    batch in one process would; in evaluation z is the mean.

    Attributes:
        mean: linear, W -> D.
        log_variance: linear, W -> D; starts constant.
        prior_mean: [D].
        prior_log_variance: [D].
    """

    def __init__(self, in_width: int, width: int, *, init_log_variance: float = -4.0) -> None:
        super().__init__()
        self.mean = nn.Linear(in_width, width)
        self.log_variance = nn.Linear(in_width, width)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.constant_(self.log_variance.bias, init_log_variance)
        self.prior_mean = nn.Parameter(torch.zeros(width))
        self.prior_log_variance = nn.Parameter(torch.zeros(width))
        self.random_stream = 0

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, W] -> (code, mean, log_variance), each [B, D]; the last two are what `gaussian_rate` takes, beside the prior."""
        mean_BD, log_variance_BD = self.mean(features), self.log_variance(features)
        if not self.training:
            return mean_BD, mean_BD, log_variance_BD
        noise_BD = normal(*mean_BD.shape, stream=self.random_stream, device=mean_BD.device)
        return mean_BD + (log_variance_BD / 2).exp() * noise_BD.to(mean_BD.dtype), mean_BD, log_variance_BD
