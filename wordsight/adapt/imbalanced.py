"""Training on classes of unequal size: losses by name, rows drawn, SGD as published (arXiv 2304.01457, and FixMatch's schedule).

The losses are those of `wordsight.losses.imbalance`, each with its paper's settings.

Shape legend: N pictures, B rows of a batch, V views, C classes, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

from wordsight.losses import imbalance
from wordsight.train.optim import split_by_decay

LOSSES = (
    "cross_entropy",
    "class_balanced",
    "effective_number",
    "grw",
    "focal",
    "balanced_softmax",
    "logit_adjustment",
    "ldam",
    "lade",
)
SAMPLINGS = ("instance", "class_balanced")
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("nesterov", "sgd", "adamw")
DECAYS = ("fixmatch", "cosine")
EFFECTIVE_BETA = 0.9999
LDAM_SCALE = 30.0
DEFERRED_SHARE = 0.8  # of the steps before LDAM weighs classes: 160 of the paper's 200 epochs
COSINES = 7 / 16  # of pi, where the learning rate's cosine ends
WARMUP_SHARE = 16  # 512 of 8192 steps

StepLoss = Callable[[Tensor, Tensor, "Tensor | None", int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a part learns: by default SGD with Nesterov's momentum.

    Attributes:
        steps: updates; 0 leaves everything as it starts.
        batch_size: B.
        learning_rate: the highest, after the warm-up.
        momentum: 0 to 1; AdamW has none.
        weight_decay: of matrices; vectors and numbers have none.
        optimizer: "nesterov", "sgd" (its momentum is the plain one) or "adamw".
        decay: of the learning rate after the warm-up, t from 0 to 1: "fixmatch" cos(7 pi t / 16), "cosine" (1 + cos(pi t)) / 2.
        warmup_steps: updates over which the rate grows; None: a sixteenth of the steps, as published.
        sampling: "instance": every picture equally often; "class_balanced": every class, and in it every picture.
        precision: "float32"; or "bfloat16": products in bfloat16, weights, norms and losses in float32, which is 2 to 3 times as
            fast where the processor has it.
        seed: of rows and views.
    """

    steps: int = 8192
    batch_size: int = 256
    learning_rate: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_steps: int | None = None
    optimizer: str = "nesterov"
    decay: str = "fixmatch"
    sampling: str = "instance"
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a number above 0, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= max(self.steps - 1, 0):
            raise ValueError(
                f"warmup_steps must be 0 to {max(self.steps - 1, 0)} with steps={self.steps}, got {self.warmup_steps}"
            )
        choices = {"optimizer": OPTIMIZERS, "decay": DECAYS, "sampling": SAMPLINGS, "precision": PRECISIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, estimator: Any, **given: Any) -> Schedule:
        """The schedule of an estimator's parameters of these names, but for those that are given."""
        names = [one.name for one in fields(cls) if one.name not in given and hasattr(estimator, one.name)]
        return cls(**{name: getattr(estimator, name) for name in names}, **given)

    def rate(self, step: int) -> float:
        """The learning rate of update `step` (from 0): linear over the warm-up, then as `decay` says."""
        warmup = self.steps // WARMUP_SHARE if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        turn = math.pi * (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (math.cos(COSINES * turn) if self.decay == "fixmatch" else (1 + math.cos(turn)) / 2)

    def optimize(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of what requires a gradient in a module."""
        decayed, free = split_by_decay(module.named_parameters())
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": free, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.learning_rate)
        nesterov = self.optimizer == "nesterov" and self.momentum > 0
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, nesterov=nesterov)


def step_loss(
    name: str, counts: Tensor, *, steps: int, gamma: float = 2.0, tau: float = 1.0, head_scale: float | None = None
) -> StepLoss:
    """The loss of that name as (logits [B, C], targets [B], weights [B] or None, step from 0) -> scalar.

    Args:
        name: one of `LOSSES`.
        counts: [C], training samples of each class.
        steps: of the training.
        gamma: of focal.
        tau: of logit_adjustment.
        head_scale: what a cosine head multiplies its cosines by, None for another head. LDAM needs it.

    Raises:
        ValueError: an unknown loss, or LDAM without a cosine head.
    """
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    weighed = {
        "cross_entropy": lambda: torch.ones(len(counts)),
        "class_balanced": lambda: imbalance.class_balanced_weights(counts),
        "effective_number": lambda: imbalance.effective_number_weights(counts, EFFECTIVE_BETA),
        "grw": lambda: imbalance.grw_weights(counts),
    }
    if name in weighed:
        weights_C = weighed[name]()
        return lambda z, y, w, step: imbalance.weighted_cross_entropy(z, y, weights_C, weights=w)
    if name == "focal":
        return lambda z, y, w, step: imbalance.focal(z, y, gamma, weights=w)
    if name == "balanced_softmax":
        return lambda z, y, w, step: imbalance.balanced_softmax(z, y, counts, weights=w)
    if name == "logit_adjustment":
        return lambda z, y, w, step: imbalance.logit_adjustment(z, y, counts, tau, weights=w)
    if name == "lade":
        return lambda z, y, w, step: imbalance.lade(z, y, counts, weights=w)
    if head_scale is None:
        raise ValueError("loss='ldam' has margins between cosines: use head='cosine'")
    later_C = imbalance.effective_number_weights(counts, EFFECTIVE_BETA)

    def ldam(logits: Tensor, targets: Tensor, weights: Tensor | None, step: int) -> Tensor:
        if step >= DEFERRED_SHARE * steps:
            of_class_B = later_C.to(logits.device)[targets]
            weights = of_class_B if weights is None else weights * of_class_B
        return imbalance.ldam(logits / head_scale, targets, counts, scale=head_scale, weights=weights)

    return ldam


def class_counts(targets_N: Tensor, weights_N: Tensor | None, num_classes: int) -> Tensor:
    """Pictures of each class, or the sum of their weights: float64 [C]."""
    ones_N = torch.ones(len(targets_N), dtype=torch.float64) if weights_N is None else weights_N.double()
    return torch.zeros(num_classes, dtype=torch.float64).index_add_(0, targets_N, ones_N)


def draw_rows(targets_N: Tensor, num_views: int, schedule: Schedule) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Rows [B] and views [B] (None: the fixed one) of each step.

    "instance" goes through all pictures in a new order each time; "class_balanced" draws a class that has pictures, then one of
    them.
    """
    rng = np.random.default_rng([schedule.seed, 0])
    targets = targets_N.cpu().numpy()
    by_class = np.argsort(targets, kind="stable")
    present, starts, sizes = np.unique(targets[by_class], return_index=True, return_counts=True)
    left = np.empty(0, np.int64)
    for _ in range(schedule.steps):
        if schedule.sampling == "class_balanced":
            classes_B = rng.integers(len(present), size=schedule.batch_size)
            rows_B = by_class[starts[classes_B] + rng.integers(sizes[classes_B])]
        else:
            while len(left) < schedule.batch_size:
                left = np.concatenate([left, rng.permutation(len(targets))])
            rows_B, left = left[: schedule.batch_size], left[schedule.batch_size :]
        yield rows_B, rng.integers(num_views, size=schedule.batch_size) if num_views else None


def train(
    module: nn.Module,
    read: Callable[[np.ndarray, np.ndarray | None], Tensor],
    targets_N: Tensor,
    loss: StepLoss,
    schedule: Schedule,
    *,
    num_views: int = 0,
    weights_N: Tensor | None = None,
    progress: bool = False,
) -> None:
    """Teach a module what requires a gradient in it.

    Args:
        module: inputs [B, ...] -> logits [B, C].
        read: (rows [B], views [B] or None) -> inputs on the CPU; the next batch is read while this one is learned.
        targets_N: int64 [N].
        loss: see `step_loss`.
        schedule: how long and how fast.
        num_views: V; 0: the fixed view.
        weights_N: [N], how much each picture counts.
        progress: show a bar.

    Raises:
        ValueError: the loss becomes infinite or undefined.
    """
    optimizer = schedule.optimize(module)
    device = next(module.parameters()).device
    module.train()
    draws = draw_rows(targets_N, num_views, schedule)
    with ThreadPoolExecutor(1, "wordsight-tokens") as pool:
        drawn = next(draws, None)
        coming = None if drawn is None else pool.submit(read, *drawn)
        for step in trange(schedule.steps, desc="steps", unit="step", disable=not progress):
            assert drawn is not None
            assert coming is not None
            rows_B, inputs = torch.from_numpy(drawn[0]), coming.result()
            drawn = next(draws, None)
            coming = None if drawn is None else pool.submit(read, *drawn)
            weights_B = None if weights_N is None else weights_N[rows_B].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=schedule.precision == "bfloat16"):
                logits_BC = module(inputs.to(device))
            value = loss(logits_BC.float(), targets_N[rows_B].to(device), weights_B, step)
            if not torch.isfinite(value):
                raise ValueError(
                    f"the loss is {value.item()} at step {step} of {schedule.steps}: use a lower learning_rate than "
                    f"{schedule.learning_rate:g}"
                )
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
    module.eval()
