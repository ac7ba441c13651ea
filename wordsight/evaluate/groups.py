"""Accuracy by groups of pictures (regions, incomes): each group's, the worst one, the gap from best to worst.

The gap is a maximum less a minimum of measured shares, so it is above 0 even where all groups are alike, the more the smaller and
the more numerous they are. Therefore beside it stand

- its `chance`: the mean gap where the right answers are dealt out to the groups at random (sizes as they are);
- its interval: the largest of the simultaneous 95% intervals of all differences between two groups (bounds from draws of each
  group's answers, the largest deviation of all pairs in units of its standard error), so that picking the largest difference is
  paid for. Percentiles of resampled gaps, also less their bias, held the truth in 13 of 100 simulations of six equal groups;
  this one in 94, and in 98 and more where groups differ: it is wide at its upper end;
- `_p_value`: the share of random deals whose gap is as large. It asks whether the groups differ at all.

The worst group's own interval is Wilson's, as if it had been chosen before it was measured: its value tends to be too low.

Shape legend: N pictures, G groups, P pairs of groups, R draws, C classes, D embedding width.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wordsight.data.geography import GroupedSet, geography_needs, open_dollar_street, open_geode, read_grouped
from wordsight.evaluate.embedding import embed_source, require_embedder
from wordsight.evaluate.metrics import BOOTSTRAP_SEED, proportion, recall_chance, wilson_interval
from wordsight.evaluate.prompts import class_embeddings, fill, own_prompts, prompt_templates
from wordsight.evaluate.results import Finding, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.types import Metric

DRAWS = 2000
SCORES_IN_BLOCK = 1 << 23


@dataclass(frozen=True, kw_only=True)
class GroupAccuracy:
    """Zero-shot accuracy by group, where the data name groups.

    A picture is right where one of its labels is among the k best classes. DataComp (arXiv 2304.14108) counts Dollar Street so
    with k = 5 by quartile of income, and GeoDE with k = 1 by region.

    Attributes:
        k: the cut-off.
        by: what to group by, of the data's `groups`; None: all.
        least_count: groups of fewer pictures are shown, but are neither worst nor best.
        classes: what to choose from; None: the data's.
        prompts: see `prompts.prompt_templates`; None: those that the model was trained for.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        progress: show bars.
    """

    k: int = 1
    by: Sequence[str] | None = None
    least_count: int = 10
    classes: Sequence[str] | None = None
    prompts: str | Path | Sequence[str] | None = None
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = False

    def run(self, model: Any, data: GroupedSet) -> dict[str, Metric]:
        """The figures alone; see `judge`."""
        return self.judge(model, data).metrics

    def judge(self, model: Any, data: GroupedSet, *, cache: str | os.PathLike[str] | None = None) -> Finding:
        """`top<k>`, and for each grouping `<by>_worst`, `<by>_gap` and `<by>_gap_p_value`; a table of groups.

        Args:
            model: an Embedder.
            data: see `wordsight.data.geography`.
            cache: a folder that keeps features, see `embed_source`.

        Raises:
            ValueError: an unknown grouping, labels that are not among the classes, k below 1.
        """
        require_embedder(model)
        if self.k < 1:
            raise ValueError(f"k is 1 or more, got {self.k}")
        groupings = tuple(self.by) if self.by is not None else tuple(data.groups)
        if unknown := [by for by in groupings if by not in data.groups]:
            raise ValueError(f"{data.name} has no groups by {', '.join(unknown)}; it has {', '.join(data.groups)}")
        classes = list(self.classes) if self.classes is not None else list(data.classes)
        place = {name: i for i, name in enumerate(classes)}
        if strange := sorted({label for one in data.labels for label in one} - set(place)):
            raise ValueError(f"{len(strange)} labels are not among the {len(classes)} classes, e.g. {', '.join(strange[:10])}")
        prompts = self.prompts if self.prompts is not None else own_prompts(model)
        templates = prompt_templates(prompts)
        embedded = embed_source(
            model, data.source, batch_size=self.batch_size, num_workers=self.num_workers, progress=self.progress, cache=cache
        )
        classes_CD = class_embeddings(model, classes, templates, progress=self.progress)
        right_sets = [{place[label] for label in data.labels[position]} for position in embedded.positions]
        right_N = self._right(model, embedded.images_ND, classes_CD, right_sets)
        name = f"top{self.k}"
        metrics = {name: proportion(right_N, _chance(right_sets, len(classes), self.k))}
        table: list[dict[str, Any]] = []
        notes = list(data.notes)
        for by in groupings:
            groups = [data.groups[by][position] for position in embedded.positions]
            found = group_figures(right_N, groups, least_count=self.least_count)
            metrics |= {f"{by}_{figure}": metric for figure, metric in found.metrics.items()}
            table += [{"by": by} | row for row in found.table]
            notes += [f"{by}: {note}" for note in found.notes]
        named = prompts if isinstance(prompts, str | Path) else "given"
        protocol = (
            f"zero-shot {name}, any of a picture's labels is right, {len(classes)} classes, prompts {named} ({len(templates)}), "
            f"by {', '.join(groupings)}, groups of {self.least_count} or more"
        )
        probes = [fill(templates[0], label) for label in classes] + [fill(template, classes[0]) for template in templates]
        grouped = [data.groups[by] for by in groupings]
        return Finding(
            task="groups",
            metrics=metrics,
            protocol=protocol,
            fingerprint=fingerprint(model, probes, embedded.listing, (protocol, classes, templates, data.labels, grouped)),
            outcomes=(Outcomes(metric=name, keys=embedded.keys, values=right_N.astype(float)),),
            table=table,
            notes=tuple(notes),
        )

    def _right(self, model: Any, images_ND: torch.Tensor, classes_CD: torch.Tensor, right_sets: list[set[int]]) -> np.ndarray:
        scores = pair_scores(model)
        step = max(1, SCORES_IN_BLOCK // len(classes_CD))
        best: list[list[int]] = []
        for start in range(0, len(images_ND), step):
            block = scores(images_ND[start : start + step], classes_CD)
            best += block.topk(min(self.k, len(classes_CD)), dim=1).indices.tolist()
        return np.array([not right.isdisjoint(guesses) for right, guesses in zip(right_sets, best, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Geography:
    """GeoDE by region, or Dollar Street by income, region and country, with the published cut-offs.

    Attributes:
        name: "geode" (k = 1) or "dollar_street" (k = 5).
        root: the folder of all data sets, see `wordsight.data.geography`.
        prompts, batch_size, num_workers, progress: of `GroupAccuracy`.
    """

    name: str
    root: str | Path
    prompts: str | Path | Sequence[str] | None = None
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = False

    @property
    def needs(self) -> tuple[tuple[Path, str], ...]:
        """(path, what to put there) of all that must lie under `root`."""
        return geography_needs(self.name, self.root)

    def judge(self, model: Any, *, cache: str | os.PathLike[str] | None = None) -> Finding:
        """What `GroupAccuracy` finds."""
        data = open_geode(self.root) if self.name == "geode" else open_dollar_street(self.root)
        return GroupAccuracy(
            k=1 if self.name == "geode" else 5,
            prompts=self.prompts,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            progress=self.progress,
        ).judge(model, data, cache=cache)


@dataclass(frozen=True, kw_only=True)
class GroupTable:
    """A table of one's own whose columns name groups, as an item of a suite.

    Attributes:
        path: see `wordsight.data.geography.read_grouped`.
        group_columns: what to group by.
        accuracy: how it is judged.
    """

    path: str | Path
    group_columns: Sequence[str]
    accuracy: GroupAccuracy = GroupAccuracy()

    def judge(self, model: Any, *, cache: str | os.PathLike[str] | None = None) -> Finding:
        """What `GroupAccuracy` finds."""
        return self.accuracy.judge(model, read_grouped(self.path, group_columns=self.group_columns), cache=cache)


def _chance(right_sets: list[set[int]], num_classes: int, k: int) -> float:
    """How often one of k different guesses at random is among a picture's labels."""
    return recall_chance(num_classes, np.array([len(right) for right in right_sets]), k)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFigures:
    """What `group_figures` finds.

    Attributes:
        metrics: "worst", and with two groups or more "gap" and "gap_p_value".
        table: one row a group, the worst first: its name, count, accuracy and interval, and whether it is compared.
        notes: what a reader should know.
    """

    metrics: dict[str, Metric]
    table: list[dict[str, Any]]
    notes: tuple[str, ...]


def group_figures(
    right_N: np.ndarray, groups: Sequence[str | None], *, least_count: int = 1, draws: int = DRAWS, seed: int = BOOTSTRAP_SEED
) -> GroupFigures:
    """The figures of one grouping; see the module for what they mean.

    Args:
        right_N: bool [N].
        groups: [N], None where it is not known.
        least_count: groups of fewer pictures are in the table alone.
        draws: R, of bootstrap and random deals.
        seed: of the draws.

    Raises:
        ValueError: lengths that differ, no picture of a known group, or no group of `least_count` pictures.
    """
    if len(right_N) != len(groups):
        raise ValueError(f"{len(right_N)} answers and {len(groups)} groups: each picture has one of each")
    counts = Counter(group for group in groups if group is not None)
    if not counts:
        raise ValueError("no picture is of a known group")
    rights = Counter(group for group, right in zip(groups, right_N.tolist(), strict=True) if right)
    ordered = sorted(counts, key=lambda group: (rights[group] / counts[group], group))
    compared = [group for group in ordered if counts[group] >= least_count]
    if not compared:
        raise ValueError(f"no group has {least_count} pictures; the largest is {counts.most_common(1)[0]}: lower least_count")
    table = [
        {
            "group": group,
            "count": counts[group],
            "accuracy": rights[group] / counts[group],
            "ci95": list(wilson_interval(rights[group], counts[group])),
            "compared": counts[group] >= least_count,
        }
        for group in ordered
    ]
    worst, best = compared[0], compared[-1]
    metrics = {"worst": Metric(rights[worst] / counts[worst], counts[worst], wilson_interval(rights[worst], counts[worst]))}
    notes = [f"worst is {worst}, best is {best} ({rights[best] / counts[best]:.1%})"]
    if len(compared) > 1:
        sizes_G = np.array([counts[group] for group in compared])
        hits_G = np.array([rights[group] for group in compared])
        metrics |= _gap(hits_G, sizes_G, draws, np.random.default_rng(seed))
    else:
        notes = [f"{worst} is the only group to compare: there is no gap"]
    if unknown := sum(group is None for group in groups):
        notes.append(f"{unknown} pictures are of no known group")
    if small := len(counts) - len(compared):
        notes.append(f"{small} groups of fewer than {least_count} pictures are in the table alone")
    return GroupFigures(metrics=metrics, table=table, notes=tuple(notes))


def _gap(hits_G: np.ndarray, sizes_G: np.ndarray, draws: int, draw: np.random.Generator) -> dict[str, Metric]:
    share_G, total = hits_G / sizes_G, int(sizes_G.sum())
    value = float(np.ptp(share_G))
    dealt_R = np.ptp(draw.multivariate_hypergeometric(sizes_G, int(hits_G.sum()), draws) / sizes_G, axis=1)
    likely_G = (hits_G + 1) / (sizes_G + 2)  # groups that are all right or all wrong have a spread too (Agresti and Coull 1998)
    variance_G = likely_G * (1 - likely_G) / sizes_G
    one, other = np.triu_indices(len(sizes_G), 1)
    spread_P = np.sqrt(variance_G[one] + variance_G[other])
    off_RG = draw.binomial(sizes_G, likely_G, (draws, len(sizes_G))) / sizes_G - likely_G
    reach = float(np.quantile([np.max(np.abs(off_G[one] - off_G[other]) / spread_P) for off_G in off_RG], 0.95))
    difference_P = np.abs(share_G[one] - share_G[other])
    low, high = float((difference_P - reach * spread_P).max()), float((difference_P + reach * spread_P).max())
    bounds = max(0.0, min(low, value)), min(1.0, max(high, value))
    as_large = int((dealt_R >= value - 1e-12).sum())
    p_value = (as_large + 1) / (draws + 1)
    p_low, p_high = wilson_interval(as_large, draws)
    return {
        "gap": Metric(value, total, bounds, "fraction", float(dealt_R.mean())),
        "gap_p_value": Metric(p_value, total, (min(p_low, p_value), max(p_high, p_value)), "p value", 0.5),
    }
