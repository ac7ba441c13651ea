"""Figures of a classifier on classes of unequal size: overall, by class, for many / medium / few, calibration, 95% intervals.

A class is *many* with more than 100 training images, *few* with fewer than 20, else *medium* (Liu et al., "Large-Scale
Long-Tailed Recognition in an Open World", arXiv 1904.05160). Macro figures are scikit-learn's with its defaults and
`zero_division=0`: means over the classes that are right or predicted for at least one image. Calibration is the expected
calibration error of Guo et al., arXiv 1706.04599, section 2.

Every interval says what was drawn anew. Over *images*, what other pictures of these classes would have given: Wilson's for
shares; for macro figures and calibration the percentiles of 1000 bootstrap resamples, less their bias (a resample lacks classes,
and its calibration error is too large: unshifted, the interval of a macro recall over 155 classes of 1 to 80 images held the
truth in 32 of 100 measurements, shifted in 87). Over *classes*, what other classes of this kind would have given: a percentile
bootstrap of the classes' own figures, wider where classes differ.

Shape legend: N images, C classes, K pairs of (right, predicted) class that occur, R resamples, M bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wordsight.evaluate.calibration import BOOTSTRAP, WILSON, calibration_error, unbiased
from wordsight.evaluate.metrics import (
    BOOTSTRAP_SEED,
    _chunks,
    mean_per_class,
    mean_per_class_interval,
    proportion,
    wilson_interval,
)
from wordsight.types import Metric

GROUPS = ("many", "medium", "few")
UNSEEN = "unseen"  # classes that training lacks: among the few, and shown alone
MACRO = ("macro_precision", "macro_recall", "macro_f1")
WILSON_KISH = "over images: Wilson, Kish's effective number"
NAMED = 10  # classes that a note lists


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFigures:
    """One row of the table of classes.

    Attributes:
        name: the class.
        group: "many", "medium" or "few".
        train_count: its training images.
        count: its test images, N_c.
        predicted: how many images were taken for it.
        right: how many of its images were taken for it.
        recall: right / count, its accuracy; None without test images.
        precision: right / predicted; None where nothing was taken for it. Its chance is the class's share of the test images.
        f1: 2 right / (count + predicted); None where both are 0.
    """

    name: str
    group: str
    train_count: float
    count: int
    predicted: int
    right: int
    recall: Metric | None
    precision: Metric | None
    f1: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LongTail:
    """What `judge` finds.

    Attributes:
        metrics: name -> figure, its `ci95` over images. Names are top1, mean_per_class, macro_precision, macro_recall, macro_f1,
            ece, and top1, mean_per_class and ece with _many, _medium, _few and _unseen; those without images are left out.
        intervals: name -> how its `ci95` was made, `WILSON`, `WILSON_KISH` or `BOOTSTRAP`.
        over_classes: name -> the 95% interval over classes, for means over two classes or more.
        per_class: the table, in the order of the classes.
        confusion: (group of the right class, group of the predicted one) -> the share of the first one's images. Right answers
            are in the same group, and so are confusions within it. Its chance is the second one's share of the classes.
        groups: "many", "medium", "few", "unseen" -> its classes.
        notes: classes that training or test lack, groups without classes or images.
    """

    metrics: dict[str, Metric]
    intervals: dict[str, str]
    over_classes: dict[str, tuple[float, float]]
    per_class: tuple[ClassFigures, ...]
    confusion: dict[tuple[str, str], Metric]
    groups: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


def judge(
    targets: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    train_counts: Sequence[float] | np.ndarray,
    *,
    confidences: Sequence[float] | np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    many_above: float = 100,
    few_below: float = 20,
    num_bins: int = 15,
) -> LongTail:
    """All figures of one set of predictions.

    Args:
        targets: [N] integers, the right classes.
        predicted: [N] integers, the classes that were predicted.
        train_counts: [C], training images of each class; they alone say who is many, medium and few.
        confidences: [N], the probability that was given to the predicted class; None: no calibration.
        classes: C names; None: the numbers.
        many_above: a class with more training images is many.
        few_below: a class with fewer training images is few.
        num_bins: M, bins of equal width for the calibration.

    Returns:
        `LongTail`. A class that training lacks (count 0) is few, and "unseen" too. Chance is that of guessing every class alike;
        of macro figures as N grows.

    Raises:
        ValueError: no images, lengths that do not fit, classes out of range, negative counts, confidences outside 0 to 1, limits
            that overlap.
    """
    given = _Given.read(targets, predicted, train_counts, confidences, classes, many_above, few_below, num_bins)
    metrics: dict[str, Metric] = {}
    intervals: dict[str, str] = {}
    over_classes: dict[str, tuple[float, float]] = {}
    everyone = np.ones(given.num_classes, bool)
    for suffix, members_C in (("", everyone), *((f"_{name}", members) for name, members in given.groups.items())):
        _shares(given, members_C, suffix, metrics, intervals, over_classes)
        if not suffix:
            _macro(given, metrics, intervals, over_classes)
        if given.confidences is not None:
            _calibration(given, members_C, suffix, num_bins, metrics, intervals)
    return LongTail(
        metrics=metrics,
        intervals=intervals,
        over_classes=over_classes,
        per_class=_table(given),
        confusion=_confusion(given),
        groups={name: given.names(members) for name, members in given.groups.items()},
        notes=_notes(given, many_above, few_below),
    )


# What is given


@dataclass(frozen=True, slots=True)
class _Given:
    """The arguments of `judge`, checked, and what everything else counts with."""

    targets: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray
    train_counts: np.ndarray
    confidences: np.ndarray | None
    classes: tuple[str, ...]
    group_of: np.ndarray  # [C], places in GROUPS
    groups: dict[str, np.ndarray]  # name -> [C] bool
    true: np.ndarray  # [C], images of each class
    taken: np.ndarray  # [C], images taken for each class
    right: np.ndarray  # [C], both

    @classmethod
    def read(
        cls,
        targets: Sequence[int] | np.ndarray,
        predicted: Sequence[int] | np.ndarray,
        train_counts: Sequence[float] | np.ndarray,
        confidences: Sequence[float] | np.ndarray | None,
        classes: Sequence[str] | None,
        many_above: float,
        few_below: float,
        num_bins: int,
    ) -> _Given:
        counts_C = np.asarray(train_counts, np.float64)
        if counts_C.ndim != 1 or not len(counts_C) or not np.all(np.isfinite(counts_C) & (counts_C >= 0)):
            raise ValueError(f"train_counts is one number a class, 0 or more, got {_shown(counts_C)}")
        num_classes = len(counts_C)
        names = tuple(classes) if classes is not None else tuple(map(str, range(num_classes)))
        if len(names) != num_classes or len(set(names)) != num_classes:
            raise ValueError(
                f"{len(names)} class names, {len(set(names))} different ones, for {num_classes} counts: each has one"
            )
        if not 0 <= few_below <= many_above + 1:
            raise ValueError(f"few_below is at most many_above + 1, or a class would be both; got {few_below} and {many_above}")
        if num_bins < 1:
            raise ValueError(f"num_bins is 1 or more, got {num_bins}")
        targets_N = _read_classes(targets, "targets", num_classes)
        predicted_N = _read_classes(predicted, "predicted", num_classes)
        if len(targets_N) != len(predicted_N):
            raise ValueError(f"{len(targets_N)} targets and {len(predicted_N)} predictions; each image has one of each")
        sure = None if confidences is None else np.asarray(confidences, np.float64)
        if sure is not None and (sure.shape != targets_N.shape or not np.all((sure >= 0) & (sure <= 1))):
            raise ValueError(
                f"confidences are the {len(targets_N)} probabilities, 0 to 1, of the predicted classes, got {_shown(sure)}"
            )
        group_of_C = np.where(counts_C > many_above, 0, np.where(counts_C < few_below, 2, 1))
        groups = {name: group_of_C == i for i, name in enumerate(GROUPS)} | {UNSEEN: counts_C == 0}
        hits = targets_N == predicted_N
        tallies = [np.bincount(which, minlength=num_classes) for which in (targets_N, predicted_N, targets_N[hits])]
        return cls(targets_N, predicted_N, hits, counts_C, sure, names, group_of_C, groups, *tallies)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def names(self, members_C: np.ndarray) -> tuple[str, ...]:
        return tuple(self.classes[i] for i in np.flatnonzero(members_C))


def _read_classes(values: Sequence[int] | np.ndarray, name: str, num_classes: int) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"{name} must be one class an image, of at least one image, got an array of shape {found.shape}")
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} must be integers, the classes' numbers, got {found.dtype}")
    if found.min() < 0 or found.max() >= num_classes:
        raise ValueError(
            f"{name} must be 0 to {num_classes - 1}, there are {num_classes} train_counts; got {found.min()} to {found.max()}"
        )
    return found.astype(np.int64)


def _shown(values: np.ndarray) -> str:
    span = f" from {values.min():g} to {values.max():g}" if values.size else ""
    return f"shape {values.shape}{span}"


# Figures


def _shares(
    given: _Given,
    members_C: np.ndarray,
    suffix: str,
    metrics: dict[str, Metric],
    intervals: dict[str, str],
    over_classes: dict[str, tuple[float, float]],
) -> None:
    """top1 and mean_per_class of the images whose class is a member."""
    rows_N = members_C[given.targets]
    if not rows_N.any():
        return
    chance = 1 / given.num_classes
    targets, correct = given.targets[rows_N], given.correct[rows_N]
    metrics[f"top1{suffix}"], intervals[f"top1{suffix}"] = proportion(correct, chance), WILSON
    name = f"mean_per_class{suffix}"
    value = mean_per_class(targets, correct, given.num_classes)
    interval = mean_per_class_interval(targets, correct, given.num_classes)
    metrics[name], intervals[name] = Metric(value, len(targets), interval, "fraction", chance), WILSON_KISH
    there_C = members_C & (given.true > 0)
    if there_C.sum() > 1:
        over_classes[name] = _bootstrap_classes(given.right[there_C] / given.true[there_C])


def _macro(
    given: _Given, metrics: dict[str, Metric], intervals: dict[str, str], over_classes: dict[str, tuple[float, float]]
) -> None:
    """Macro precision, recall and F1."""
    values, count = _macro_figures(given.right, given.taken, given.true), len(given.targets)
    drawn_R3 = _resample_macro(given)
    present_C = given.true[given.true > 0]
    effective = len(present_C) ** 2 / float(np.sum(1 / present_C))  # Kish's, as of a mean per class
    each_3C = _class_figures(given.right, given.taken, given.true)
    there_C = given.true + given.taken > 0
    share_C, guess = given.true / count, 1 / given.num_classes
    chances = (guess, guess * np.mean(given.true > 0), np.mean(2 * share_C * guess / (share_C + guess)))
    for i, name in enumerate(MACRO):
        value = float(values[i])
        bounds, intervals[name] = unbiased(value, drawn_R3[:, i]), BOOTSTRAP
        if bounds is None:
            low, high = wilson_interval(value * effective, effective)
            bounds, intervals[name] = (min(low, value), max(high, value)), WILSON_KISH  # rounding must not put it outside
        metrics[name] = Metric(value, count, bounds, "fraction", float(chances[i]))
        if there_C.sum() > 1:
            over_classes[name] = _bootstrap_classes(each_3C[i][there_C])


def _class_figures(right: np.ndarray, taken: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, 0 where they have no denominator; [..., C] each."""
    return right / np.maximum(taken, 1), right / np.maximum(true, 1), 2 * right / np.maximum(taken + true, 1)


def _macro_figures(right: np.ndarray, taken: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Their means over the classes that occur: [..., 3]."""
    num_there = (taken + true > 0).sum(-1)
    return np.stack([each.sum(-1) / num_there for each in _class_figures(right, taken, true)], axis=-1)


def _resample_macro(given: _Given) -> np.ndarray:
    """[R, 3], the macro figures of images drawn anew. Only how often each pair of classes occurs matters, so pairs are drawn."""
    classes = given.num_classes
    pairs_K, times_K = np.unique(given.targets * classes + given.predicted, return_counts=True)
    true_K, taken_K = np.divmod(pairs_K, classes)
    by_taken_K = np.argsort(taken_K, kind="stable")
    right_K = true_K == taken_K
    generator = np.random.default_rng(BOOTSTRAP_SEED)

    def sums(draws_RK: np.ndarray, class_of_K: np.ndarray) -> np.ndarray:
        """[R, C'] of the draws, for the classes C' in `class_of_K`, which is sorted; and where they stand."""
        starts = np.flatnonzero(np.diff(class_of_K, prepend=-1))
        whole = np.zeros((len(draws_RK), classes), np.int64)
        whole[:, class_of_K[starts]] = np.add.reduceat(draws_RK, starts, axis=1)
        return whole

    found = []
    for size in _chunks(max(len(pairs_K), classes)):
        draws_RK = generator.multinomial(len(given.targets), times_K / len(given.targets), size)
        right_RC = np.zeros((size, classes), np.int64)
        right_RC[:, true_K[right_K]] = draws_RK[:, right_K]
        found.append(_macro_figures(right_RC, sums(draws_RK[:, by_taken_K], taken_K[by_taken_K]), sums(draws_RK, true_K)))
    return np.concatenate(found)


def _calibration(
    given: _Given, members_C: np.ndarray, suffix: str, num_bins: int, metrics: dict[str, Metric], intervals: dict[str, str]
) -> None:
    rows_N = members_C[given.targets]
    if not rows_N.any():
        return
    assert given.confidences is not None
    name = f"ece{suffix}"
    metrics[name], intervals[name] = calibration_error(given.correct[rows_N], given.confidences[rows_N], num_bins)


def _bootstrap_classes(values_C: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap of the mean of the classes' figures."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    count = len(values_C)
    means = [values_C[generator.integers(0, count, (size, count))].mean(1) for size in _chunks(count)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


# By class and by group


def _table(given: _Given) -> tuple[ClassFigures, ...]:
    def share(right: int, count: int, chance: float) -> Metric | None:
        return Metric(right / count, count, wilson_interval(right, count), "fraction", chance) if count else None

    rows = []
    for i, name in enumerate(given.classes):
        count, predicted, right = int(given.true[i]), int(given.taken[i]), int(given.right[i])
        rows.append(
            ClassFigures(
                name=name,
                group=GROUPS[given.group_of[i]],
                train_count=float(given.train_counts[i]),
                count=count,
                predicted=predicted,
                right=right,
                recall=share(right, count, 1 / given.num_classes),
                precision=share(right, predicted, count / len(given.targets)),
                f1=2 * right / (count + predicted) if count + predicted else None,
            )
        )
    return tuple(rows)


def _confusion(given: _Given) -> dict[tuple[str, str], Metric]:
    true_N, taken_N = given.group_of[given.targets], given.group_of[given.predicted]
    return {
        (source, target): proportion(taken_N[true_N == i] == j, float(given.groups[target].mean()))
        for i, source in enumerate(GROUPS)
        if (true_N == i).any()
        for j, target in enumerate(GROUPS)
    }


def _notes(given: _Given, many_above: float, few_below: float) -> tuple[str, ...]:
    def some(members_C: np.ndarray) -> str:
        names = given.names(members_C)
        return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

    unseen_C, absent_C = given.groups[UNSEEN], given.true == 0
    notes = [f"many: more than {many_above:g} training images, few: fewer than {few_below:g}, medium: the others"]
    for members_C, told in (
        (
            unseen_C & ~absent_C,
            "classes have test images and no training images: they are among the few, and shown as unseen",
        ),
        (unseen_C & absent_C, "classes have neither training nor test images"),
        (~unseen_C & absent_C, "classes have no test images, so no recall and no part in means per class"),
        (absent_C & (given.taken > 0), "classes without test images were predicted and count 0 in the macro figures"),
    ):
        if members_C.any():
            notes.append(f"{int(members_C.sum())} {told}: {some(members_C)}")
    for name in GROUPS:
        if not given.groups[name].any():
            notes.append(f"no class is {name}")
        elif not given.true[given.groups[name]].any():
            notes.append(f"no test image is of a class that is {name}: {some(given.groups[name])}")
    return tuple(notes)
