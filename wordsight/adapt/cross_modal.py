"""Cross-modal linear probe: the texts of the classes are further shots of them (arXiv 2301.06267).

Shape legend: V views, N pictures (of all views), M validation pictures, T texts (templates x classes), B a batch, S settings that
learn side by side, C classes, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm

from wordsight.adapt.estimator import AdaptedClassifier
from wordsight.evaluate.embedding import embed_texts
from wordsight.evaluate.prompts import fill, own_prompts, prompt_templates

# the published grid, in its order; every pair learns at every batch size
LEARNING_RATES = (1e-3, 1e-4)
WEIGHT_DECAYS = (0.0, 0.01, 1e-4)
BATCH_SIZES = (8, 32)
WARM_UP, WARM_UP_RATE = 50, 1e-5
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8
JUDGE_EVERY = 100  # iterations between two looks at the validation pictures


class CrossModalProbe(AdaptedClassifier):
    """p(c | x) = softmax_c(exp(log_scale) f w_c), f of unit length; w starts at the texts, and learns from pictures and texts.

    Half of each batch are pictures, half are texts: each template's of each class is a shot. AdamW, a linear warm-up of 50
    iterations from 1e-5, then a cosine.

    With validation pictures `learning_rate`, `weight_decay` and `batch_size` left at None are each tried at their published
    values, and every 100 iterations it is looked how many pictures are named rightly: what is kept names most, and of equals has
    the lowest cross-entropy. Without, None is 1e-3, .01 and 32, and the last iteration is kept: the paper always validates, so
    these are a choice of ours from its grid.

    Args:
        model: an Embedder.
        classes: C names; None takes those in y.
        prompts: see `ZeroShot`.
        iterations: of AdamW.
        learning_rate: where the cosine starts; None: see above.
        weight_decay: of AdamW; None: see above.
        batch_size: pictures and texts a step, an even number; None: see above. A half is no larger than what there is.
        seed: of the order of pictures and texts, and the random views.
        num_views: V random views of each picture, each a shot; 0: the fixed view.
        progress: show a bar.

    Attributes:
        class_vectors_: float32 [C, D].
        scale_: exp(log_scale).
        chosen_: {"learning_rate", "weight_decay", "batch_size", "iteration"} of what was kept.
        loss_curve_: of it, the mean loss of each 100 iterations.
    """

    saved = ("class_vectors_", "scale_", "chosen_", "loss_curve_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        iterations: int = 12800,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        num_views: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.iterations = iterations
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.seed = seed
        self.num_views = num_views
        self.progress = progress

    def _fit(self, features_VND: Tensor, targets_N: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        self._check_settings()
        start_CD, self.scale_ = self._text_features(), self._scale()
        pictures = features_VND.flatten(0, 1), targets_N.repeat(len(features_VND))
        texts = self._texts()
        chooses = validation is not None
        rates = _values(self.learning_rate, LEARNING_RATES if chooses else (1e-3,))
        decays = _values(self.weight_decay, WEIGHT_DECAYS if chooses else (0.01,))
        pairs = [(rate, decay) for rate in rates for decay in decays]
        best: tuple[float, float] = (-1.0, 0.0)
        for batch_size in _values(self.batch_size, BATCH_SIZES if chooses else (32,)):
            weights_SCD = start_CD.repeat(len(pairs), 1, 1)
            curves: list[list[float]] = [[] for _ in pairs]
            kept: int | None = None
            for iteration, losses_S in self._train(weights_SCD, pairs, pictures, texts, int(batch_size)):
                for curve, loss in zip(curves, losses_S.tolist(), strict=True):
                    curve.append(loss)
                for s, value in enumerate(_worth(weights_SCD, self.scale_, validation, iteration)):
                    if value > best:
                        best, kept = value, s
                        self.class_vectors_ = weights_SCD[s].clone()
                        self.chosen_ = {
                            "learning_rate": pairs[s][0],
                            "weight_decay": pairs[s][1],
                            "batch_size": int(batch_size),
                            "iteration": iteration,
                        }
            if kept is not None:
                self.loss_curve_ = curves[kept]

    def _train(
        self,
        weights_SCD: Tensor,
        pairs: Sequence[tuple[float, float]],
        pictures: tuple[Tensor, Tensor],
        texts: tuple[Tensor, Tensor],
        batch_size: int,
    ) -> Iterator[tuple[int, Tensor]]:
        """Train in place; gives (iterations done, mean loss [S] since the last time) each 100 iterations and at the end."""
        name = type(self).__name__
        optimizer = SideBySideAdamW(weights_SCD, torch.tensor([decay for _, decay in pairs]))
        generator = torch.Generator().manual_seed(self.seed)
        streams = [_batches(len(part[1]), batch_size // 2, generator) for part in (pictures, texts)]
        features_RD, targets_R = torch.cat([pictures[0], texts[0]]), torch.cat([pictures[1], texts[1]])
        total_S, since = torch.zeros(len(pairs)), 0
        for i in tqdm(range(self.iterations), desc=f"{name}, batches of {batch_size}", unit="step", disable=not self.progress):
            rows_B = torch.cat([next(streams[0]), next(streams[1]) + len(pictures[1])])
            losses_S, gradient_SCD = loss_and_gradient(weights_SCD, features_RD[rows_B], targets_R[rows_B], self.scale_)
            if not torch.isfinite(losses_S).all():
                loss = float(losses_S[~torch.isfinite(losses_S)][0])
                raise ValueError(f"{name}'s loss is {loss} at step {i + 1} of {self.iterations}: lower learning_rate")
            optimizer.step(gradient_SCD, torch.tensor([learning_rate_at(i, self.iterations, rate) for rate, _ in pairs]))
            total_S, since = total_S + losses_S, since + 1
            if since == JUDGE_EVERY or i + 1 == self.iterations:
                yield i + 1, total_S / since
                total_S, since = torch.zeros(len(pairs)), 0

    def _logits(self, features_ND: Tensor) -> Tensor:
        return self.scale_ * features_ND @ self.class_vectors_.T

    def _texts(self) -> tuple[Tensor, Tensor]:
        """Unit vectors [T, D] of each template of each class, and their classes [T]."""
        templates = prompt_templates(own_prompts(self.model) if self.prompts is None else self.prompts)
        texts = [fill(template, str(name)) for name in self.classes_ for template in templates]
        return embed_texts(self.model, texts), torch.arange(len(self.classes_)).repeat_interleave(len(templates))

    def _check_settings(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, or None, got {self.learning_rate}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, or None, got {self.weight_decay}")
        if self.batch_size is not None and (self.batch_size < 2 or self.batch_size % 2):
            raise ValueError(f"batch_size must be an even number of at least 2, half pictures, half texts, got {self.batch_size}")


def learning_rate_at(iteration: int, iterations: int, learning_rate: float) -> float:
    """Of the iteration, counted from 0: 1e-5, then in proportion up to the 50th, then a cosine over `iterations`."""
    if iteration < WARM_UP:
        return learning_rate * iteration / WARM_UP if iteration else WARM_UP_RATE
    return 0.5 * learning_rate * (1 + math.cos(math.pi * (iteration - WARM_UP) / iterations))


class SideBySideAdamW:
    """torch.optim.AdamW for S weights at once, each with a learning rate and a decay of its own: small heads cost mostly calls.

    Args:
        weights_SCD: changed in place.
        decays_S: weight decays.
    """

    def __init__(self, weights_SCD: Tensor, decays_S: Tensor) -> None:
        self.weights_SCD, self.decays_S11 = weights_SCD, decays_S[:, None, None]
        self.mean_SCD, self.square_SCD = torch.zeros_like(weights_SCD), torch.zeros_like(weights_SCD)
        self.room_SCD = torch.empty_like(weights_SCD)
        self.count = 0

    def step(self, gradient_SCD: Tensor, rates_S: Tensor) -> None:
        """One step down."""
        self.count += 1
        (beta1, beta2), rates_S11 = ADAM_BETAS, rates_S[:, None, None]
        self.mean_SCD.lerp_(gradient_SCD, 1 - beta1)
        self.square_SCD.mul_(beta2).addcmul_(gradient_SCD, gradient_SCD, value=1 - beta2)
        # both corrections for the start at zero go into the step's size and epsilon
        root = math.sqrt(1 - beta2**self.count)
        torch.sqrt(self.square_SCD, out=self.room_SCD).add_(ADAM_EPSILON * root)
        torch.div(self.mean_SCD, self.room_SCD, out=self.room_SCD).mul_(rates_S11 * (root / (1 - beta1**self.count)))
        self.weights_SCD.mul_(1 - rates_S11 * self.decays_S11).sub_(self.room_SCD)


def loss_and_gradient(weights_SCD: Tensor, features_BD: Tensor, targets_B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy [S] of softmax(scale f W') for each of S weights, and its gradient [S, C, D]."""
    num_settings, num_classes, _ = weights_SCD.shape
    logits_BX = scale * features_BD @ weights_SCD.flatten(0, 1).T
    log_p_BSC = logits_BX.unflatten(1, (num_settings, num_classes)).log_softmax(2)
    right_BSC = one_hot(targets_B, num_classes)[:, None].to(log_p_BSC.dtype)
    losses_S = -(log_p_BSC * right_BSC).sum((0, 2)) / len(targets_B)
    residual_BSC = log_p_BSC.exp().sub_(right_BSC).mul_(scale / len(targets_B))
    return losses_S, (residual_BSC.flatten(1).T @ features_BD).view_as(weights_SCD)


def _batches(num_rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of batches without end: shuffled anew each time through, the rest that fills no batch left out."""
    size = min(size, num_rows)
    while True:
        order = torch.randperm(num_rows, generator=generator)
        yield from order[: num_rows // size * size].split(size)


def _values(given: Any, published: Sequence[Any]) -> Sequence[Any]:
    return published if given is None else (given,)


def _worth(
    weights_SCD: Tensor, scale: float, validation: tuple[Tensor, Tensor] | None, iteration: int
) -> list[tuple[float, float]]:
    """By what weights are chosen, more is better: (accuracy, -cross-entropy) on validation; without it, the later one."""
    if validation is None:
        return [(float(iteration), 0.0)] * len(weights_SCD)
    found = []
    for weights_CD in weights_SCD:
        logits_MC = scale * validation[0] @ weights_CD.T
        hits = float((logits_MC.argmax(1) == validation[1]).double().mean())
        found.append((hits, -float(cross_entropy(logits_MC, validation[1]))))
    return found
