"""The study of intervals: its exact part is what the page says, and what no rule can reach is said there."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from studies import coverage


def table(title: str) -> list[list[str]]:
    """The cells of a table of the page, its heading first."""
    text = coverage.PAGE.read_text(encoding="utf-8")
    found = re.search(rf"## {re.escape(title)}\n\n((?:\|.*\n)+)", text)
    assert found is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return [rows[0], *rows[2:]]


def test_the_pages_exact_coverage_is_the_binomials() -> None:
    (title, make), *others = coverage.TABLES.items()
    assert table(title) == [[cell.strip() for cell in line.strip("|").split("|")] for line in [make()[0], *make()[2:]]]
    for name, _ in others:
        assert len(table(name)) > 8
    by_hand = sum(stats.binom.pmf(k, 50, 0.5) for k in range(51) if coverage.wald(k, 50)[0] <= 0.5 <= coverage.wald(k, 50)[1])
    assert coverage.exact_coverage(coverage.wald, 50, [0.5]) == pytest.approx(by_hand, abs=1e-8)


def test_no_rule_covers_93_to_97_of_50_rare_answers() -> None:
    sums = np.array(coverage.attainable(50, 0.01))
    assert not ((sums > 0.9299) & (sums < 0.9701)).any()
    near = sums[sums < 0.93].max(), sums[sums > 0.97].min()
    text = coverage.PAGE.read_text(encoding="utf-8")
    assert f"{100 * near[0]:.1f}%" in text
    assert f"{100 * near[1]:.1f}%" in text


def test_figures_of_the_page_are_within_the_promise() -> None:
    """Shares in groups: 93 to 97, but for what 1,000 runs may err (two standard errors are 1.4)."""
    title = next(name for name in coverage.TABLES if name.startswith("Shares"))
    own = [float(row[-1]) for row in table(title)[1:]]
    assert len(own) == 18
    assert min(own) > 93 - 1.4
    assert max(own) < 97 + 1.4


def test_known_rules_are_the_published_ones() -> None:
    assert coverage.clopper_pearson(0, 10) == pytest.approx((0, 0.3085), abs=1e-4)
    assert coverage.clopper_pearson(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    draw = np.random.default_rng(0)
    assert coverage.percentile_bootstrap(np.arange(100.0), np.ones(100), draw) == pytest.approx((43.8, 55.2), abs=1.0)
