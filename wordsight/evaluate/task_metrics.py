"""Figures by task, as each data set's paper asks for them: accuracy, mean per class, mean average precision, area under the ROC.

Every function takes scores of classes [N, C] and the pictures' labels, and gives a Metric with its 95% interval and chance. Which
figure is published for which set is in `assets/metrics.json`, with sources; `published` reads it.

Average precision and ROC depend on the order of scores alone, and equal scores are one threshold: the figure does not depend on
the order of the pictures. *Full* average precision is the sum over thresholds of precision times the recall gained, without
interpolation (scikit-learn's); *11-point* is VOC2007's (Everingham et al. 2010): the mean over recalls 0, 0.1, ..., 1 of the best
precision at that recall or more. Recalls are compared as whole numbers of pictures, so that 3 of 10 is 0.3.

Shape legend: N pictures, C classes, R resamples, T thresholds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from wordsight.evaluate.calibration import unbiased
from wordsight.evaluate.intervals import share_interval, student
from wordsight.evaluate.metrics import (
    BOOTSTRAP_SEED,
    RESAMPLES,
    Z95,
    classification_metrics,
    topk_correct,
    wilson_interval,
)
from wordsight.types import Metric

CHANCE_DRAWS = 200  # random orders of which 11-point chance is the mean
WEIGHTS_AT_ONCE = 1 << 19
POINTS = 10  # recalls 0/10 to 10/10


def top1(scores_NC: Any, labels: Sequence[Any], classes: Sequence[Any]) -> Metric:
    """The share of pictures whose best class is right."""
    return _classified(scores_NC, labels, classes)["top1"]


def top5(scores_NC: Any, labels: Sequence[Any], classes: Sequence[Any]) -> Metric:
    """The share of pictures whose right class is among the best 5."""
    return _classified(scores_NC, labels, classes)["top5"]


def mean_per_class(scores_NC: Any, labels: Sequence[Any], classes: Sequence[Any]) -> Metric:
    """The mean over the classes that have pictures of the share of them that is right."""
    return _classified(scores_NC, labels, classes)["mean_per_class"]


def mean_top1_top5(scores_NC: Any, labels: Sequence[Any], classes: Sequence[Any]) -> Metric:
    """The mean of top-1 and top-5 accuracy, Kinetics' figure."""
    scores = _scores(scores_NC, classes)
    targets = _targets(labels, classes, len(scores))
    values_N = topk_correct(torch.from_numpy(scores), torch.from_numpy(targets), (1, 5)).double().mean(1).numpy()
    chance = (1 + min(5, len(classes))) / (2 * len(classes))
    return Metric(float(values_N.mean()), len(values_N), share_interval(values_N), "fraction", chance)


def roc_auc(scores_NC: Any, labels: Sequence[Any], classes: Sequence[Any]) -> Metric:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half.

    With two classes the second is the positive one, by the difference of their scores; with more it is the mean over classes of
    each against the rest, by its own score as given (scikit-learn's "ovr", which asks for probabilities). The interval is
    Wilson's, at the number of answers that DeLong's variance (1988) shows the pairs to be worth.

    Raises:
        ValueError: a class without pictures, where no curve is defined.
    """
    scores = _scores(scores_NC, classes)
    targets = _targets(labels, classes, len(scores))
    positives_NC = targets[:, None] == np.arange(len(classes))
    if len(classes) == 2:
        scores, positives_NC = (scores[:, 1] - scores[:, 0])[:, None], positives_NC[:, 1:]
    counts_C = np.bincount(targets, minlength=len(classes))
    _require_pictures(counts_C, classes)
    areas, influence_N = [], np.zeros(len(scores))
    for scores_N, positive_N in zip(scores.T, positives_NC.T, strict=True):
        area, influence = _area(scores_N, positive_N)
        areas.append(area)
        influence_N += influence / scores.shape[1]
    value = float(np.mean(areas))
    # each class's part of the variance, known to as many degrees of freedom as it has pictures but one (Satterthwaite 1946)
    parts_C = np.bincount(targets, weights=influence_N**2)
    variance = float(parts_C.sum())
    if not 0 < value < 1 or variance == 0:  # no pair shows how pairs vary
        worth = float(counts_C.min())
        return Metric(value, len(scores), wilson_interval(value * worth, worth), "fraction", 0.5)
    freedom = variance**2 / float((parts_C**2 / np.maximum(counts_C - 1, 1)).sum())
    worth = value * (1 - value) / variance
    return Metric(value, len(scores), wilson_interval(value * worth, worth, student(freedom)), "fraction", 0.5)


def mean_average_precision(
    scores_NC: Any,
    labels: Sequence[Any],
    classes: Sequence[Any],
    *,
    eleven_point: bool = False,
    ignored: Sequence[Collection[Any]] | None = None,
) -> Metric:
    """The mean over classes of average precision, for pictures of any number of labels.

    Its interval is a bootstrap over pictures (1000 resamples, less their bias, widened for few positives): what as many other
    pictures would have given. Its chance is the mean of random orders.

    Args:
        scores_NC: of every class.
        labels: [N] each a set (list, tuple) of class names, or one name.
        classes: C names.
        eleven_point: VOC2007's figure instead of the full one.
        ignored: [N] classes that do not count for a picture, either way (VOC's "difficult").

    Raises:
        ValueError: a class without pictures, where average precision is not defined.
    """
    scores = _scores(scores_NC, classes)
    positives_NC = _sets(labels, classes, len(scores))
    counted_NC = np.ones(positives_NC.shape, bool) if ignored is None else ~(_sets(ignored, classes, len(scores)) & ~positives_NC)
    _require_pictures(positives_NC.sum(0), classes)
    value = float(np.mean(average_precisions(scores, positives_NC, counted_NC, eleven_point=eleven_point)))
    draw = np.random.default_rng(BOOTSTRAP_SEED)
    means_R: list[np.ndarray] = []
    step = max(1, WEIGHTS_AT_ONCE // len(scores))
    for start in range(0, RESAMPLES, step):
        rows = draw.integers(0, len(scores), (min(step, RESAMPLES - start), len(scores)))
        places = rows + len(scores) * np.arange(len(rows))[:, None]
        weights_RN = np.bincount(places.ravel(), minlength=rows.size).reshape(rows.shape).astype(np.int32)
        found_RC = _average_precisions(scores, positives_NC, counted_NC, weights_RN, eleven_point)
        drawn_RC = ~np.isnan(found_RC)  # a resample may lack a class, or all of them
        whole_R = drawn_RC.any(1)
        means_R.append(np.where(drawn_RC, found_RC, 0).sum(1)[whole_R] / drawn_RC.sum(1)[whole_R])
    bounds = _widened(value, np.concatenate(means_R), int(positives_NC.sum()))
    chances = [
        _chance(int(counted_N.sum()), int(positive_N.sum()), eleven_point)
        for counted_N, positive_N in zip(counted_NC.T, positives_NC.T, strict=True)
    ]
    return Metric(value, len(scores), bounds, "fraction", float(np.mean(chances)))


def average_precisions(
    scores_NC: np.ndarray, positives_NC: np.ndarray, counted_NC: np.ndarray | None = None, *, eleven_point: bool = False
) -> np.ndarray:
    """float64 [C], each class's average precision; NaN for a class without positives.

    Args:
        scores_NC: float.
        positives_NC: bool.
        counted_NC: bool, which pictures count for a class; None: all.
        eleven_point: VOC2007's.
    """
    counted_NC = np.ones(positives_NC.shape, bool) if counted_NC is None else counted_NC
    return _average_precisions(scores_NC, positives_NC, counted_NC, np.ones((1, len(scores_NC)), np.int32), eleven_point)[0]


METRICS: dict[str, Callable[..., Metric]] = {
    "top1": top1,
    "top5": top5,
    "mean_per_class": mean_per_class,
    "mean_top1_top5": mean_top1_top5,
    "roc_auc": roc_auc,
    "map": mean_average_precision,
    "map_11_point": lambda scores_NC, labels, classes: mean_average_precision(scores_NC, labels, classes, eleven_point=True),
}


def task_metric(name: str, scores_NC: Any, labels: Sequence[Any], classes: Sequence[Any]) -> Metric:
    """The figure of that name, one of `METRICS`.

    Args:
        name: as in `assets/metrics.json`.
        scores_NC: float [N, C].
        labels: [N] class names; for average precision sets of them.
        classes: C names.

    Raises:
        ValueError: an unknown name, repeated classes, labels that are none of them, scores of another shape or not finite.
    """
    if name not in METRICS:
        raise ValueError(f"no metric {name!r} of classification: choose among {', '.join(METRICS)}")
    return METRICS[name](scores_NC, labels, classes)


@cache
def published() -> dict[str, Any]:
    """The table of published choices.

    Returns:
        "clip27" and "datacomp38", lists of sets with `name`, `classes`, `test`, `metric` and `checked` (where a field was read;
        "[M]": from memory); "metrics", what each name means; "sources".
    """
    text = (files("wordsight.evaluate") / "assets" / "metrics.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _widened(value: float, means_R: np.ndarray, positives: int) -> tuple[float, float]:
    """The bootstrap's interval less its bias, widened to Student's quantile for so many positives."""
    bounds = unbiased(value, means_R)
    if bounds is None or positives < 2:  # every resample is as perfect: resamples say nothing of what was not seen
        return wilson_interval(value * positives, positives)
    wider = student(positives - 1) / Z95 * math.sqrt(positives / (positives - 1))
    return max(0.0, value - wider * (value - bounds[0])), min(1.0, value + wider * (bounds[1] - value))


def _classified(scores_NC: Any, labels: Sequence[Any], classes: Sequence[Any]) -> dict[str, Metric]:
    scores = _scores(scores_NC, classes)
    targets = _targets(labels, classes, len(scores))
    correct_NK = topk_correct(torch.from_numpy(scores), torch.from_numpy(targets), (1, 5)).numpy()
    return classification_metrics(targets, correct_NK, scores.argmax(1), len(classes), (1, 5))


def _area(scores_N: np.ndarray, positive_N: np.ndarray) -> tuple[float, np.ndarray]:
    """The area of one class, and what each picture adds to its variance, as a difference from its mean (DeLong 1988)."""
    positives, negatives = np.sort(scores_N[positive_N]), np.sort(scores_N[~positive_N])
    # the share of pictures of the other kind that lies on the right side of each
    below = np.searchsorted(negatives, scores_N[positive_N], "left") + np.searchsorted(negatives, scores_N[positive_N], "right")
    above = np.searchsorted(positives, scores_N[~positive_N], "left") + np.searchsorted(positives, scores_N[~positive_N], "right")
    won, lost = below / (2 * len(negatives)), 1 - above / (2 * len(positives))
    area = float(below.sum() / (2 * len(negatives) * len(positives)))
    influence_N = np.zeros(len(scores_N))
    for rows, shares in ((positive_N, won), (~positive_N, lost)):
        count = len(shares)
        # of one picture nothing is seen: the most that a share can vary
        spread = (shares - area) / np.sqrt(count * (count - 1)) if count > 1 else np.sqrt(area * (1 - area))
        influence_N[rows] = spread
    return area, influence_N


def _average_precisions(
    scores_NC: np.ndarray, positives_NC: np.ndarray, counted_NC: np.ndarray, weights_RN: np.ndarray, eleven_point: bool
) -> np.ndarray:
    """float64 [R, C] with pictures that count several times or not at all."""
    found = []
    for scores_N, positive_N, counted_N in zip(scores_NC.T, positives_NC.T, counted_NC.T, strict=True):
        order = np.argsort(-scores_N[counted_N], kind="stable")
        rows = np.flatnonzero(counted_N)[order]
        last_T = np.flatnonzero(np.append(np.diff(scores_N[rows]) != 0, True))  # the last of each run of equal scores
        rights_N = np.cumsum(positive_N[rows])
        last_T = last_T[np.diff(rights_N[last_T], prepend=0) > 0]  # at others no recall is gained, and precision is lower
        if not len(last_T):
            found.append(np.full(len(weights_RN), np.nan))
            continue
        seen_RT = np.cumsum(weights_RN[:, rows], axis=1, dtype=np.int32)[:, last_T]
        right_RT = np.cumsum(weights_RN[:, rows[positive_N[rows]]], axis=1, dtype=np.int32)[:, rights_N[last_T] - 1]
        precision_RT = right_RT / np.maximum(seen_RT, 1)
        total_R1 = right_RT[:, -1:].astype(np.float64)
        with np.errstate(invalid="ignore"):
            if eleven_point:
                best_RT = np.maximum.accumulate(precision_RT[:, ::-1], axis=1)[:, ::-1]
                # the first threshold whose recall is i/10 or more; there is always one
                first = [(POINTS * right_RT >= i * total_R1).argmax(1) for i in range(POINTS + 1)]
                points = [np.take_along_axis(best_RT, place[:, None], 1)[:, 0] for place in first]
                found.append(np.where(total_R1[:, 0] > 0, np.mean(points, axis=0), np.nan))
            else:
                gained_RT = np.diff(right_RT, axis=1, prepend=0)
                found.append((gained_RT * precision_RT).sum(1) / np.where(total_R1[:, 0] > 0, total_R1[:, 0], np.nan))
    return np.stack(found, axis=1)


@cache
def _chance(count: int, positives: int, eleven_point: bool) -> float:
    """Mean average precision of a random order of `count` pictures of which `positives` are right.

    Full: the k-th picture is right with probability P/N, and then (k - 1)(P - 1)/(N - 1) before it are.
    """
    if not eleven_point:
        harmonic = float(np.sum(1 / np.arange(1, count + 1)))
        return (harmonic + (positives - 1) / max(1, count - 1) * (count - harmonic)) / count
    draw = np.random.default_rng(BOOTSTRAP_SEED)
    found = []
    for _ in range(CHANCE_DRAWS):
        ranks = np.sort(draw.choice(count, positives, replace=False)) + 1
        best = np.maximum.accumulate((np.arange(1, positives + 1) / ranks)[::-1])[::-1]
        # the first right picture with which the recall is i/10 or more
        found.append(np.mean([best[max(0, -(-i * positives // POINTS) - 1)] for i in range(POINTS + 1)]))
    return float(np.mean(found))


def _scores(scores_NC: Any, classes: Sequence[Any]) -> np.ndarray:
    """Checked float32 or float64 [N, C]."""
    scores = np.asarray(scores_NC.detach().cpu() if isinstance(scores_NC, torch.Tensor) else scores_NC)
    scores = scores if scores.dtype == np.float32 else scores.astype(np.float64)
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"class names must differ; these come twice or more: {', '.join(map(repr, twice[:10]))}")
    if len(classes) < 2:
        raise ValueError(f"there is nothing to choose between with {len(classes)} class: give 2 or more")
    if scores.ndim != 2 or len(scores) == 0 or scores.shape[1] != len(classes):
        raise ValueError(f"scores are [N, {len(classes)}], one a class, of at least one picture, got the shape {scores.shape}")
    if not np.isfinite(scores).all():
        row = int((~np.isfinite(scores)).any(1).argmax())
        raise ValueError(f"the scores of row {row} are infinite or undefined (NaN): they can not be put in order")
    return scores


def _targets(labels: Sequence[Any], classes: Sequence[Any], count: int) -> np.ndarray:
    """int64 [N]."""
    return _places([[label] for label in labels], classes, count)[:, 1]


def _sets(labels: Sequence[Any], classes: Sequence[Any], count: int) -> np.ndarray:
    """bool [N, C], which labels each picture has."""
    listed = [[label] if isinstance(label, str) or not isinstance(label, Collection) else label for label in labels]
    found = np.zeros((len(listed), len(classes)), bool)
    pairs = _places(listed, classes, count)
    found[pairs[:, 0], pairs[:, 1]] = True
    return found


def _places(labels: Sequence[Collection[Any]], classes: Sequence[Any], count: int) -> np.ndarray:
    """[(row, class)] of every label."""
    if len(labels) != count:
        raise ValueError(f"scores of {count} pictures and labels of {len(labels)}: each picture has one of each")
    place = {name: i for i, name in enumerate(classes)}
    unknown = sorted({repr(label) for given in labels for label in given if label not in place})
    if unknown:
        raise ValueError(f"{len(unknown)} labels are not among the {len(classes)} classes: {', '.join(unknown[:10])}")
    return np.array([(row, place[label]) for row, given in enumerate(labels) for label in given], dtype=np.int64).reshape(-1, 2)


def _require_pictures(counts_C: np.ndarray, classes: Sequence[Any]) -> None:
    empty = [name for name, count in zip(classes, counts_C.tolist(), strict=True) if count == 0]
    if empty:
        listed = ", ".join(map(repr, empty[:10]))
        raise ValueError(f"{len(empty)} classes have no picture, so their curve is not defined: {listed}. Leave them out")
