"""95% intervals of shares and means, of single samples and of groups of them, and paired comparisons of two models.

- **Shares** (`share_interval`): Wilson's score interval (1927). Samples of one group (captions of an image, drawings of a
  concept) are not independent: their number is divided by the design effect that the groups show (Kish 1965), and the quantile is
  Student's with one degree of freedom less than there are groups, as in clustered surveys (Dean and Pagano 2015).
- **Means** of any numbers (`bootstrap_interval`): groups are drawn anew, and what is compared is the mean's distance in its own
  standard errors (bootstrap-t, Efron 1981), without which few groups give too narrow an interval. Half a group of the usual
  spread is added to every variance, so that a draw of groups all alike does not make it endless.
- **Differences** of two models on the same samples (`paired_bootstrap`): percentiles of the differences of groups drawn anew,
  widened to Student's quantiles and by sqrt(G / (G - 1)) (Hesterberg 2015), as if one more group had differed, which is what the
  pseudo-pairs of Agresti and Min (2005) do: two models that agree on 50 samples need not be equal.
- `mcnemar`: the exact test of two models' right and wrong answers.

`studies/coverage.py` measures how often these intervals hold the truth.

Shape legend: N samples, G groups, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wordsight.evaluate.metrics import Z95, wilson_interval
from wordsight.types import Metric

DRAWS = 2000
DRAWN_AT_ONCE = 1 << 18  # numbers held while groups are drawn anew
PART_OF_A_GROUP = 0.5  # see "Means" above


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """How much better the first of two models is than the second on the same samples.

    Attributes:
        difference: mean of the first minus mean of the second.
        ci95: its 95% interval over groups.
        p_value: two-sided, of a difference of 0; below .05 where the interval leaves 0 out. No smaller than `draws` can tell.
        count: N samples.
        num_groups: G; N where each sample stands for itself.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float
    count: int
    num_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """Samples on which one of two models alone is right.

    Attributes:
        only_first, only_second: how many.
        p_value: two-sided and exact (binomial), of both being right equally often; it takes samples as independent.
    """

    only_first: int
    only_second: int
    p_value: float


def share_interval(values: Any, groups: Sequence[Hashable] | np.ndarray | None = None) -> tuple[float, float]:
    """95% interval of a mean of numbers in [0, 1]: Wilson's, at the number of independent right-or-wrong answers they are worth.

    That number is m (1 - m) / v with m the mean and v its variance between groups: N for single answers, as few as G for groups
    whose samples are all alike. Where every value is the same nothing is seen of how groups agree, and it is G.

    Args:
        values: [N] right or wrong, or shares in [0, 1].
        groups: [N] which samples belong together; None: each stands for itself.

    Raises:
        ValueError: no values, values outside of [0, 1], other lengths, or one group alone.
    """
    values_N = _numbers("values", values)
    if not ((values_N >= 0) & (values_N <= 1)).all():
        raise ValueError(
            f"a share lies in [0, 1], got {values_N.min():g} to {values_N.max():g}: use bootstrap_interval for means"
        )
    single = bool(((values_N == 0) | (values_N == 1)).all())
    if groups is None and single:
        return wilson_interval(float(values_N.sum()), len(values_N))
    sums_G, counts_G = _grouped(values_N, groups)
    mean = float(sums_G.sum() / counts_G.sum())
    variance = _variance_of_mean(sums_G, counts_G)
    spread = mean * (1 - mean)
    worth = spread / variance if variance > 1e-12 * spread and spread > 0 else float(len(sums_G))
    if single:  # groups that differ less than chance would have it are luck
        worth = min(worth, float(len(values_N)))
    return wilson_interval(mean * worth, worth, student(len(sums_G) - 1) if groups is not None else Z95)


def grouped_share(values: Any, groups: Sequence[Hashable] | np.ndarray, chance: float | None) -> Metric:
    """The share of right answers with its interval over groups.

    Args:
        values: [N] 0 or 1.
        groups: [N] which answers belong together; of one group alone nothing is known of others, and it counts as one answer.
        chance: what guessing gives.
    """
    share = float(np.mean(values))
    interval = share_interval(values, groups) if any(group != groups[0] for group in groups) else wilson_interval(share, 1)
    return Metric(share, len(values), interval, "fraction", chance)


def bootstrap_interval(
    values: Any, groups: Sequence[Hashable] | np.ndarray | None = None, *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the mean of any numbers, by bootstrap-t over groups.

    Args:
        values: [N] numbers. For shares near 0 or 1 use `share_interval`: resamples say nothing of what was not seen.
        groups: [N] which samples belong together; None: each stands for itself.
        draws: R.
        seed: of the draws.

    Raises:
        ValueError: no values, values that are not finite, other lengths, or one group alone.
    """
    sums_G, counts_G = _grouped(_numbers("values", values), groups)
    mean, number = sums_G.sum() / counts_G.sum(), len(sums_G)
    residuals_G = sums_G - mean * counts_G
    squares, added = float((residuals_G**2).sum()), PART_OF_A_GROUP * float((residuals_G**2).mean())
    if squares == 0:
        return float(mean), float(mean)
    ratios = []
    for drawn in _draws(number, draws, np.random.default_rng(seed)):
        total, drawn_counts = residuals_G[drawn].sum(1), counts_G[drawn]
        off = total / drawn_counts.sum(1)  # the draw's mean less the mean
        drawn_squares = ((residuals_G[drawn] - off[:, None] * drawn_counts) ** 2).sum(1)
        ratios.append(total / np.sqrt(drawn_squares + added))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    error = math.sqrt(squares + added) / counts_G.sum()
    return float(mean - high * error), float(mean - low * error)


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Paired:
    """The difference of two models' means on the same samples, with its interval over groups.

    Args:
        first, second: [N] what each sample came to with each model, e.g. right or wrong, in the same order.
        groups: [N] which samples belong together; None: each stands for itself.
        draws: R.
        seed: of the draws: the same samples give the same figures.

    Raises:
        ValueError: no samples, other lengths, values that are not finite, or one group alone.
    """
    first_N, second_N = _numbers("first", first), _numbers("second", second)
    if len(first_N) != len(second_N):
        raise ValueError(f"paired samples: the first model has {len(first_N)} and the second {len(second_N)}; pair them by key")
    sums_G, counts_G = _grouped(first_N - second_N, groups)
    difference = float(sums_G.sum() / counts_G.sum())
    draw = np.random.default_rng(seed)
    means_R = _widened(sums_G, counts_G, draws, draw)
    differing = sums_G[sums_G != 0]
    # where all agree, the most that one group could have differed by: the scale is that of right and wrong, or larger
    largest = max(1.0, float(np.abs(first_N).max()), float(np.abs(second_N).max())) * float(counts_G.mean())
    unseen = math.sqrt(float(np.mean(differing**2))) if len(differing) else largest
    means_R += unseen / counts_G.sum() * draw.standard_normal(draws)
    return Paired(
        difference=difference,
        ci95=_percentiles(means_R, len(sums_G)),
        p_value=_p_value(means_R, len(sums_G)),
        count=len(first_N),
        num_groups=len(sums_G),
    )


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """McNemar's exact test (1947) of two models' answers to the same questions.

    Args:
        first, second: [N] right (1, True) or wrong, in the same order.

    Raises:
        ValueError: no samples, other lengths, or values that are neither 0 nor 1.
    """
    first_N, second_N = _numbers("first", first), _numbers("second", second)
    if len(first_N) != len(second_N):
        raise ValueError(f"paired samples: the first model has {len(first_N)} and the second {len(second_N)}; pair them by key")
    for name, values_N in (("first", first_N), ("second", second_N)):
        if not np.isin(values_N, (0, 1)).all():
            raise ValueError(f"McNemar's test is of right (1) and wrong (0) answers, {name} has others: use paired_bootstrap")
    only_first, only_second = int((first_N > second_N).sum()), int((second_N > first_N).sum())
    return McNemar(only_first=only_first, only_second=only_second, p_value=_sign_test(only_first, only_second))


def _sign_test(one: int, other: int) -> float:
    """Two-sided exact p value of a fair coin that fell `one` times on one side and `other` times on the other."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(one, other), one + other, 0.5))) if one != other else 1.0


def _numbers(name: str, values: Any) -> np.ndarray:
    """float64 [N], finite."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) == 0:
        raise ValueError(f"{name} must hold a number of each sample, one or more, got the shape {found.shape}")
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(f"{name} is {found[row]} for sample {row}: a figure must be finite")
    return found


def _grouped(values_N: np.ndarray, groups: Sequence[Hashable] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Each group's sum and number of samples, [G] and [G]."""
    if groups is None:
        sums_G, counts_G = values_N, np.ones(len(values_N))
    else:
        if len(groups) != len(values_N):
            raise ValueError(f"{len(values_N)} samples and {len(groups)} groups: name the group of each sample")
        places: dict[Hashable, int] = {}
        listed = groups.tolist() if isinstance(groups, np.ndarray) else groups
        place_N = np.array([places.setdefault(group, len(places)) for group in listed])
        sums_G, counts_G = np.bincount(place_N, weights=values_N), np.bincount(place_N).astype(np.float64)
    if len(sums_G) < 2:
        raise ValueError(f"{len(values_N)} samples of one group say nothing of other groups: an interval needs 2 or more")
    return sums_G, counts_G


def _variance_of_mean(sums_G: np.ndarray, counts_G: np.ndarray) -> float:
    """Variance of the ratio sum / count between groups, linearised (Kish 1965)."""
    number, total = len(sums_G), counts_G.sum()
    residuals_G = sums_G - sums_G.sum() / total * counts_G
    return float(number / (number - 1) * (residuals_G**2).sum() / total**2)


def student(freedom: float) -> float:
    """97.5% quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def _widened(sums_G: np.ndarray, counts_G: np.ndarray, draws: int, draw: np.random.Generator) -> np.ndarray:
    """[R] means of groups drawn anew, as far from the mean as those of G - 1 degrees of freedom are."""
    number = len(sums_G)
    equal = bool((counts_G == counts_G[0]).all())
    means = []
    for drawn in _draws(number, draws, draw):
        totals = counts_G[0] * number if equal else counts_G[drawn].sum(1)
        means.append(sums_G[drawn].sum(1) / totals)
    mean = sums_G.sum() / counts_G.sum()
    return mean + math.sqrt(number / (number - 1)) * (np.concatenate(means) - mean)


def _draws(number: int, draws: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """int32 [R, G], groups drawn anew, some draws at once."""
    if draws < 100:
        raise ValueError(f"percentiles of {draws} draws are no interval: draw 100 or more, 2,000 for two digits")
    step = max(1, DRAWN_AT_ONCE // number)
    for start in range(0, draws, step):
        yield draw.integers(0, number, (min(step, draws - start), number), dtype=np.int32)


def _percentiles(means_R: np.ndarray, number: int) -> tuple[float, float]:
    """The percentiles that lie as far out as Student's quantiles do: 2.5 and 97.5 for many groups."""
    from scipy.special import ndtr

    tail = 100 * float(ndtr(-student(number - 1)))
    low, high = np.percentile(means_R, [tail, 100 - tail])
    return float(low), float(high)


def _p_value(means_R: np.ndarray, number: int) -> float:
    """Twice the share of draws beyond 0 on its rarer side, brought from the normal to Student's tail as the percentiles are."""
    from scipy.special import ndtri, stdtr

    beyond = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    share = (beyond + 1) / (len(means_R) + 1)
    return min(1.0, 2 * float(stdtr(number - 1, ndtri(share))))
