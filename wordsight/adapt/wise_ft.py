"""WiSE-FT: the weights between the zero-shot classifier's and a fine-tuned one's (arXiv 2109.01903).

theta(alpha) = (1 - alpha) theta_zero_shot + alpha theta_fine_tuned, for the image tower and the head alike; alpha = 0 is the
zero-shot classifier and alpha = 1 the fine-tuned one. Of LoRA it is the merged matrices that are interpolated, of AdaptFormer the
matrix that was 0 at first. `FineTune` and `Projection` do it themselves after they have learned, where `wise_ft` asks for it.

Shape legend: N pictures, C classes, D embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from wordsight.adapt.clap import CLAP
from wordsight.adapt.cross_modal import CrossModalProbe
from wordsight.adapt.decoder import class_vectors
from wordsight.adapt.estimator import AdaptedClassifier, Validation, _are_pictures, _labels
from wordsight.adapt.fine_tune import FineTune, TunedTower
from wordsight.adapt.picture_reader import PictureReader
from wordsight.adapt.projection import Projection
from wordsight.evaluate.metrics import classification_metrics
from wordsight.types import Metric

LINEAR = (CLAP, CrossModalProbe)  # a vector a class, which starts as its text
ALPHAS = tuple(i / 10 for i in range(11))
BY = ("top1", "mean_per_class")
BY_VALIDATION = "validation"

Fitted = TypeVar("Fitted", bound=AdaptedClassifier)


@dataclass(frozen=True, kw_only=True)
class WisePoint:
    """What an alpha is worth.

    Attributes:
        alpha: the fine-tuned weights' share.
        top1: the share of pictures that are named rightly.
        mean_per_class: its mean over the classes that have pictures.
    """

    alpha: float
    top1: Metric
    mean_per_class: Metric


def wise_ft(fitted: Fitted, alpha: float) -> Fitted:
    """A classifier of the same kind with weights between zero-shot and fine-tuned.

    Args:
        fitted: a `FineTune` that started from text, a `Projection`, or one of `LINEAR`; it stays as it is.
        alpha: the fine-tuned weights' share, 0 to 1.

    Returns:
        A fitted classifier, which can be saved like the other.

    Raises:
        ValueError: an alpha outside of 0 to 1, or a classifier whose weights did not start as the zero-shot classifier's.
    """
    check_is_fitted(fitted)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if fitted.model is None:
        raise ValueError(f"this {type(fitted).__name__} has no model, and so no zero-shot classifier to go back to: give it one")
    mixed = copy.copy(fitted)
    mix = _Mix(alpha)
    match mixed:
        case FineTune():
            _mix_tower(mixed, mix)
            mixed.wise_ft_ = alpha if mixed.wise_ft_ is None else alpha * mixed.wise_ft_  # of a mixture, a point nearer
        case Projection():
            matrix_FD, offset_D = mixed._start()
            mixed.matrix_ = mix(matrix_FD, mixed.matrix_)
            mixed.offset_ = mix(torch.zeros_like(mixed.offset_) if offset_D is None else offset_D, mixed.offset_)
            mixed.vectors_ = mix(mixed._text_rows(), mixed.vectors_)
            mixed.scale_ = mix.number(mixed._scale(), mixed.scale_)
            mixed.wise_ft_ = alpha if mixed.wise_ft_ is None else alpha * mixed.wise_ft_
        case _:
            _mix_linear(mixed, mix)
    return mixed


def wise_ft_curve(fitted: AdaptedClassifier, X: Any, y: Any = None, alphas: Sequence[float] = ALPHAS) -> list[WisePoint]:
    """How good each alpha is on some pictures: those to be chosen by must not be test pictures.

    Args:
        fitted: see `wise_ft`.
        X: N pictures or features, as `fitted.logits` takes them.
        y: N class names; with Samples that have a label they may be left out.
        alphas: shares of the fine-tuned weights.

    Returns:
        A point for each alpha, in their order.
    """
    check_is_fitted(fitted)
    targets = fitted._targets(_labels(X, y)).numpy()
    if isinstance(fitted, FineTune) and _are_pictures(X):
        X = PictureReader(fitted.model.preprocessor, X, keep_mb=fitted.keep_mb)  # decoded once for all alphas
    points = []
    for alpha in alphas:
        logits_NC = wise_ft(fitted, alpha).logits(X)
        if len(logits_NC) != len(targets):
            raise ValueError(f"X has {len(logits_NC)} pictures and y {len(targets)} labels")
        predicted = logits_NC.argmax(1).numpy()
        correct_N1: np.ndarray = (predicted == targets)[:, None]
        found = classification_metrics(targets, correct_N1, predicted, logits_NC.shape[1], (1,))
        points.append(WisePoint(alpha=float(alpha), top1=found["top1"], mean_per_class=found["mean_per_class"]))
    return points


def choose_alpha(points: Sequence[WisePoint], by: str = "mean_per_class") -> WisePoint:
    """The best point of a curve; of equals the one nearest to zero-shot.

    Raises:
        ValueError: no points, or an unknown figure.
    """
    if by not in BY:
        raise ValueError(f"by must be one of {', '.join(BY)}, got {by!r}")
    if not points:
        raise ValueError("no points to choose from: give at least one alpha")
    return max(points, key=lambda point: (getattr(point, by).value, -point.alpha))


def on_validation(fitted: Fitted, validation: Validation | None) -> Fitted:
    """The mixture whose mean per class is highest on validation pictures, of `ALPHAS`.

    Raises:
        ValueError: no validation pictures; see `wise_ft`.
    """
    if validation is None:
        raise ValueError("an alpha is chosen on validation pictures, and there are none: give some, or a number of 0 to 1")
    return wise_ft(fitted, choose_alpha(wise_ft_curve(fitted, *validation)).alpha)


def check_wanted(learner: FineTune | Projection, validation: Validation | None) -> None:
    """Refuse a setting `wise_ft` that can't be done, before anything is learned.

    Raises:
        ValueError: neither None, "validation" nor a number of 0 to 1; no validation pictures; no start as zero-shot.
    """
    wanted = learner.wise_ft
    if wanted is None:
        return
    if wanted != BY_VALIDATION and not (isinstance(wanted, int | float) and 0 <= wanted <= 1):
        raise ValueError(f"wise_ft must be a number of 0 to 1, {BY_VALIDATION!r} or None, got {wanted!r}")
    if wanted == BY_VALIDATION and validation is None:
        raise ValueError("wise_ft='validation' chooses on validation pictures, and there are none: give some, or a number")
    if isinstance(learner, FineTune):
        _check_start(learner)


def mix_as_wanted(fitted: FineTune | Projection, validation: Validation | None) -> None:
    """What `wise_ft` asks of a classifier that has just learned, done to it."""
    if fitted.wise_ft is None:
        return
    by_validation = fitted.wise_ft == BY_VALIDATION
    mixed = on_validation(fitted, validation) if by_validation else wise_ft(fitted, float(fitted.wise_ft))
    fitted.__dict__.update(mixed.__dict__)


@dataclass(frozen=True)
class _Mix:
    """(1 - alpha) a + alpha b, exact at both ends."""

    alpha: float

    def __call__(self, zero_shot: Tensor, tuned: Tensor) -> Tensor:
        return torch.lerp(zero_shot.to(tuned), tuned.detach(), self.alpha)

    def number(self, zero_shot: float, tuned: float) -> float:
        return tuned if self.alpha == 1 else zero_shot + self.alpha * (tuned - zero_shot)


def _check_start(learner: FineTune) -> None:
    if learner.init != "text" or learner.reads != "projected":
        raise ValueError(
            f"this {type(learner).__name__} did not start as the zero-shot classifier, so weights between the two mean nothing: "
            f"it has init={learner.init!r} and reads={learner.reads!r}, and needs init='text' and reads='projected'"
        )


def _mix_tower(mixed: FineTune, mix: _Mix) -> None:
    _check_start(mixed)
    tuned: TunedTower = mixed._build()
    learned = mixed.tuned_.learned()
    with torch.no_grad():
        tuned.head.weight.copy_(mixed._text_rows())
        for name, parameter in tuned.learned().items():
            start = parameter.detach()
            if mixed.part in ("lora", "adaptformer") and name.startswith("tower."):
                # of a product (up down) one factor is scaled; what is not multiplied by it stays as it was learned
                start = torch.zeros_like(start) if name.endswith((".up", ".up.weight", ".up.bias")) else learned[name]
            parameter.copy_(mix(start, learned[name]))
    mixed.scale_ = tuned.head.scale = mix.number(mixed._scale(), mixed.scale_)
    mixed.tuned_ = tuned.eval()


def _mix_linear(mixed: Any, mix: _Mix) -> None:
    if not isinstance(mixed, LINEAR):
        raise ValueError(
            f"{type(mixed).__name__}'s weights do not start as the zero-shot classifier's, so what lies between the two means "
            f"nothing: give one of FineTune, Projection, {', '.join(kind.__name__ for kind in LINEAR)}"
        )
    mixed.class_vectors_ = mix(class_vectors(mixed), mixed.class_vectors_)
    mixed.scale_ = mix.number(mixed._scale(), mixed.scale_)
