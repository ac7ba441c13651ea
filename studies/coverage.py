"""How often 95% intervals hold the truth: `python -m studies.coverage` (about a minute of one core).

- Single right-or-wrong answers: exactly, by the binomial sum, for Wilson's interval and the usual others.
- Answers in groups, means and differences of two models: by simulation with known truths, for the intervals of
  `wordsight.evaluate.intervals` and for the plain ones beside them.

It writes the tables of docs/studies/coverage.md; what the page says beyond them is written by hand. The same seeds give the same
tables.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from studies.pages import put_tables
from wordsight.evaluate.intervals import bootstrap_interval, paired_bootstrap, share_interval
from wordsight.evaluate.metrics import wilson_interval

COUNTS = (50, 500, 5000)
SHARES = (0.01, 0.5, 0.99)
GROUP_SIZE = 5
LIKENESS = 0.3  # correlation of two answers of a group
RUNS = 1000
BOOTSTRAPS = 400  # runs of the rules that draw
DRAWS = 1000
PAGE = Path(__file__).parent.parent / "docs" / "studies" / "coverage.md"
Bounds = tuple[float, float]


# Single answers, exactly


def clopper_pearson(successes: int, count: int) -> Bounds:
    """Inverts both binomial tails (1934)."""
    low = stats.beta.ppf(0.025, successes, count - successes + 1) if successes else 0.0
    return low, stats.beta.ppf(0.975, successes + 1, count - successes) if successes < count else 1.0


def jeffreys(successes: int, count: int) -> Bounds:
    """Quantiles of the posterior under the prior beta(1/2, 1/2), 0 and 1 at the ends (Brown, Cai and DasGupta 2001)."""
    posterior = stats.beta(successes + 0.5, count - successes + 0.5)
    return posterior.ppf(0.025) if successes else 0.0, posterior.ppf(0.975) if successes < count else 1.0


def agresti_coull(successes: int, count: int) -> Bounds:
    """Wald's around Wilson's centre (1998)."""
    z = stats.norm.ppf(0.975)
    share, worth = (successes + z * z / 2) / (count + z * z), count + z * z
    half = z * math.sqrt(share * (1 - share) / worth)
    return share - half, share + half


def wald(successes: int, count: int) -> Bounds:
    """The share and 1.96 standard errors."""
    share = successes / count
    half = 1.96 * math.sqrt(share * (1 - share) / count)
    return share - half, share + half


EXACT: dict[str, Callable[[int, int], Bounds]] = {
    "Wilson": wilson_interval,
    "Clopper-Pearson": clopper_pearson,
    "Jeffreys": jeffreys,
    "Agresti-Coull": agresti_coull,
    "Wald": wald,
}


def exact_coverage(rule: Callable[[int, int], Bounds], count: int, shares: Sequence[float]) -> float:
    """The probability that the interval holds the share, a mean over `shares`."""
    likely = range(int(stats.binom.ppf(1e-9, count, min(shares))), int(stats.binom.ppf(1 - 1e-9, count, max(shares))) + 1)
    bounds = np.array([rule(successes, count) for successes in likely])
    found = []
    for share in shares:
        inside = (bounds[:, 0] <= share) & (share <= bounds[:, 1])
        found.append(stats.binom.pmf(np.array(likely), count, share)[inside].sum())
    return float(np.mean(found))


def around(share: float) -> list[float]:
    """Shares near one, 0.5 to 1.5 times as far from the nearer end: where the coverage of one alone oscillates."""
    distances = np.linspace(0.5, 1.5, 101) * min(share, 1 - share) if share != 0.5 else np.linspace(0.45, 0.55, 101)
    return [float(distance if share <= 0.5 else 1 - distance) for distance in distances]


def singles_table() -> list[str]:
    """Rows of exact coverage."""
    rows = ["| n | p | " + " | ".join(EXACT) + " | Wilson, mean around p |", "| --- " * (len(EXACT) + 3) + "|"]
    for count in COUNTS:
        for share in SHARES:
            found = [exact_coverage(rule, count, [share]) for rule in EXACT.values()]
            mean = exact_coverage(wilson_interval, count, around(share))
            rows.append(f"| {count} | {share} | " + " | ".join(f"{100 * value:.1f}" for value in [*found, mean]) + " |")
    return rows


def attainable(count: int, share: float, least: float = 1e-7) -> list[float]:
    """Every coverage that any rule, without dice, can have here: the sums of the probabilities of sets of outcomes.

    Outcomes of a probability below `least` are left out: together they move a sum by less than .00001.
    """
    weights = [weight for weight in stats.binom.pmf(np.arange(count + 1), count, share).tolist() if weight >= least]
    sums = np.zeros(1)
    for weight in weights:
        sums = np.concatenate([sums, sums + weight])
    return sorted(sums.tolist())


# Groups, means and differences, by simulation


def percentile_bootstrap(sums_G: np.ndarray, counts_G: np.ndarray, draw: np.random.Generator) -> Bounds:
    """Plain percentiles of groups drawn anew."""
    values, times = np.unique(np.stack([sums_G, counts_G], 1), axis=0, return_counts=True)
    if len(values) < 50:  # few kinds of groups: how many of each are drawn
        drawn_RU = draw.multinomial(len(sums_G), times / times.sum(), size=DRAWS)
        means_R = (drawn_RU @ values[:, 0]) / (drawn_RU @ values[:, 1])
    else:
        drawn_RG = draw.integers(0, len(sums_G), (DRAWS, len(sums_G)), dtype=np.int32)
        means_R = sums_G[drawn_RG].sum(1) / counts_G[drawn_RG].sum(1)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(low), float(high)


def holds(bounds: Bounds, truth: float) -> bool:
    """Whether the truth lies within, its rounding aside."""
    return bounds[0] - 1e-12 <= truth <= bounds[1] + 1e-12


def grouped_answers(draw: np.random.Generator, share: float, sizes: np.ndarray) -> np.ndarray:
    """Right-or-wrong answers, one group after another; each group's own share follows a beta distribution."""
    scale = (1 - LIKENESS) / LIKENESS
    return draw.random(int(sizes.sum())) < np.repeat(draw.beta(share * scale, (1 - share) * scale, len(sizes)), sizes)


def group_sizes(count: int, equal: bool) -> np.ndarray:
    """Groups of 5, or of 1 to 9."""
    return np.full(count // GROUP_SIZE, GROUP_SIZE) if equal else np.resize([1, 9, 3, 7, 5], count // GROUP_SIZE)


def groups_table() -> list[str]:
    """Rows of shares of answers in groups."""
    rows = [
        "| n | groups | sizes | p | Wilson, groups ignored | plain cluster bootstrap | `share_interval` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count in COUNTS:
        for equal in (True, False):
            sizes = group_sizes(count, equal)
            names = np.repeat(np.arange(len(sizes)), sizes)
            for share in SHARES:
                draw = np.random.default_rng(count + 7 * equal)
                held = np.zeros(3)
                for run in range(RUNS):
                    hits = grouped_answers(draw, share, sizes)
                    held[0] += holds(wilson_interval(int(hits.sum()), len(hits)), share)
                    if run < BOOTSTRAPS:
                        held[1] += holds(percentile_bootstrap(np.bincount(names, weights=hits), 1.0 * sizes, draw), share)
                    held[2] += holds(share_interval(hits, names), share)
                told = " | ".join(f"{100 * value:.1f}" for value in held / [RUNS, BOOTSTRAPS, RUNS])
                size = str(GROUP_SIZE) if equal else "1-9"
                rows.append(f"| {len(names)} | {len(sizes)} | {size} | {share} | {told} |")
    return rows


def means_table() -> list[str]:
    """Rows of means of numbers in groups of 4."""
    rows = ["| groups | numbers | plain cluster bootstrap | `bootstrap_interval` |", "| --- | --- | --- | --- |"]
    for number in (5, 10, 50, 500):
        for name, skewed in (("normal", False), ("lognormal", True)):
            draw = np.random.default_rng(number)
            held = np.zeros(2)
            names = np.repeat(np.arange(number), 4)
            truth = math.exp(0.75) if skewed else 0.0
            for run in range(BOOTSTRAPS):
                values = np.repeat(draw.normal(size=number), 4) + draw.normal(size=len(names)) * math.sqrt(0.5)
                values = np.exp(values) if skewed else values
                sums_G, counts_G = np.bincount(names, weights=values), np.full(number, 4.0)
                held += [
                    holds(percentile_bootstrap(sums_G, counts_G, draw), truth),
                    holds(bootstrap_interval(values, names, draws=DRAWS, seed=run), truth),
                ]
            rows.append(f"| {number} | {name} | " + " | ".join(f"{100 * value / BOOTSTRAPS:.1f}" for value in held) + " |")
    return rows


def two_models(draw: np.random.Generator, shares: Bounds, groups: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of two models to the same questions: what makes a question hard is shared, by a group and by both models."""
    of_group = math.sqrt(LIKENESS) if size > 1 else 0.0
    shared = of_group * draw.normal(size=(groups, 1)) + math.sqrt(0.6 - of_group**2) * draw.normal(size=(groups, size))
    first, second = (shared + math.sqrt(0.4) * draw.normal(size=(groups, size)) < stats.norm.ppf(share) for share in shares)
    return first.ravel(), second.ravel()


def pairs_table() -> list[str]:
    """Rows of differences of two models, and how often a test at 5% finds one where there is none."""
    rows = [
        "| n | groups | p of the two | plain bootstrap | `paired_bootstrap` | its p < .05 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count in COUNTS:
        for size in (1, GROUP_SIZE):
            names = np.repeat(np.arange(count // size), size)
            for shares in ((0.01, 0.03), (0.5, 0.5), (0.5, 0.6), (0.99, 0.99), (0.99, 0.95)):
                draw = np.random.default_rng(count + size)
                held, found = np.zeros(2), 0
                for run in range(BOOTSTRAPS):
                    first, second = two_models(draw, shares, count // size, size)
                    sums_G = np.bincount(names, weights=first.astype(float) - second)
                    paired = paired_bootstrap(first, second, None if size == 1 else names, draws=DRAWS, seed=run)
                    truth = shares[0] - shares[1]
                    held += [
                        holds(percentile_bootstrap(sums_G, np.full(len(sums_G), float(size)), draw), truth),
                        holds(paired.ci95, truth),
                    ]
                    found += paired.p_value < 0.05
                told = " | ".join(f"{100 * value / BOOTSTRAPS:.1f}" for value in held)
                rows.append(f"| {count} | {count // size} | {shares[0]}, {shares[1]} | {told} | {100 * found / BOOTSTRAPS:.1f} |")
    return rows


TABLES: dict[str, Callable[[], list[str]]] = {
    "Single answers: exact coverage in %": singles_table,
    "Shares of answers in groups: coverage in %": groups_table,
    "Means of numbers in groups of 4: coverage in %": means_table,
    "Differences of two models: coverage in %": pairs_table,
}


def tables() -> Iterator[str]:
    """The lines between the markers."""
    for title, make in TABLES.items():
        start = time.process_time()
        yield from ("", f"## {title}", "", *make())
        print(f"{title}: {time.process_time() - start:.0f} s", flush=True)


def write_page() -> None:
    """Put the tables into the page, between its markers."""
    put_tables(PAGE, "How often intervals hold the truth", "\n".join(tables()).lstrip("\n") + "\n")


if __name__ == "__main__":
    write_page()
