"""Judging the image tower alone: classifiers on its frozen features, learned from train and judged on test.

CLIP's linear probe (arXiv 2103.00020, appendix A.3), ridge, nearest neighbours as in DINO (arXiv 2104.14294) and nearest class
means. What each does with features is in `probe`, `ridge` and `neighbours`; here a model's pictures become features, once for all
of them where they get `Embedded` ones or a cache.

Shape legend: N pictures, D feature width, C classes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wordsight.data import Source
from wordsight.evaluate.embedding import Embedded, embed_source
from wordsight.evaluate.feature_cache import Layer
from wordsight.evaluate.features import Scored, classes_of
from wordsight.evaluate.neighbours import TEMPERATURE, Distance, K, knn, nearest_mean
from wordsight.evaluate.probe import linear_probe
from wordsight.evaluate.results import Finding, Outcomes, fingerprint
from wordsight.evaluate.ridge import ridge_probe
from wordsight.types import Metric

Pictures = Embedded | Source | str | Path


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The pictures of a split that have a label.

    Attributes:
        features_ND: float32.
        labels: N class names.
        keys: N names of pictures.
        listing: hash of the split's pictures.
        how: what a protocol says of how they were read.
        num_unlabelled: pictures that have no label and are left out.
    """

    features_ND: Tensor
    labels: tuple[str, ...]
    keys: tuple[str, ...]
    listing: str
    how: str
    num_unlabelled: int

    def rows(self, rows: Sequence[int]) -> Labelled:
        """Some of them."""
        return replace(
            self,
            features_ND=self.features_ND[list(rows)],
            labels=tuple(self.labels[row] for row in rows),
            keys=tuple(self.keys[row] for row in rows),
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method found on features.

    Attributes:
        scored: test pictures.
        table: rows beside the figures.
        chosen: what was chosen on train or validation, in words; it is no part of the protocol.
        how: what the protocol says beside the settings, after a comma.
    """

    scored: Scored
    table: list[dict[str, Any]]
    chosen: str = ""
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class FeatureEvaluator:
    """What the evaluators on features share.

    Attributes:
        layer: "penultimate", what the projection reads, as in CLIP's probes; or "projected", which is of unit length.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        cache: a folder that keeps features, see `embed_source`.
        progress: show bars.
    """

    layer: Layer = "penultimate"
    batch_size: int = 64
    num_workers: int = 0
    cache: str | Path | None = None
    progress: bool = False

    task = "features"

    def run(self, model: Any, *, train: Pictures, test: Pictures) -> dict[str, Metric]:
        """`top1` and `mean_per_class`: the figures alone."""
        return self.judge(model, train=train, test=test).metrics

    def judge(self, model: Any, *, train: Pictures, test: Pictures) -> Finding:
        """Learn from train, judge on test.

        Args:
            model: an Embedder with that layer; it may be None where both are `Embedded`.
            train, test: a source, what `open_source` takes, or `Embedded` pictures of the evaluator's layer.

        Raises:
            ValueError: no labels, one class alone, a test label that train lacks, features of several vectors a picture, the
                same pictures in train and test; and what the method says of its settings.
        """
        learned, judged = self.labelled(model, train, "train"), self.labelled(model, test, "test")
        check_apart(learned, judged)
        return self.finding(model, learned, judged, self.on_features(learned, judged))

    def on_features(self, train: Labelled, test: Labelled) -> Found:
        """The method itself."""
        raise NotImplementedError

    def settings(self) -> str:
        """The method and its settings, as the protocol says them."""
        raise NotImplementedError

    def labelled(self, model: Any, pictures: Pictures, name: str) -> Labelled:
        """A split's features and labels."""
        return labelled(self.embedded(model, pictures, name), name)

    def embedded(self, model: Any, pictures: Pictures, name: str) -> Embedded:
        """A split's pictures at this layer."""
        if isinstance(pictures, Embedded):
            if pictures.layer != self.layer:
                raise ValueError(
                    f"{name} holds {pictures.layer} features and {type(self).__name__} is asked for {self.layer} ones: embed "
                    f"with layer={self.layer!r}, or set layer={pictures.layer!r}"
                )
            return pictures
        return embed_source(
            model,
            pictures,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            progress=self.progress,
            cache=self.cache,
            layer=self.layer,
        )

    def finding(self, model: Any, train: Labelled, test: Labelled, found: Found, *others: Labelled) -> Finding:
        """The figures with protocol, fingerprint and outcomes."""
        count, num_classes = len(train.labels), len(set(train.labels))
        protocol = f"{self.settings()}{found.how}, {self.layer} features, {num_classes} classes, {count} to learn from{test.how}"
        listing = " ".join(split.listing for split in (train, test, *others))
        return Finding(
            task=self.task,
            metrics=found.scored.metrics,
            protocol=protocol,
            fingerprint=fingerprint(model, (), listing, protocol),
            outcomes=(Outcomes(metric="top1", keys=test.keys, values=found.scored.hits.astype(np.float64)),),
            table=found.table,
            notes=tuple(note for note in (found.chosen, *_unlabelled(train, "train"), *_unlabelled(test, "test")) if note),
        )


@dataclass(frozen=True, kw_only=True)
class LinearProbe(FeatureEvaluator):
    """CLIP's linear probe: logistic regression, lambda tuned on validation, fitted again on train and validation.

    Attributes:
        lambdas: those to try; None: the paper's search among 96, see `probe.search`.
        val_share: without a validation split, this share of each class of train is held out to tune on (at least one picture of
            a class that has two). The final fit is on all of train either way.
    """

    lambdas: Sequence[float] | None = None
    val_share: float = 0.2

    task = "linear_probe"

    def run(self, model: Any, *, train: Pictures, test: Pictures, val: Pictures | None = None) -> dict[str, Metric]:
        """`top1` and `mean_per_class`: the figures alone."""
        return self.judge(model, train=train, test=test, val=val).metrics

    def judge(self, model: Any, *, train: Pictures, test: Pictures, val: Pictures | None = None) -> Finding:
        """As `FeatureEvaluator.judge`, with a validation split."""
        learned, judged = self.labelled(model, train, "train"), self.labelled(model, test, "test")
        check_apart(learned, judged)
        if val is None:
            return self.finding(model, learned, judged, self.on_features(learned, judged))
        tuned = self.labelled(model, val, "val")
        found = self._probe(learned, tuned, judged, ", a validation split")
        return self.finding(model, learned, judged, found, tuned)

    def on_features(self, train: Labelled, test: Labelled) -> Found:
        """With validation pictures held out of train."""
        classes_of(train.labels)
        held = held_out(train, self.val_share)
        if not held:
            raise ValueError("every class of train has one picture, so none can be held out to tune lambda on: give val")
        kept = sorted(set(range(len(train.labels))) - set(held))
        return self._probe(train.rows(kept), train.rows(held), test, f", {self.val_share:g} of train held out for it")

    def settings(self) -> str:
        """The method and its settings."""
        tried = "96 steps of 1e-6 to 1e6" if self.lambdas is None else f"{', '.join(f'{lam:g}' for lam in self.lambdas)}"
        return f"linear probe, lambda of {tried} by validation"

    def _probe(self, train: Labelled, val: Labelled, test: Labelled, how: str) -> Found:
        found = linear_probe(
            train.features_ND,
            train.labels,
            val.features_ND,
            val.labels,
            test.features_ND,
            test.labels,
            lambdas=self.lambdas,
        )
        table = [{"lambda": lam, "validation accuracy": accuracy} for lam, accuracy in found.trace.items()]
        return Found(scored=found.scored, table=table, chosen=f"lambda {found.best_lambda:.4g} by validation", how=how)


@dataclass(frozen=True, kw_only=True)
class Ridge(FeatureEvaluator):
    """Ridge classification in closed form, lambda by exact leave-one-out on train.

    Attributes:
        lambdas: those to try; None: 37 around the mean eigenvalue, see `ridge.ridge_probe`.
    """

    lambdas: Sequence[float] | None = None

    task = "ridge"

    def on_features(self, train: Labelled, test: Labelled) -> Found:
        """The method itself."""
        found = ridge_probe(train.features_ND, train.labels, test.features_ND, test.labels, lambdas=self.lambdas)
        table = [
            {"lambda": lam, "leave-one-out accuracy": accuracy, "mean squared error": found.errors[lam]}
            for lam, accuracy in found.trace.items()
        ]
        return Found(scored=found.scored, table=table, chosen=f"lambda {found.best_lambda:.4g} by leave-one-out")

    def settings(self) -> str:
        """The method and its settings."""
        tried = (
            "37 steps around the mean eigenvalue" if self.lambdas is None else f"{', '.join(f'{lam:g}' for lam in self.lambdas)}"
        )
        return f"ridge, lambda of {tried} by leave-one-out"


@dataclass(frozen=True, kw_only=True)
class KNN(FeatureEvaluator):
    """k nearest neighbours by cosine.

    Attributes:
        k: neighbours that vote.
        weighted: by exp(similarity / temperature), as in DINO; else the majority.
        temperature: of the weights.
    """

    k: int = K
    weighted: bool = True
    temperature: float = TEMPERATURE

    task = "knn"

    def on_features(self, train: Labelled, test: Labelled) -> Found:
        """The method itself."""
        scored = knn(
            train.features_ND,
            train.labels,
            test.features_ND,
            test.labels,
            k=self.k,
            weighted=self.weighted,
            temperature=self.temperature,
        )
        return Found(scored=scored, table=[])

    def settings(self) -> str:
        """The method and its settings."""
        votes = f"weighted by exp(cosine / {self.temperature:g})" if self.weighted else "majority"
        return f"{self.k} nearest neighbours, {votes}"


@dataclass(frozen=True, kw_only=True)
class NearestMean(FeatureEvaluator):
    """The class whose mean is nearest.

    Attributes:
        distance: "cosine" or "euclidean", see `neighbours.nearest_mean`.
    """

    distance: Distance = "cosine"

    task = "nearest_mean"

    def on_features(self, train: Labelled, test: Labelled) -> Found:
        """The method itself."""
        scored = nearest_mean(train.features_ND, train.labels, test.features_ND, test.labels, distance=self.distance)
        return Found(scored=scored, table=[])

    def settings(self) -> str:
        """The method and its settings."""
        return f"nearest class mean, {self.distance}"


def labelled(embedded: Embedded, name: str) -> Labelled:
    """The pictures of a split that have a label.

    Raises:
        ValueError: none has, or the model gives several vectors a picture.
    """
    if embedded.images_ND.ndim != 2:
        raise ValueError(
            f"this model gives {embedded.images_ND.shape[1]} vectors a picture at its {embedded.layer} layer, and classifiers on "
            "features take one: use layer='penultimate'"
        )
    rows = [row for row, label in enumerate(embedded.labels) if label is not None]
    if not rows:
        raise ValueError(f"no picture of {name} has a label: use class folders or a table with a label column")
    whole = len(rows) == len(embedded)
    return Labelled(
        features_ND=embedded.images_ND if whole else embedded.images_ND[rows],
        labels=tuple(embedded.labels[row] or "" for row in rows),
        keys=tuple(embedded.keys[row] for row in rows),
        listing=embedded.listing,
        how=embedded.how,
        num_unlabelled=len(embedded) - len(rows),
    )


def check_apart(train: Labelled, test: Labelled) -> None:
    """Raise a ValueError where test is train."""
    if train.listing == test.listing:
        raise ValueError("train and test hold the same pictures: a probe would be judged by what it learned from")


def held_out(train: Labelled, share: float) -> list[int]:
    """Rows of a share of each class, at least one of a class that has two; by the pictures' names, not by their order.

    Raises:
        ValueError: a share that does not lie between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of train to hold out lies between 0 and 1, got {share}")
    ranked: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    for row, (key, label) in enumerate(zip(train.keys, train.labels, strict=True)):
        ranked[label].append((hashlib.sha256(f"{label}\0{key}".encode(errors="surrogateescape")).digest(), row))
    held = [
        row for drawn in ranked.values() for _, row in sorted(drawn)[: min(len(drawn) - 1, max(1, round(share * len(drawn))))]
    ]
    return sorted(held)


def _unlabelled(split: Labelled, name: str) -> tuple[str, ...]:
    count = split.num_unlabelled
    return (f"{count} pictures of {name} have no label and are left out",) if count else ()
