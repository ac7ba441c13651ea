"""Zero-shot accuracy under ImageNet's natural shifts, beside that on ImageNet's own pictures of the same classes.

A set of some of ImageNet's classes (A, R, ObjectNet) is classified among these alone, and so are the ImageNet pictures that it is
compared with, as in CLIP's figure 13 (arXiv 2103.00020) and in Taori et al. (arXiv 2007.00644). ObjectNet's classes go by its own
names, of which some are several of ImageNet's. ImageNet-O has no class of ImageNet's: it is judged by the area under precision
and recall of telling it from ImageNet's pictures by 1 - the largest softmax among the 200 classes (arXiv 1907.07174).

Shape legend: N pictures, C classes, D embedding width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wordsight.data.few_shot import LabelledSet
from wordsight.data.layouts import published_name
from wordsight.data.shifts import (
    ANOMALIES,
    SHIFTS,
    Shift,
    imagenet_names,
    imagenet_needs,
    open_imagenet_val,
    open_shift,
    shift_needs,
)
from wordsight.evaluate.corruption_error import Corruptions
from wordsight.evaluate.effective_robustness import LEAST_MODELS, effective_robustness, fit_baseline, read_points
from wordsight.evaluate.embedding import embed_source, require_embedder
from wordsight.evaluate.groups import Geography
from wordsight.evaluate.metrics import BOOTSTRAP_SEED, proportion
from wordsight.evaluate.prompt_sets import prompt_set
from wordsight.evaluate.prompts import class_embeddings, fill, prompt_templates
from wordsight.evaluate.results import Finding, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.evaluate.vendor_shift import VendorShift
from wordsight.types import Metric

BASELINE = "natural_shifts.csv"  # other models' accuracies, in the root of a suite
Cache = str | os.PathLike[str] | None


@dataclass(frozen=True, kw_only=True)
class NaturalShifts:
    """Accuracy on shifted sets, on ImageNet's pictures of the same classes, their averages, and effective robustness.

    Attributes:
        root: the folder of all data sets, see `wordsight.data.shifts`.
        sets: of `shifts.SHIFTS` and `shifts.ANOMALIES`.
        prompts: see `prompts.prompt_templates`; published figures are of ImageNet's 80.
        baseline: a table of models' accuracies, see `effective_robustness.read_points`; None: no effective robustness.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        progress: show bars.
    """

    root: str | Path
    sets: Sequence[str] = SHIFTS
    prompts: str | Path | Sequence[str] = "imagenet80"
    baseline: str | Path | None = None
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise ValueError(f"sets are one or more different ones of {', '.join((*SHIFTS, ANOMALIES))}, got {list(self.sets)}")
        for name in self.sets:
            shift_needs(name, self.root)  # refuses an unknown one

    @property
    def needs(self) -> tuple[tuple[Path, str], ...]:
        """(path, what to put there) of all that must lie under `root`."""
        table = () if self.baseline is None else ((Path(self.baseline), "accuracies of other models"),)
        return (*imagenet_needs(self.root), *(need for name in self.sets for need in shift_needs(name, self.root)), *table)

    def run(self, model: Any) -> dict[str, Metric]:
        """The figures alone; see `judge`."""
        return self.judge(model).metrics

    def judge(self, model: Any, *, cache: Cache = None) -> Finding:
        """For each set `<set>_top1` and `<set>_in_top1`, with a baseline `<set>_effective_robustness`; `average_top1` and
        `average_in_top1` over the sets; of ImageNet-O `imagenet_o_aupr`.

        Args:
            model: an Embedder.
            cache: a folder that keeps features, see `embed_source`; ImageNet's pictures are then encoded once for all sets.

        Raises:
            FileNotFoundError: parts of a set are missing; says what belongs where.
            ValueError: a baseline with fewer than three models of a set.
        """
        require_embedder(model)
        templates = prompt_templates(self.prompts)
        names, texts = _names(self.root)
        found = _Found(metrics={}, outcomes=[], table=[], listings=[], probes=[])
        for name in self.sets:
            shift = open_shift(name, self.root, names)
            classes_CD = class_embeddings(model, shift.pictures.classes, templates, names=texts, progress=self.progress)
            found.probes.extend(
                fill(templates[0], text) for label in shift.pictures.classes for text in texts.get(label, (label,))
            )
            if name == ANOMALIES:
                self._anomalies(model, shift, classes_CD, found, cache)
            else:
                self._accuracies(model, shift, classes_CD, found, cache)
        _average(found.metrics, [name for name in self.sets if name != ANOMALIES])
        notes = self._robustness(found)
        named = self.prompts if isinstance(self.prompts, str | Path) else "given"
        protocol = (
            f"zero-shot, sets {', '.join(self.sets)} among their own classes, beside ImageNet val's of these classes, prompts "
            f"{named} ({len(templates)})" + (f", baseline {Path(self.baseline).name}" if self.baseline is not None else "")
        )
        return Finding(
            task="natural_shifts",
            metrics=found.metrics,
            protocol=protocol,
            fingerprint=fingerprint(model, found.probes, " ".join(found.listings), (protocol, templates)),
            outcomes=tuple(found.outcomes),
            table=found.table,
            notes=notes,
        )

    def _accuracies(self, model: Any, shift: Shift, classes_CD: Tensor, found: _Found, cache: Cache) -> None:
        matched = open_imagenet_val(self.root, shift.ids)
        row: dict[str, Any] = {"set": shift.title, "classes": len(shift.pictures.classes)}
        for metric, pictures in ((f"{shift.name}_top1", shift.pictures), (f"{shift.name}_in_top1", matched)):
            scores_NC, targets_N, keys = self._scores(model, pictures, classes_CD, found, cache)
            right_N = (scores_NC.argmax(1) == targets_N).numpy()
            found.metrics[metric] = proportion(right_N, 1 / len(pictures.classes))
            found.outcomes.append(Outcomes(metric=metric, keys=keys, values=right_N.astype(float)))
            side = "shift" if pictures is shift.pictures else "in"
            row |= {f"count {side}": len(right_N), f"top1 {side}": float(right_N.mean())}
        found.table.append(row)

    def _anomalies(self, model: Any, shift: Shift, classes_CD: Tensor, found: _Found, cache: Cache) -> None:
        matched = open_imagenet_val(self.root, shift.ids)
        scale = getattr(model, "log_scale", None)
        factor = float(scale.detach().exp()) if isinstance(scale, Tensor) else 1.0
        doubts = []
        for pictures in (shift.pictures, matched):
            scores_NC, _, _ = self._scores(model, pictures, classes_CD, found, cache)
            doubts.append(1 - torch.softmax(factor * scores_NC.double(), 1).amax(1).numpy())
        found.metrics[f"{shift.name}_aupr"] = area_under_precision(doubts[0], doubts[1])
        found.table.append(
            {"set": shift.title, "classes": len(shift.pictures.classes)}
            | {"count shift": len(doubts[0]), "top1 shift": None, "count in": len(doubts[1]), "top1 in": None}
        )

    def _scores(
        self, model: Any, pictures: LabelledSet, classes_CD: Tensor, found: _Found, cache: Cache
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """[N, C], the right classes [N] and the keys of the pictures that can be read."""
        embedded = embed_source(
            model,
            pictures.source,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            progress=self.progress,
            cache=cache,
        )
        found.listings.append(embedded.listing)
        place = {name: i for i, name in enumerate(pictures.classes)}
        targets_N = torch.tensor([place[pictures.labels[position]] for position in embedded.positions])
        return pair_scores(model)(embedded.images_ND, classes_CD), targets_N, embedded.keys

    def _robustness(self, found: _Found) -> tuple[str, ...]:
        """Put effective robustness into the figures; what a reader should know."""
        if self.baseline is None:
            return (f"no baseline of other models is given ({BASELINE} in the root), so there is no effective robustness",)
        notes = []
        points = read_points(self.baseline)
        for row, name in zip(found.table, self.sets, strict=True):
            own = [point for point in points if point.shift == name]
            row["baseline"] = [[point.model, point.accuracy_in, point.accuracy_shift] for point in own]  # to be drawn
            if not own:
                notes += [] if name == ANOMALIES else [f"{name}: no model of the baseline was measured on it"]
                continue
            if len(own) < LEAST_MODELS:
                raise ValueError(f"{self.baseline} has {len(own)} models of {name}; a line needs {LEAST_MODELS} or more")
            line = fit_baseline(own)
            inside, shifted = found.metrics[f"{name}_in_top1"], found.metrics[f"{name}_top1"]
            found.metrics[f"{name}_effective_robustness"] = effective_robustness(
                line,
                accuracy_in=inside.value,
                count_in=inside.count,
                accuracy_shift=shifted.value,
                count_shift=shifted.count,
            )
            notes.append(
                f"{name}: baseline of {len(own)} models, slope {line.slope:.3f} and intercept {line.intercept:.3f} in logits, "
                f"R2 {line.explained:.3f}"
            )
        return tuple(notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What is found of one set after the other."""

    metrics: dict[str, Metric]
    outcomes: list[Outcomes]
    table: list[dict[str, Any]]
    listings: list[str]
    probes: list[str]


def _names(root: str | Path) -> tuple[dict[str, str], Mapping[str, Sequence[str]]]:
    """ImageNet's class names by WordNet id, and label -> what stands in prompts: of the user's `classnames.txt`, else CLIP's."""
    try:
        names = imagenet_names(root)
    except FileNotFoundError:
        known = prompt_set("imagenet")
        return dict(zip(known.ids, known.classes, strict=True)), known.names
    return names, {name: (published_name(name),) for name in names.values() if published_name(name) != name}


def _average(metrics: dict[str, Metric], sets: Sequence[str]) -> None:
    """Plain means over the sets, their intervals by squares of the parts' (Newcombe 1998): the sets' pictures are independent.

    The ImageNet pictures of two sets may be the same: the interval of their average takes them as fully dependent.
    """
    if len(sets) < 2:
        return
    for suffix, independent in (("top1", True), ("in_top1", False)):
        own = [metrics[f"{name}_{suffix}"] for name in sets]
        value = sum(one.value for one in own) / len(own)
        below, above = ([abs(one.value - one.ci95[side]) for one in own] for side in (0, 1))
        join = (lambda parts: math.sqrt(sum(part**2 for part in parts))) if independent else sum
        interval = value - join(below) / len(own), value + join(above) / len(own)
        chance = sum(one.chance or 0.0 for one in own) / len(own)
        metrics[f"average_{suffix}"] = Metric(value, sum(one.count for one in own), interval, "fraction", chance)


def area_under_precision(anomalies: np.ndarray, ordinary: np.ndarray, *, draws: int = 200) -> Metric:
    """Average precision of finding anomalies by their score, with an interval of both sets drawn anew; chance is their share.

    Args:
        anomalies, ordinary: scores, higher for what looks more like an anomaly; equal ones are one threshold.
        draws: of the bootstrap.
    """
    from sklearn.metrics import average_precision_score

    truth = np.repeat([1, 0], [len(anomalies), len(ordinary)])
    value = float(average_precision_score(truth, np.concatenate([anomalies, ordinary])))
    draw = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [
        average_precision_score(truth, np.concatenate([draw.choice(one, len(one)) for one in (anomalies, ordinary)]))
        for _ in range(draws)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Metric(value, len(truth), (min(float(low), value), max(float(high), value)), "fraction", len(anomalies) / len(truth))


# -------------------------------------------------------------------------------------------------------- items of a suite


@dataclass(frozen=True, kw_only=True)
class RobustnessItem:
    """One measurement of the robustness suite, ready to run.

    Attributes:
        name: of its row.
        evaluator: `NaturalShifts`, `Corruptions`, `VendorShift` or `Geography`.
        data: what it is measured on, where the evaluator does not say so itself.
        needs: (path, what to put there) of all that must exist.
    """

    name: str
    evaluator: Any
    data: str | None = None
    needs: tuple[tuple[Path, str], ...] = ()

    def judge(self, model: Any, *, batch_size: int = 64, progress: bool = False, cache: Cache = None) -> Finding:
        """What the evaluator finds.

        Args:
            model: an Embedder.
            batch_size: pictures encoded at once.
            progress: show bars.
            cache: a folder that keeps features; corrupted pictures are not kept.
        """
        evaluator = replace(self.evaluator, batch_size=batch_size, progress=progress)
        if self.data is not None:
            return evaluator.judge(model, self.data)
        return evaluator.judge(model, cache=cache)


def robustness_items(root: str | Path | None) -> list[RobustnessItem]:
    """The robustness suite: corruptions and unseen drawings of the embedded pictures, ImageNet's natural shifts, geography.

    All models are asked by the same prompts, not by their own, so that they can be compared.

    Args:
        root: the folder of all data sets; None: only what needs none. Where `BASELINE` lies in it, natural shifts are held
            against it.
    """
    items = [
        RobustnessItem(
            name="corruptions-sample",
            evaluator=Corruptions(prompts="name", severities=(1, 3, 5), size_px=64, max_pictures=200),  # the pictures' own size
            data="sample:test-twemoji-seen",
        ),
        RobustnessItem(name="vendor-shift", evaluator=VendorShift(prompts="name")),
    ]
    if root is not None:
        table = Path(root) / BASELINE
        baseline = table if table.is_file() else None
        for name in (*SHIFTS, ANOMALIES):
            shifts = NaturalShifts(root=root, sets=(name,), baseline=baseline)
            items.append(RobustnessItem(name=name.replace("_", "-"), evaluator=shifts, needs=shifts.needs))
        together = NaturalShifts(root=root, baseline=baseline)
        items.append(RobustnessItem(name="natural-shifts", evaluator=together, needs=together.needs))
        for name in ("geode", "dollar_street"):
            geography = Geography(name=name, root=root, prompts="simple")
            items.append(RobustnessItem(name=name.replace("_", "-"), evaluator=geography, needs=geography.needs))
    return items
