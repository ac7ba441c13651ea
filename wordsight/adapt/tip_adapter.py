"""Tip-Adapter: a cache of the shots beside zero-shot, without training or with trained keys (arXiv 2207.09519).

logits = scale f W' + alpha exp(-beta (1 - f K')) Y, with unit vectors f of a picture, W of the class names, K of the shots, and Y
the shots' classes, one-hot.

Shape legend: N shots, V views, M validation pictures, C classes, D feature width, A values of alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from wordsight.adapt.estimator import AdaptedClassifier
from wordsight.adapt.head_training import number, train_head, view_batches

# where most of the published configurations start from
ALPHA, BETA = 1.17, 1.0
EPS = 1e-4  # of AdamW
Setting = float | Literal["search"]


class TipAdapter(AdaptedClassifier):
    """Zero-shot plus what the nearest shots say; nothing is trained.

    alpha and beta are searched by accuracy on validation, in the published grid; without validation they are what most published
    configurations start from, 1.17 and 1. The published scripts choose more on the test set than they should: not here.
    Published caches hold the mean of 10 random views (num_views=10); theirs are crops of 50 to 100% of the area, these, as
    for all methods here, of 8 to 100%.

    Args:
        model: an Embedder.
        classes: C names; None takes those in y.
        prompts: see `ZeroShot`.
        alpha: weight of the cache, or "search".
        beta: sharpness of the affinities, or "search".
        search_scale: largest beta and alpha of the search; published ones go from (7, 3) to (50, 50), by data set.
        search_steps: values of beta and alpha in it, from 0.1 up.
        num_views: random views a shot, whose features' mean is the key; 0: the fixed view.
        seed: of the views.

    Attributes:
        keys_: float32 [N, D].
        shots_: int64 [N], the class of each key.
        text_vectors_: float32 [C, D], unit length.
        scale_: exp(log_scale).
        alpha_, beta_: what was taken.
        validation_accuracy_: of these, None without a search.
    """

    unit_length = False  # the views' mean is taken before
    saved: ClassVar[tuple[str, ...]] = ("keys_", "shots_", "text_vectors_", "scale_", "alpha_", "beta_", "validation_accuracy_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        alpha: Setting = "search",
        beta: Setting = "search",
        search_scale: tuple[float, float] = (12.0, 5.0),
        search_steps: tuple[int, int] = (200, 20),
        num_views: int = 0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.alpha = alpha
        self.beta = beta
        self.search_scale = search_scale
        self.search_steps = search_steps
        self.num_views = num_views
        self.seed = seed

    def _fit(self, features_VND: Tensor, targets_N: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        self._check_settings()
        self.text_vectors_, self.scale_ = self._text_features(), self._scale()
        self.keys_, self.shots_ = normalize(features_VND.mean(0), dim=1), targets_N
        self.alpha_, self.beta_ = (
            default if given == "search" else float(given) for given, default in ((self.alpha, ALPHA), (self.beta, BETA))
        )
        self._train(features_VND, targets_N)
        self.validation_accuracy_: float | None = None
        if validation is not None and "search" in (self.alpha, self.beta):
            grids = [grid(scale, steps) for scale, steps in zip(self.search_scale, self.search_steps, strict=True)]
            betas = grids[0] if self.beta == "search" else [self.beta_]
            alphas = grids[1] if self.alpha == "search" else [self.alpha_]
            found_MD = normalize(validation[0], dim=1)
            zero_shot_MC = self.scale_ * found_MD @ self.text_vectors_.T
            affinity_MN = found_MD @ self.keys_.T
            self.validation_accuracy_, self.beta_, self.alpha_ = search(
                zero_shot_MC, affinity_MN, one_hot(targets_N, len(self.classes_)).float(), validation[1], betas, alphas
            )

    def _train(self, features_VND: Tensor, targets_N: Tensor) -> None:
        """Nothing here."""

    def _logits(self, features_ND: Tensor) -> Tensor:
        features_ND = normalize(features_ND, dim=1)
        cache_NC = cache(features_ND @ self.keys_.T, self.beta_, one_hot(self.shots_, len(self.classes_)).float())
        return self.scale_ * features_ND @ self.text_vectors_.T + self.alpha_ * cache_NC

    def _check_settings(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "search":
                raise ValueError(f"{name} must be a number of at least 0 or 'search', got {value!r}")
            if not isinstance(value, str):
                number(self, name, 0)
        if len(self.search_scale) != 2 or min(self.search_scale) <= 0.1:
            raise ValueError(f"search_scale must be (largest beta, largest alpha), both above 0.1, got {self.search_scale}")
        if len(self.search_steps) != 2 or min(self.search_steps) < 1:
            raise ValueError(f"search_steps must be (values of beta, values of alpha), both at least 1, got {self.search_steps}")


class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys are trained on the shots, with the cross-entropy; alpha and beta are searched after.

    The published script takes the epoch that is best on the test set; here it is the last one. Its training sees new random views
    in every epoch, here epoch e sees view e modulo num_views.

    Args:
        model, classes, prompts, alpha, beta, search_scale, search_steps, num_views: see `TipAdapter`.
        epochs: passes over the shots.
        learning_rate: of AdamW (eps 1e-4), falling to 0 by a cosine.
        batch_size: shots a step.
        seed: of the views and the order.
        progress: show a bar.

    Attributes:
        loss_curve_: mean loss of each epoch; the others are `TipAdapter`'s.
    """

    saved = (*TipAdapter.saved, "loss_curve_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        alpha: Setting = "search",
        beta: Setting = "search",
        search_scale: tuple[float, float] = (12.0, 5.0),
        search_steps: tuple[int, int] = (200, 20),
        num_views: int = 0,
        epochs: int = 20,
        learning_rate: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__(
            model,
            classes,
            prompts=prompts,
            alpha=alpha,
            beta=beta,
            search_scale=search_scale,
            search_steps=search_steps,
            num_views=num_views,
            seed=seed,
        )
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.progress = progress

    def _train(self, features_VND: Tensor, targets_N: Tensor) -> None:
        values_NC = one_hot(targets_N, len(self.classes_)).float()
        keys_ND = self.keys_.clone().requires_grad_()
        optimizer = torch.optim.AdamW([keys_ND], lr=self.learning_rate, eps=EPS)
        steps = self.epochs * math.ceil(len(targets_N) / self.batch_size)

        def loss(features_BD: Tensor, targets_B: Tensor) -> Tensor:
            cache_BC = cache(features_BD @ keys_ND.T, self.beta_, values_NC)
            return cross_entropy(self.scale_ * features_BD @ self.text_vectors_.T + self.alpha_ * cache_BC, targets_B)

        order = torch.Generator().manual_seed(self.seed)
        batches = view_batches(normalize(features_VND, dim=2), targets_N, self.batch_size, order, drop_rest=False)
        self.loss_curve_ = train_head(
            self,
            optimizer,
            batches,
            loss,
            lambda step, epoch: self.learning_rate / 2 * (1 + math.cos(math.pi * step / steps)),
            self.epochs,
        )
        self.keys_ = keys_ND.detach()

    def _check_settings(self) -> None:
        super()._check_settings()
        number(self, "epochs", 1, whole=True)
        number(self, "batch_size", 1, whole=True)
        number(self, "learning_rate", 0, above=True)


def cache(affinity_MN: Tensor, beta: float, values_NC: Tensor) -> Tensor:
    """exp(-beta (1 - affinity)) Y: [M, C]."""
    return torch.exp(beta * (affinity_MN - 1)) @ values_NC


def grid(largest: float, steps: int) -> list[float]:
    """The published values: from 0.1 up to one step below `largest`."""
    return [i * (largest - 0.1) / steps + 0.1 for i in range(steps)]


def search(
    zero_shot_MC: Tensor,
    affinity_MN: Tensor,
    values_NC: Tensor,
    targets_M: Tensor,
    betas: Sequence[float],
    alphas: Sequence[float],
) -> tuple[float, float, float]:
    """(accuracy, beta, alpha) of the best pair; of equals the first in the order of beta, then alpha, as published.

    The published script computes all logits for each pair. Here affinities are computed once, the cache once a beta, and a
    picture is right for an interval of alphas: class c does not win where zero-shot's lead over it plus alpha times the
    cache's is above 0, which is one bound on alpha for each c.
    """
    own_M1 = targets_M[:, None]
    lead_MC = (zero_shot_MC.gather(1, own_M1) - zero_shot_MC).double().scatter_(1, own_M1, 1.0)  # its own class never beats it
    alphas_A = torch.tensor(alphas, dtype=torch.float64, device=lead_MC.device)
    best = (-1.0, 0.0, 0.0)
    for beta in betas:
        cache_MC = cache(affinity_MN, beta, values_NC)
        cache_lead_MC = (cache_MC.gather(1, own_M1) - cache_MC).double()
        bound_MC = -lead_MC / cache_lead_MC  # what is divided by 0 is not looked at
        low_M1 = bound_MC.masked_fill(cache_lead_MC <= 0, -math.inf).amax(1, keepdim=True)
        high_M1 = bound_MC.masked_fill(cache_lead_MC >= 0, math.inf).amin(1, keepdim=True)
        never_M1 = ((cache_lead_MC == 0) & (lead_MC <= 0)).any(1, keepdim=True)
        right_MA = (alphas_A > low_M1) & (alphas_A < high_M1) & ~never_M1
        share_A = right_MA.double().mean(0)
        place = int(share_A.argmax())
        if float(share_A[place]) > best[0]:
            best = (float(share_A[place]), float(beta), float(alphas[place]))
    return best
