"""What the methods that train a small head on features share: epochs of shuffled batches, a loss that must be finite.

Shape legend: V views, N pictures, B a batch, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm


def train_head(
    learner: Any,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    loss: Callable[[Tensor, Tensor], Tensor],
    rate: Callable[[int, int], float],
    epochs: int,
) -> list[float]:
    """Train to the end; the last step's parameters are what is kept.

    Args:
        learner: the estimator, for its name and its `progress`.
        optimizer: with the parameters.
        batches: epoch -> (features [B, D], targets [B]) of each batch.
        loss: (features, targets) -> the mean loss.
        rate: (step, epoch), both from 0 -> learning rate.
        epochs: how many.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: a loss is not finite; the message says the step.
    """
    name, step, curve = type(learner).__name__, 0, []
    for epoch in tqdm(range(epochs), desc=name, unit="epoch", disable=not learner.progress):
        losses = []
        for features_BD, targets_B in batches(epoch):
            optimizer.param_groups[0]["lr"] = rate(step, epoch)
            step += 1
            value = loss(features_BD, targets_B)
            losses.append(finite(name, float(value.detach()), step))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
        curve.append(math.fsum(losses) / len(losses))
    return curve


def finite(name: str, loss: float, step: int) -> float:
    """The loss.

    Raises:
        ValueError: it is infinite or undefined.
    """
    if not math.isfinite(loss):
        raise ValueError(f"{name}'s loss is {loss} at step {step}: lower learning_rate, or look for features that are too large")
    return loss


def view_batches(
    features_VND: Tensor, targets_N: Tensor, batch_size: int, generator: torch.Generator, *, drop_rest: bool
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """Epoch e is view e modulo V, shuffled; `drop_rest` leaves out what fills no batch, where there is a full one."""
    num_rows = len(targets_N)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        view_ND = features_VND[epoch % len(features_VND)]
        size = min(batch_size, num_rows)
        order_N = torch.randperm(num_rows, generator=generator)
        for rows_B in order_N[: num_rows // size * size if drop_rest else num_rows].split(size):
            yield view_ND[rows_B], targets_N[rows_B]

    return batches


def number(learner: Any, name: str, low: float, *, above: bool = False, whole: bool = False) -> None:
    """Refuse a setting that is no finite number of at least `low` (above it), or no whole one.

    Raises:
        ValueError: with the setting, its value and what is allowed.
    """
    value = getattr(learner, name)
    good = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or (above and value == low):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} {'above' if above else 'of at least'} {low:g}, got {value!r}")


def cosine_logits(features_ND: Tensor, vectors_CD: Tensor, scale: float) -> Tensor:
    """scale * cos(picture, class): [N, C]."""
    return scale * normalize(features_ND, dim=1) @ normalize(vectors_CD, dim=1).T
