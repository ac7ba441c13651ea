"""Models laid side by side on what both were measured on: paired tests on the same samples, instead of two separate intervals.

- **right or wrong, samples independent**: McNemar's exact test.
- **else** (shares of a metric, samples in groups): paired bootstrap over groups. Its interval of the difference stands beside
  McNemar's p value too.
- **many tests**: p values adjusted by Holm (1979), which bounds the chance of a single false difference among all of them.

Figures of different protocols are shown and never tested. Shape legend: N samples that both models have.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wordsight.evaluate.intervals import mcnemar, paired_bootstrap
from wordsight.evaluate.kept import Kept, read_kept
from wordsight.evaluate.report import metric_name, task_name, unit_of
from wordsight.evaluate.results import Outcomes, check_record, read_json
from wordsight.types import Metric

DRAWS, MOST_DRAWS = 5000, 50_000  # of the bootstrap: p is no smaller than 2 / draws
DRAWS_A_TEST = 100  # so that the smallest p, adjusted for all tests, is .02: a sure difference among many can be seen
Place = tuple[str, str, str]  # task, data, split


@dataclass(frozen=True, kw_only=True)
class Run:
    """A model with all that was measured of it.

    Attributes:
        name: what the comparison calls it, unlike every other run's.
        folder: where it was read from.
        measured: its measurements.
    """

    name: str
    folder: Path
    measured: tuple[Kept, ...]

    @property
    def model(self) -> dict[str, Any]:
        """What is known of the model: weights, num_parameters, gflops, source."""
        return self.measured[0].model


@dataclass(frozen=True, kw_only=True)
class Test:
    """One model against the baseline on one measurement.

    Attributes:
        model, baseline: names of the runs.
        count: N.
        num_groups: of the samples; N where they are independent.
        only_model, only_baseline: samples that the other one lacks, which are left out.
        difference, ci95: mean of the model minus that of the baseline on the N, paired.
        method: "McNemar" or "paired bootstrap".
        p_value, p_holm: raw, and adjusted for all tests of the comparison. A bootstrap's is no smaller than 2 / draws.
    """

    model: str
    baseline: str
    count: int
    num_groups: int
    only_model: int
    only_baseline: int
    difference: float
    ci95: tuple[float, float]
    method: str
    p_value: float
    p_holm: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement's figures of all models.

    Attributes:
        item: the suite's name of it, or "".
        place: task, data and split.
        metric: which figure.
        figures: run -> Metric.
        protocols: run -> how it was measured.
        tests: against the baseline, of the runs that could be tested.
        warnings: why others could not, and what else to know.
    """

    item: str
    place: Place
    metric: str
    figures: dict[str, Metric]
    protocols: dict[str, str]
    tests: tuple[Test, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What a reader calls it."""
        task, data, split = self.place
        return self.item.replace("_", " ") or f"{task_name(task)} · {data} · {split}"

    @property
    def comparable(self) -> bool:
        """Whether every figure was measured in the same way."""
        return len(set(self.protocols.values())) == 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows of a comparison.

    Attributes:
        runs: the models, the baseline first.
        rows: one a measurement.
        notes: what concerns all of it.
    """

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def baseline(self) -> Run:
        return self.runs[0]

    @property
    def means(self) -> dict[str, Metric]:
        """Run -> mean of the shares over the rows that all runs have, measured in the same way; none where there is no such row.

        Its interval takes the rows as independent: half-widths add up by their squares.
        """
        names = [run.name for run in self.runs]
        shared = [row for row in self.rows if row.comparable and set(row.figures) == set(names)]
        shared = [row for row in shared if all(metric.unit == "fraction" for metric in row.figures.values())]
        return {name: _mean([row.figures[name] for row in shared]) for name in names} if shared else {}


def _mean(metrics: Sequence[Metric]) -> Metric:
    value = float(np.mean([metric.value for metric in metrics]))
    below, above = (
        math.sqrt(sum((metric.ci95[side] - metric.value) ** 2 for metric in metrics)) / len(metrics) for side in (0, 1)
    )
    chances = [metric.chance for metric in metrics]
    chance = None if None in chances else float(np.mean(chances))  # type: ignore[arg-type]
    return Metric(value, len(metrics), (value - below, value + above), "fraction", chance)


# Reading


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The models in run folders of `wordsight evaluate`, with or without --suite; a folder may hold several.

    Raises:
        FileNotFoundError: no such folder, or nothing was measured in it.
        ValueError: a measurement is damaged.
    """
    found: list[Run] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"no run folder {path}: give folders that `wordsight evaluate --run` wrote")
        own = _suite_runs(path) or _plain_runs(path)
        if not own:
            raise FileNotFoundError(f"nothing was measured in {path}: there is neither ITEM/finding.json nor results.json")
        found += own
    return _told_apart(found)


def _suite_runs(path: Path) -> list[Run]:
    """Runs of `MODEL/ITEM/` below a folder, or of `ITEM/` where it is a model's own."""
    folders: dict[Path, list[Kept]] = defaultdict(list)
    for place in sorted([*path.glob("*/finding.json"), *path.glob("*/*/finding.json")]):
        kept = read_kept(place.parent)
        if kept is not None:
            folders[place.parent.parent].append(kept)
    runs = []
    for folder, measured in folders.items():
        by_weights: dict[str, list[Kept]] = defaultdict(list)
        for kept in measured:
            by_weights[kept.model.get("weights", "")].append(kept)
        for own in by_weights.values():
            in_order = tuple(sorted(own, key=lambda kept: kept.order))
            runs.append(Run(name=own[0].model["name"], folder=folder, measured=in_order))
    return sorted(runs, key=lambda run: run.model.get("order", 0))


def _plain_runs(path: Path) -> list[Run]:
    """The run of a `results.json` alone: figures without each sample's outcome, so that nothing can be tested."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in map(check_record, read_json(path / "results.json", [])):
        groups[record["task"], record["data"], record["split"], record["protocol"]].append(record)
    measured = [
        Kept(
            item="",
            model={"name": path.resolve().name},
            task=task,
            data=data,
            split=split,
            metrics={
                one["metric"]: Metric(one["value"], one["count"], tuple(one["ci95"]), unit_of(one["metric"]), one["chance"])
                for one in records
            },
            protocol=protocol,
            fingerprint=records[0]["fingerprint"],
            headline=records[0]["metric"],
        )
        for (task, data, split, protocol), records in groups.items()
    ]
    return [Run(name=path.resolve().name, folder=path, measured=tuple(measured))] if measured else []


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs with names of their own: by their folders where models are called alike, by number where these are alike too."""
    twice = {name for name, count in Counter(run.name for run in runs).items() if count > 1}
    named = []
    for run in runs:
        parent = run.folder.resolve().parent if run.folder.name in (run.name, "findings") else run.folder.resolve()
        named.append(replace(run, name=f"{parent.name}/{run.name}") if run.name in twice else run)
    seen: Counter[str] = Counter()
    for i, run in enumerate(named):
        seen[run.name] += 1
        if seen[run.name] > 1:
            named[i] = replace(run, name=f"{run.name} ({seen[run.name]})")
    return named


# Comparing


def compare(runs: Sequence[Run], *, baseline: str | Path | None = None, metrics: Sequence[str] = ()) -> Comparison:
    """All measurements of two models or more, each model tested against the baseline where both were measured alike.

    Args:
        runs: of `read_runs`.
        baseline: the name or the folder of the run that the others are tested against; None: the first.
        metrics: which figures; none: the one that stands for each measurement.

    Raises:
        ValueError: fewer than two runs, no such baseline, or no figure of such names.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two models or more, got {', '.join(run.name for run in runs) or 'none'}")
    first = _baseline(runs, baseline)
    ordered = [first, *(run for run in runs if run is not first)]
    places: dict[tuple[Place, str], dict[str, list[Kept]]] = defaultdict(lambda: defaultdict(list))
    for run in ordered:
        for kept in run.measured:
            for metric in metrics or (kept.headline,):
                if metric in kept.metrics:
                    places[(kept.task, kept.data, kept.split), metric][run.name].append(kept)
    if not places:
        raise ValueError(f"no measurement has a metric {' or '.join(map(repr, metrics))}")
    draws = bootstrap_draws(sum(len(found) - 1 for found in places.values() if first.name in found))
    rows = [_row(place, metric, _same_protocol(found), first.name, draws) for (place, metric), found in places.items()]
    return Comparison(runs=tuple(ordered), rows=tuple(_adjusted(rows)), notes=tuple(_notes(ordered)))


def bootstrap_draws(num_tests: int) -> int:
    """How often groups are drawn anew for each of so many tests."""
    return min(MOST_DRAWS, max(DRAWS, DRAWS_A_TEST * num_tests))


def _baseline(runs: Sequence[Run], wanted: str | Path | None) -> Run:
    if wanted is None:
        return runs[0]
    path = Path(wanted).resolve()
    found = [run for run in runs if run.name == str(wanted)] or [
        run for run in runs if path in (run.folder.resolve(), run.folder.resolve().parent)
    ]
    if len(found) != 1:
        what = f"is {len(found)} of the runs" if found else "is none of the runs"
        raise ValueError(f"the baseline {wanted} {what}; give one of their names: {', '.join(run.name for run in runs)}")
    return found[0]


def _same_protocol(found: dict[str, list[Kept]]) -> dict[str, Kept]:
    """One measurement a run: where it has several of one place, that whose protocol most runs share."""
    shared = Counter(protocol for own in found.values() for protocol in {kept.protocol for kept in own})
    return {name: max(own, key=lambda kept: shared[kept.protocol]) for name, own in found.items()}


def _row(place: Place, metric: str, found: dict[str, Kept], baseline: str, draws: int) -> Row:
    tests, warnings = [], []
    first = found.get(baseline)
    for name, kept in found.items():
        if first is None or name == baseline:
            continue
        if kept.protocol != first.protocol:
            warnings.append(
                f"{name} and {baseline} were measured differently, so nothing is tested: {kept.protocol}; {first.protocol}"
            )
            continue
        if kept.listing and first.listing and kept.listing != first.listing:
            warnings.append(f"the data of {name} and {baseline} differ: samples are paired by their names")
        mine, theirs = _outcomes(kept, metric), _outcomes(first, metric)
        if mine is None or theirs is None:
            if kept.outcomes and first.outcomes:  # else a note says that there are none
                warnings.append(
                    f"{name} and {baseline} are not tested: {metric_name(metric)} is no mean over samples, compare the intervals"
                )
            continue
        test = paired_test(mine, theirs, model=name, baseline=baseline, draws=draws)
        if test is None:
            warnings.append(f"{name} and {baseline} have too few samples in common to be tested")
            continue
        tests.append(test)
        if left := test.only_model + test.only_baseline:
            warnings.append(f"{name} against {baseline}: {left:,} samples that one of them lacks are left out of the test")
    return Row(
        item=next((kept.item for kept in found.values() if kept.item), ""),
        place=place,
        metric=metric,
        figures={name: kept.metrics[metric] for name, kept in found.items()},
        protocols={name: kept.protocol for name, kept in found.items()},
        tests=tuple(tests),
        warnings=tuple(warnings),
    )


def _outcomes(kept: Kept, metric: str) -> Outcomes | None:
    return next((one for one in kept.outcomes if one.metric == metric), None)


def paired_test(mine: Outcomes, theirs: Outcomes, *, model: str, baseline: str, draws: int = DRAWS) -> Test | None:
    """One model against another on the samples that both have; None where fewer than two (groups of them) are in common."""
    places = {key: row for row, key in enumerate(_unique(theirs.keys))}
    pairs = [(row, places[key]) for row, key in enumerate(_unique(mine.keys)) if key in places]
    if not pairs:
        return None
    own, other = (np.array(rows) for rows in zip(*pairs, strict=True))
    first_N, second_N = mine.values[own], theirs.values[other]
    groups = None if mine.groups is None else [mine.groups[row] for row in own]
    if len(set(groups) if groups is not None else own) < 2:
        return None
    difference = paired_bootstrap(first_N, second_N, groups, draws=draws)
    independent = groups is None or len(set(groups)) == len(groups)
    exact = independent and bool(np.isin(first_N, (0, 1)).all() and np.isin(second_N, (0, 1)).all())
    return Test(
        model=model,
        baseline=baseline,
        count=difference.count,
        num_groups=difference.num_groups,
        only_model=len(mine.keys) - len(pairs),
        only_baseline=len(theirs.keys) - len(pairs),
        difference=difference.difference,
        ci95=difference.ci95,
        method="McNemar" if exact else "paired bootstrap",
        p_value=mcnemar(first_N, second_N).p_value if exact else difference.p_value,
    )


def _unique(keys: Sequence[str]) -> list[tuple[str, int]]:
    """Keys with their count so far: the second sample of a name is paired with the second one."""
    seen: Counter[str] = Counter()
    found = []
    for key in keys:
        found.append((key, seen[key]))
        seen[key] += 1
    return found


def _adjusted(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's p values over all their tests."""
    adjusted = iter(holm([test.p_value for row in rows for test in row.tests]))
    return [replace(row, tests=tuple(replace(test, p_holm=next(adjusted)) for test in row.tests)) for row in rows]


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down procedure, in the order given.

    The i-th smallest of m is multiplied by m - i + 1, and is no smaller than the ones before it.
    """
    found = [0.0] * len(p_values)
    highest = 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        found[i] = highest
    return found


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    for package in dict.fromkeys(name for run in runs for kept in run.measured for name in kept.versions):
        used = {kept.versions.get(package, "unknown") for run in runs for kept in run.measured if kept.versions}
        if len(used) > 1:
            notes.append(f"made with different versions of {package}: {', '.join(sorted(used))}")
    bare = [run.name for run in runs if not any(kept.outcomes for kept in run.measured)]
    if bare:
        notes.append(
            f"no sample's outcome is kept of {', '.join(bare)}, so these are not tested: measure them again to have them"
        )
    weights: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        if run.model.get("weights"):
            weights[run.model["weights"]].append(run.name)
    notes += [f"{' and '.join(names)} have the same weights" for names in weights.values() if len(names) > 1]
    return notes
