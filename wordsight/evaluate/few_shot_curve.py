"""At how many labelled pictures a class does a linear probe pass the zero-shot classifier? CLIP (arXiv 2103.00020, figures 6, 7).

Shots are drawn by the rules of `data.few_shot` (K pictures a class to learn from, min(K, 4) to tune lambda on, which are not
learned from), once for each seed. The crossing is where the mean over seeds first comes to the zero-shot line, interpolated in
the logarithm of the shots; its interval are the crossings of the upper and the lower edge of the mean's interval over seeds
(Student's t), so that an end may be "never".

Shape legend: N pictures, D feature width, C classes, S numbers of shots, R seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wordsight.data.few_shot import LabelledSet, Splits, few_shot
from wordsight.evaluate.embedding import Embedded, embed_source
from wordsight.evaluate.features import check_features, classes_of, score, targets_of
from wordsight.evaluate.metrics import proportion, wilson_interval
from wordsight.evaluate.probe import LogisticRegression, accuracy, search
from wordsight.evaluate.probe import Path as LambdaPath
from wordsight.evaluate.probing import FeatureEvaluator, Labelled, Pictures, check_apart
from wordsight.evaluate.results import Finding, Outcomes, fingerprint
from wordsight.evaluate.zero_shot import ZeroShot
from wordsight.types import Metric

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Where a curve over shots first comes to a level.

    Attributes:
        shots: how many; None: never up to `last`. Equal to `first`: there or before.
        low, high: its 95% interval over seeds; None: never up to `last`.
        first, last: the fewest and most shots that were tried.
    """

    shots: float | None
    low: float | None
    high: float | None
    first: int
    last: int

    def describe(self) -> str:
        """In words."""
        if self.low is None:
            return f"the probe does not pass zero-shot up to {self.last} shots"
        found, low, high = (self._told(value) for value in (self.shots, self.low, self.high))
        return f"the probe passes zero-shot at {found} shots (95% over seeds: {low} to {high})"

    def _told(self, value: float | None) -> str:
        if value is None:
            return f"never up to {self.last}"
        return f"{value:.3g}" if value > self.first else f"{self.first} or fewer"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy by shots.

    Attributes:
        shots: S numbers, rising.
        seeds: R.
        accuracies_SR: float64, on test.
        hits_SN: float64, for each number of shots the share of seeds whose probe is right on a test picture.
        points: S figures: the mean over seeds; the interval holds both what other shots and what other test pictures would have
            given (Student's t over seeds and Wilson's, their squares added).
        lambdas_SR: what was chosen on the validation pictures.
        zero_shot: the zero-shot figure on the same pictures, where it was given.
        crossing: where the curve passes it.
    """

    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracies_SR: np.ndarray
    hits_SN: np.ndarray
    points: tuple[Metric, ...]
    lambdas_SR: np.ndarray
    zero_shot: Metric | None = None
    crossing: Crossing | None = None


def few_shot_curve(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    val: Any = None,
    val_labels: Any = None,
    train_keys: Sequence[str] | None = None,
    val_keys: Sequence[str] | None = None,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    lambdas: Sequence[float] | None = None,
    zero_shot_hits: np.ndarray | None = None,
) -> Curve:
    """Linear probes on K pictures a class, for each K and seed.

    Args:
        train, val, test: float [N, D], taken as they are. Without val the pictures to tune on are what the shots left of train.
        train_labels, val_labels, test_labels: [N].
        train_keys, val_keys: names of the pictures, by which shots are drawn; None: their row numbers.
        shots: numbers of pictures a class.
        seeds: of the draws, two or more.
        lambdas: those to try; None: the paper's search, see `probe.search`.
        zero_shot_hits: bool [N], whether the zero-shot classifier is right on each test picture.

    Raises:
        ValueError: what `few_shot` and `linear_probe` say of such data; fewer than two seeds; classes with too few pictures.
    """
    shots, seeds = tuple(sorted(set(shots))), tuple(dict.fromkeys(seeds))
    if len(seeds) < 2 or not shots:
        raise ValueError(f"a curve needs one number of shots or more and two seeds or more, got {list(shots)} and {list(seeds)}")
    train = check_features("train", train, len(train_labels))
    test = check_features("test", test, len(test_labels), train.shape[1])
    if zero_shot_hits is not None and np.shape(zero_shot_hits) != (len(test_labels),):
        raise ValueError(f"{len(test_labels)} test pictures and zero-shot hits of shape {np.shape(zero_shot_hits)}")
    classes = classes_of(train_labels)
    sets = {"train": _rows(train_labels, train_keys, classes, "train")}
    features = {"train": train, "val": train}
    if val is not None:
        features["val"] = check_features("val", val, len(val_labels), train.shape[1])
        sets["val"] = _rows(val_labels, val_keys, classes, "val")
    splits = Splits(name="these features", classes=tuple(map(str, classes)), **sets)  # type: ignore[arg-type]
    predicted, chosen = {}, {}
    for k in shots:
        for seed in seeds:
            drawn = few_shot(splits, k, seed=seed)
            predicted[k, seed], chosen[k, seed] = _fit(drawn, features, test, lambdas)
    hits_SRN = np.array([[score(predicted[k, seed], test_labels, classes).hits for seed in seeds] for k in shots])
    accuracies_SR = hits_SRN.mean(2)
    return _curve(shots, seeds, hits_SRN, accuracies_SR, chosen, len(classes), zero_shot_hits)


def crossing(shots: Sequence[int], accuracies_SR: np.ndarray, level: float) -> Crossing:
    """Where the mean over seeds first comes to `level`, and the interval of that place over seeds.

    Args:
        shots: S numbers, rising.
        accuracies_SR: float, R seeds, two or more.
        level: of the zero-shot classifier.
    """
    means_S, halves_S = _over_seeds(np.asarray(accuracies_SR, dtype=np.float64))
    found, low, high = (_first_at(shots, curve_S, level) for curve_S in (means_S, means_S + halves_S, means_S - halves_S))
    return Crossing(shots=found, low=low, high=high, first=shots[0], last=shots[-1])


def _first_at(shots: Sequence[int], curve_S: np.ndarray, level: float) -> float | None:
    """Log-linear interpolation of the first place that comes to the level; None: never."""
    if curve_S[0] >= level:
        return float(shots[0])
    for (left, low), (right, high) in pairwise(zip(shots, curve_S.tolist(), strict=True)):
        if high >= level:
            return float(left * (right / left) ** ((level - low) / (high - low)))
    return None


def _over_seeds(accuracies_SR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and half widths of their 95% intervals."""
    from scipy.special import stdtrit

    num_seeds = accuracies_SR.shape[1]
    errors_S = accuracies_SR.std(1, ddof=1) / math.sqrt(num_seeds)
    return accuracies_SR.mean(1), float(stdtrit(num_seeds - 1, 0.975)) * errors_S


def _curve(
    shots: tuple[int, ...],
    seeds: tuple[int, ...],
    hits_SRN: np.ndarray,
    accuracies_SR: np.ndarray,
    chosen: dict[tuple[int, int], float],
    num_classes: int,
    zero_shot_hits: np.ndarray | None,
) -> Curve:
    count = hits_SRN.shape[2]
    points = []
    for mean, half in zip(*(part.tolist() for part in _over_seeds(accuracies_SR)), strict=True):
        low, high = wilson_interval(mean * count, count)
        bounds = max(0.0, mean - math.hypot(half, mean - low)), min(1.0, mean + math.hypot(half, high - mean))
        points.append(Metric(mean, count, bounds, "fraction", 1 / num_classes))
    zero_shot = None if zero_shot_hits is None else proportion(np.asarray(zero_shot_hits, dtype=bool), 1 / num_classes)
    return Curve(
        shots=shots,
        seeds=seeds,
        accuracies_SR=accuracies_SR,
        hits_SN=hits_SRN.mean(1),
        points=tuple(points),
        lambdas_SR=np.array([[chosen[k, seed] for seed in seeds] for k in shots]),
        zero_shot=zero_shot,
        crossing=None if zero_shot is None else crossing(shots, accuracies_SR, zero_shot.value),
    )


def _rows(labels: Any, keys: Sequence[str] | None, classes: tuple[Any, ...], name: str) -> LabelledSet:
    """A labelled set whose samples are row numbers: `few_shot` draws from it, by class and key, and reads none."""
    targets = targets_of(name, labels, classes).tolist()
    rows: Any = range(len(targets))
    return LabelledSet(
        source=rows,
        keys=tuple(map(str, rows)) if keys is None else tuple(keys),
        labels=tuple(str(classes[target]) for target in targets),
        classes=tuple(map(str, classes)),
    )


def _fit(drawn: Splits, features: dict[str, Any], test: Any, lambdas: Sequence[float] | None) -> tuple[np.ndarray, float]:
    """What the probe of these shots says of the test pictures, and the lambda that it chose."""
    assert drawn.train is not None
    assert drawn.val is not None
    rows: dict[str, Any] = {
        part: [given.source[i] for i in range(len(given))] for part, given in (("train", drawn.train), ("val", drawn.val))
    }
    targets = {part: torch.tensor(given.targets()) for part, given in drawn.parts().items()}
    path = LambdaPath(LogisticRegression([features["train"][rows["train"]]], targets["train"], len(drawn.classes)))
    val = features["val"][rows["val"]]
    best_lambda, _ = search(lambda lam: accuracy(path(lam), val, targets["val"]), lambdas)
    solution = path.problem.solve(best_lambda, path(best_lambda))
    return solution.logits(test).argmax(1).cpu().numpy(), best_lambda


@dataclass(frozen=True, kw_only=True)
class FewShotCurve(FeatureEvaluator):
    """Linear probes on 1, 2, 4, 8 and 16 pictures a class, with the zero-shot line beside them.

    Attributes:
        shots, seeds, lambdas: see `few_shot_curve`.
        prompts: of the zero-shot classifier, see `prompt_templates`.
    """

    shots: Sequence[int] = SHOTS
    seeds: Sequence[int] = SEEDS
    lambdas: Sequence[float] | None = None
    prompts: str | Path | Sequence[str] = "simple"

    task = "few_shot_curve"

    @property
    def headline(self) -> str:
        """The figure that stands for all: the probe on the most shots."""
        return f"top1_{max(self.shots)}_shot"

    def judge(self, model: Any, *, train: Pictures, test: Pictures, val: Pictures | None = None) -> Finding:
        """Draw, learn and judge; `finding_charts` draws what it finds.

        Args:
            model: an Embedder.
            train, test: see `FeatureEvaluator.judge`.
            val: where the pictures to tune lambda on come from; None: what the shots left of train.
        """
        pictures = self.embedded(model, test, "test")
        learned, judged = self.labelled(model, train, "train"), self.labelled(model, pictures, "test")
        check_apart(learned, judged)
        tuned = None if val is None else self.labelled(model, val, "val")
        zero_shot = self._zero_shot(model, pictures, classes_of(learned.labels))
        curve = few_shot_curve(
            learned.features_ND,
            learned.labels,
            judged.features_ND,
            judged.labels,
            val=None if tuned is None else tuned.features_ND,
            val_labels=None if tuned is None else tuned.labels,
            train_keys=learned.keys,
            val_keys=None if tuned is None else tuned.keys,
            shots=self.shots,
            seeds=self.seeds,
            lambdas=self.lambdas,
            zero_shot_hits=zero_shot.hits,
        )
        return self._finding(model, learned, judged, tuned, zero_shot, curve)

    def settings(self) -> str:
        """The method and its settings."""
        tried = "96 steps of 1e-6 to 1e6" if self.lambdas is None else f"{', '.join(f'{lam:g}' for lam in self.lambdas)}"
        return (
            f"linear probe on {', '.join(map(str, self.shots))} shots a class, seeds {', '.join(map(str, self.seeds))}, "
            f"lambda of {tried} by min(shots, 4) validation pictures a class"
        )

    def _zero_shot(self, model: Any, test: Embedded, classes: tuple[str, ...]) -> Any:
        """What the zero-shot evaluator says of the same pictures."""
        if test.layer != "projected":
            test = embed_source(
                model,
                test.source,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                progress=self.progress,
                cache=self.cache,
                reduced_decode=test.reduced_decode,
            )
        return ZeroShot(classes=classes, prompts=self.prompts, ks=(1,)).judge(model, test)

    def _finding(
        self, model: Any, train: Labelled, test: Labelled, val: Labelled | None, zero_shot: Any, curve: Curve
    ) -> Finding:
        assert curve.crossing is not None
        assert curve.zero_shot is not None
        where = "of a validation split" if val is not None else "that the shots left of train"
        protocol = (
            f"{self.settings()} {where}, {self.layer} features, {len(set(train.labels))} classes{test.how}; beside it "
            f"{zero_shot.protocol}"
        )
        metrics = {"top1_zero_shot": curve.zero_shot}
        metrics |= {f"top1_{k}_shot": point for k, point in zip(curve.shots, curve.points, strict=True)}
        found = curve.crossing
        if found.shots is not None and found.low is not None and found.high is not None:
            metrics["shots_to_pass_zero_shot"] = Metric(found.shots, len(curve.seeds), (found.low, found.high), "shots")
        hits = {"top1_zero_shot": zero_shot.hits} | {
            f"top1_{k}_shot": hits_N for k, hits_N in zip(curve.shots, curve.hits_SN, strict=True)
        }
        listing = " ".join(split.listing for split in (train, test, val) if split is not None)
        return Finding(
            task=self.task,
            metrics=metrics,
            protocol=protocol,
            fingerprint=fingerprint(model, (), f"{listing} {zero_shot.fingerprint}", protocol),
            outcomes=tuple(
                Outcomes(metric=name, keys=test.keys, values=values.astype(np.float64)) for name, values in hits.items()
            ),
            table=table(curve),
            notes=(found.describe(), "intervals: over seeds (Student's t) and test pictures (Wilson), squares added"),
        )


def table(curve: Curve) -> list[dict[str, Any]]:
    """A row for each number of shots."""
    return [
        {"shots": k, "top1": point.value, "low": point.ci95[0], "high": point.ci95[1]}
        | {f"seed {seed}": float(curve.accuracies_SR[i, j]) for j, seed in enumerate(curve.seeds)}
        for i, (k, point) in enumerate(zip(curve.shots, curve.points, strict=True))
    ]
