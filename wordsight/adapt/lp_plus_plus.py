"""LP++: a linear probe whose class vectors are w_c + a_c text_c, blended class by class (arXiv 2404.02285).

logits_c = f (w_c + a_c text_c) + b_c with unit f and text; full batches, step sizes from Lipschitz constants, no setting to tune.

Shape legend: N pictures, V views, C classes, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm

from wordsight.adapt.estimator import AdaptedClassifier
from wordsight.adapt.head_training import finite, number

ALPHA_SCALE = 250.0  # of the first a: 1 / lambda in the paper's approximate minimum


class LPPlusPlus(AdaptedClassifier):
    """LP++ with the published code's start and step sizes.

    w_c starts as the sum of its shots' features, all a_c as 250 times the mean over classes of the mean cosine of a class's shots
    and its text, b as zeros. A step on w and b is SGD's with momentum .9 and rate 4 N / (largest eigenvalue of F'F); after every
    10th step a moves by N / (4 max_c sum_i (f_i text_c)^2) along its gradient. With validation the iteration that is best there
    is kept (of equals the last, as published), otherwise the last one.

    Two things differ from the published script: it draws b's start at random, and it never clears a's gradient, so that its
    steps add up all earlier ones; here a step takes the present gradient, as the paper's block descent does.

    Args:
        model: an Embedder.
        classes: C names; None takes those in y.
        prompts: see `ZeroShot`.
        iterations: full-batch steps.
        alpha_every: steps between two of a.
        momentum: of w's and b's steps.
        num_views: random views a picture, each a row of the batch; 0: the fixed view.
        seed: of the views.
        progress: show a bar.

    Attributes:
        class_vectors_: float32 [C, D], w + a text.
        bias_: float32 [C].
        scale_: 1.
        alpha_: float32 [C], a.
        iteration_: the one that was kept, from 1.
        loss_curve_: the loss before each step.
    """

    saved = ("class_vectors_", "bias_", "scale_", "alpha_", "iteration_", "loss_curve_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        iterations: int = 300,
        alpha_every: int = 10,
        momentum: float = 0.9,
        num_views: int = 0,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.iterations = iterations
        self.alpha_every = alpha_every
        self.momentum = momentum
        self.num_views = num_views
        self.seed = seed
        self.progress = progress

    def _fit(self, features_VND: Tensor, targets_N: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        number(self, "iterations", 1, whole=True)
        number(self, "alpha_every", 1, whole=True)
        number(self, "momentum", 0)
        text_CD, features_ND = self._text_features(), features_VND.flatten(0, 1)
        targets_N = targets_N.repeat(len(features_VND))
        shots_NC = one_hot(targets_N, len(text_CD)).float()
        similarity_NC = features_ND @ text_CD.T
        num_rows = len(targets_N)
        # one picture's views count as one shot: the start is the sum over pictures
        w_CD = (shots_NC.T @ features_ND / len(features_VND)).requires_grad_()
        bias_C = torch.zeros(len(text_CD), requires_grad=True)
        first = ALPHA_SCALE * ((shots_NC * similarity_NC).sum(0) / shots_NC.sum(0)).mean()
        alpha_C = torch.full((len(text_CD),), float(first), requires_grad=True)
        largest = float(torch.linalg.matrix_norm(features_ND.double(), ord=2)) ** 2
        alpha_rate = num_rows / (4 * float(similarity_NC.square().sum(0).max()))
        optimizer = torch.optim.SGD([w_CD, bias_C], lr=4 * num_rows / largest, momentum=self.momentum)
        self.loss_curve_, self.scale_, best = [], 1.0, -1.0
        for step in tqdm(range(1, self.iterations + 1), desc="LPPlusPlus", unit="step", disable=not self.progress):
            logits_NC = features_ND @ w_CD.T + bias_C + alpha_C * similarity_NC
            loss = cross_entropy(logits_NC, targets_N)
            self.loss_curve_.append(finite("LPPlusPlus", float(loss.detach()), step))
            w_CD.grad, bias_C.grad, moved_C = torch.autograd.grad(loss, [w_CD, bias_C, alpha_C])
            optimizer.step()
            with torch.no_grad():
                if step % self.alpha_every == 0:
                    alpha_C -= alpha_rate * moved_C
                if validation is not None:
                    now_CD = w_CD + alpha_C[:, None] * text_CD
                    found_M = (validation[0] @ now_CD.T + bias_C).argmax(1)
                    accuracy = float((found_M == validation[1]).double().mean())
                if validation is None or accuracy >= best:
                    best = best if validation is None else accuracy
                    self._keep(w_CD, bias_C, alpha_C, text_CD, step)

    def _keep(self, w_CD: Tensor, bias_C: Tensor, alpha_C: Tensor, text_CD: Tensor, step: int) -> None:
        self.class_vectors_ = w_CD + alpha_C[:, None] * text_CD
        self.bias_, self.alpha_, self.iteration_ = bias_C.detach().clone(), alpha_C.detach().clone(), step

    def _logits(self, features_ND: Tensor) -> Tensor:
        return features_ND @ self.class_vectors_.T + self.bias_
