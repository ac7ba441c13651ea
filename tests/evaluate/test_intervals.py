"""Intervals and paired comparisons: closed forms, how often they hold the truth, speed, and bad input."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from scipy import stats

from wordsight.evaluate.intervals import bootstrap_interval, mcnemar, paired_bootstrap, share_interval
from wordsight.evaluate.metrics import wilson_interval


def test_a_share_of_single_answers_is_wilsons() -> None:
    hits = np.arange(50) < 7
    assert share_interval(hits) == wilson_interval(7, 50)
    assert share_interval(np.ones(50)) == wilson_interval(50, 50)


def test_groups_whose_samples_are_alike_count_as_one_sample_each() -> None:
    """Five copies of each answer are worth no more than the answer, but for Student's quantile and N for N - 1."""
    draw = np.random.default_rng(0)
    hits = draw.random(40) < 0.7
    low, high = share_interval(np.repeat(hits, 5), np.repeat(np.arange(40), 5))
    share, worth, quantile = hits.mean(), 39.0, stats.t.ppf(0.975, 39)
    assert (low, high) == pytest.approx(wilson_interval(share * worth, worth, quantile), abs=1e-12)
    # and where nothing is seen of how they agree, they are taken to
    assert share_interval(np.ones(200), np.repeat(np.arange(40), 5))[0] == pytest.approx(
        wilson_interval(40, 40, quantile)[0], abs=1e-12
    )


def test_independent_answers_in_groups_are_worth_about_their_number() -> None:
    draw = np.random.default_rng(1)
    hits = draw.random(20_000) < 0.3
    alone, grouped = share_interval(hits), share_interval(hits, np.arange(20_000) // 5)
    assert grouped == pytest.approx(alone, abs=3e-4)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    draw = np.random.default_rng(2)
    for size in (1, 5, 30, 400):
        first, second = draw.random(size) < 0.6, draw.random(size) < 0.4
        found = mcnemar(first, second)
        assert found.only_first == int((first & ~second).sum())
        assert found.only_second == int((second & ~first).sum())
        discordant = found.only_first + found.only_second
        expected = stats.binomtest(found.only_first, discordant).pvalue if discordant else 1.0
        assert found.p_value == pytest.approx(expected, rel=1e-9)
    one_sided = mcnemar(np.ones(100_000), np.zeros(100_000))
    assert 0 <= one_sided.p_value < 1e-300


def test_paired_difference_is_students_on_many_groups() -> None:
    """With dense differences the interval comes to the paired t interval, and the p value to the paired t test's."""
    draw = np.random.default_rng(3)
    first = draw.normal(size=400)
    second = first - 0.06 + 0.5 * draw.normal(size=400)
    found = paired_bootstrap(first, second, draws=20_000)
    low, high = stats.ttest_rel(first, second).confidence_interval()
    assert found.difference == pytest.approx(float(np.mean(first - second)), abs=1e-12)
    assert found.ci95 == pytest.approx((low, high), abs=0.003)
    assert found.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.006)
    assert (found.count, found.num_groups) == (400, 400)


def test_paired_groups_are_what_is_drawn() -> None:
    draw = np.random.default_rng(4)
    first, second = draw.random(60) < 0.8, draw.random(60) < 0.5
    groups = [f"picture {i}" for i in range(60)]
    alone = paired_bootstrap(first, second, groups)
    copies = paired_bootstrap(np.repeat(first, 5), np.repeat(second, 5), np.repeat(groups, 5))
    assert (*copies.ci95, copies.p_value) == pytest.approx((*alone.ci95, alone.p_value), abs=1e-12)
    assert (copies.count, copies.num_groups) == (300, 60)
    naive = paired_bootstrap(np.repeat(first, 5), np.repeat(second, 5))
    assert naive.ci95[1] - naive.ci95[0] < 0.6 * (copies.ci95[1] - copies.ci95[0])


def test_interval_and_p_value_say_the_same_and_repeat() -> None:
    draw = np.random.default_rng(5)
    near = 0
    for _ in range(200):
        first, second = draw.random(80) < 0.7, draw.random(80) < draw.uniform(0.4, 0.7)
        found = paired_bootstrap(first, second)
        leaves_out = found.ci95[0] > 0 or found.ci95[1] < 0
        if abs(found.p_value - 0.05) > 0.003:
            assert leaves_out == (found.p_value < 0.05)
            near += abs(found.p_value - 0.05) < 0.04
    assert near > 5, "some were near the border"
    assert paired_bootstrap(first, second) == found
    assert paired_bootstrap(first, second, seed=1).ci95 != found.ci95
    swapped = paired_bootstrap(second, first)
    assert swapped.difference == -found.difference


def test_models_that_agree_are_not_shown_to_be_equal() -> None:
    for size, bound in ((50, 0.06), (5000, 0.0006)):  # about 3 / N could have differed unseen
        found = paired_bootstrap(np.ones(size), np.ones(size))
        low, high = found.ci95
        assert found.difference == 0
        assert -bound < low < -bound / 2
        assert bound / 2 < high < bound
        assert found.p_value > 0.9


def coverage(intervals: Any, truth: float) -> float:
    found = np.array(list(intervals))
    return float(np.mean((found[:, 0] <= truth + 1e-12) & (found[:, 1] >= truth - 1e-12)))


def clustered(draw: np.random.Generator, share: float, num_groups: int, size: int, likeness: float = 0.3) -> np.ndarray:
    """[G, size] answers of groups whose own shares follow a beta distribution with this correlation within a group."""
    scale = (1 - likeness) / likeness
    return draw.random((num_groups, size)) < draw.beta(share * scale, (1 - share) * scale, num_groups)[:, None]


@pytest.mark.parametrize(("num_groups", "share"), [(10, 0.5), (100, 0.01), (100, 0.5), (1000, 0.99)])
def test_grouped_shares_hold_the_truth(num_groups: int, share: float) -> None:
    """Nominal 95%; within 93-97 but for what 600 measurements may err (three standard errors)."""
    draw = np.random.default_rng(6)
    groups = np.repeat(np.arange(num_groups), 5)
    found = coverage(
        (share_interval(clustered(draw, share, num_groups, 5).ravel(), groups) for _ in range(600 if num_groups < 999 else 200)),
        share,
    )
    slack = 3 * math.sqrt(0.95 * 0.05 / (600 if num_groups < 999 else 200))
    assert 0.93 - slack < found < 0.97 + slack


@pytest.mark.parametrize(("num", "share"), [(500, 0.5), (5000, 0.01), (5000, 0.5), (5000, 0.99)])
def test_single_shares_hold_the_truth_by_exact_count(num: int, share: float) -> None:
    successes = np.arange(num + 1)
    weights = stats.binom.pmf(successes, num, share)
    likely = successes[weights > 1e-12]
    inside = sum(weights[k] for k in likely if wilson_interval(k, num)[0] <= share <= wilson_interval(k, num)[1])
    assert 0.93 <= inside <= 0.97


def test_fifty_rare_answers_allow_no_such_interval() -> None:
    """Whatever interval a rule gives to each count of 50, at p = .01 it holds the truth in less than 93% or more than 97%."""
    weights = stats.binom.pmf(np.arange(8), 50, 0.01)
    sums = [sum(weights[k] for k in range(8) if chosen >> k & 1) for chosen in range(1 << 8)]
    assert not [total for total in sums if 0.93 - 1e-6 <= total <= 0.97 + 1e-6]
    inside = sum(weights[k] for k in range(8) if wilson_interval(k, 50)[0] <= 0.01 <= wilson_interval(k, 50)[1])
    assert inside == pytest.approx(0.9106, abs=1e-4)


@pytest.mark.parametrize("num_groups", [10, 60])
def test_means_and_differences_hold_the_truth(num_groups: int) -> None:
    draw = np.random.default_rng(7)
    groups = np.repeat(np.arange(num_groups), 4)
    means, differences = [], []
    for trial in range(400):
        level = np.repeat(draw.normal(size=num_groups), 4)
        values = level + draw.normal(size=len(groups))
        means.append(bootstrap_interval(values, groups, draws=1000, seed=trial))
        first = level + draw.normal(size=len(groups)) < 0.4
        second = level + draw.normal(size=len(groups)) < 0.4
        differences.append(paired_bootstrap(first, second, groups, draws=1000, seed=trial).ci95)
    assert 0.92 < coverage(means, 0.0) < 0.98
    assert 0.92 < coverage(differences, 0.0) < 0.99


def test_ten_thousand_samples_in_two_thousand_draws_take_less_than_a_second() -> None:
    draw = np.random.default_rng(8)
    first, second = draw.random(10_000) < 0.7, draw.random(10_000) < 0.7
    start = time.process_time()
    paired_bootstrap(first, second, draws=2000)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap(np.ones(3), np.ones(4)), "3 and the second 4"),
        (lambda: paired_bootstrap(np.ones(0), np.ones(0)), "one or more"),
        (lambda: paired_bootstrap(np.array([1, np.nan]), np.ones(2)), "first is nan for sample 1"),
        (lambda: paired_bootstrap(np.ones(4), np.ones(4), ["a"] * 4), "one group"),
        (lambda: paired_bootstrap(np.ones(4), np.ones(4), ["a"] * 3), "4 samples and 3 groups"),
        (lambda: paired_bootstrap(np.ones(4), np.zeros(4), draws=5), "5 draws"),
        (lambda: mcnemar(np.array([0.5, 1]), np.ones(2)), "first has others"),
        (lambda: mcnemar(np.ones(3), np.ones(2)), "3 and the second 2"),
        (lambda: share_interval([0.5, 1.5]), r"\[0, 1\]"),
        (lambda: share_interval(np.ones((2, 2))), "shape"),
        (lambda: bootstrap_interval([math.inf, 1.0]), "inf for sample 0"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
