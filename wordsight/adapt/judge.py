"""What a fitted classifier is worth on a test, and the files that say so: predictions, classes, confusions, reliability.

Shape legend: N pictures, C classes, K cut-offs.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wordsight.adapt.protocol import Test, logits_among
from wordsight.evaluate.calibration import Reliability, calibration_error, reliability
from wordsight.evaluate.metrics import classification_metrics, topk_correct, wilson_interval
from wordsight.evaluate.results import write_atomically
from wordsight.types import Metric

NEAREST_WORDS = 5


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A classifier's answers on a test beside the truth.

    Attributes:
        test: what was asked.
        classes: the C class names that there were to choose from, sorted.
        targets: int64 [N], the right class.
        predicted: int64 [N], the class that was named.
        confidence: float64 [N], the probability that it was given.
        metrics: name -> Metric: top1, top5 (of more than 5 classes), mean_per_class, ece.
        reliability: confidence beside accuracy.
    """

    test: Test
    classes: tuple[str, ...]
    targets: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    metrics: dict[str, Metric]
    reliability: Reliability

    @property
    def right(self) -> np.ndarray:
        """bool [N]."""
        return self.predicted == self.targets

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        metrics = {
            name: {"value": one.value, "count": one.count, "ci95": list(one.ci95), "chance": one.chance}
            for name, one in self.metrics.items()
        }
        return {"name": self.test.name, "data": self.test.data, "num_classes": len(self.classes), "metrics": metrics}


def judge(classifier: Any, test: Test, features: Any) -> Verdict:
    """Ask a fitted classifier for each picture of a test; here, and only here, the test's labels are read."""
    classes, logits_NC = logits_among(classifier, test, features)
    place = {name: i for i, name in enumerate(classes)}
    targets = torch.tensor([place[label] for label in test.pictures.labels])
    ks = (1, 5) if len(classes) > 5 else (1,)
    correct_NK = topk_correct(logits_NC, targets, ks).numpy()
    predicted = logits_NC.argmax(1)
    confidence = logits_NC.softmax(1).gather(1, predicted[:, None]).squeeze(1).numpy()
    metrics = classification_metrics(targets.numpy(), correct_NK, predicted.numpy(), len(classes), ks)
    right = (predicted == targets).numpy()
    return Verdict(
        test=test,
        classes=classes,
        targets=targets.numpy(),
        predicted=predicted.numpy(),
        confidence=confidence,
        metrics=metrics | {"ece": calibration_error(right, confidence)[0]},
        reliability=reliability(right, confidence),
    )


# ------------------------------------------------------------------------------------------------------------------ files


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """predictions-TEST.csv, per_class-TEST.csv, confusions-TEST.csv and reliability-TEST.json of a seed's folder."""
    name, classes = verdict.test.name, verdict.classes
    keys = verdict.test.pictures.keys
    rows = zip(keys, verdict.targets.tolist(), verdict.predicted.tolist(), verdict.confidence.tolist(), strict=True)
    _write_csv(
        folder / f"predictions-{name}.csv",
        ("picture", "label", "predicted", "probability"),
        ((key, classes[target], classes[guess], f"{confidence:.6f}") for key, target, guess, confidence in rows),
    )
    _write_csv(folder / f"per_class-{name}.csv", ("class", "count", "right", "accuracy", "low95", "high95"), _per_class(verdict))
    pairs = Counter(zip(verdict.targets.tolist(), verdict.predicted.tolist(), strict=True))
    _write_csv(
        folder / f"confusions-{name}.csv",
        ("label", "predicted", "count"),
        ((classes[target], classes[guess], count) for (target, guess), count in sorted(pairs.items())),
    )
    write_atomically(folder / f"reliability-{name}.json", json.dumps(verdict.reliability.to_json(), indent=1) + "\n")


def write_insight(folder: Path, classifier: Any) -> None:
    """What a method tells of its learning: curve.json (the loss of each epoch) and nearest_words.json (of learned prompts)."""
    curve = getattr(classifier, "loss_curve_", None)
    if curve:
        write_atomically(folder / "curve.json", json.dumps({"loss": [float(value) for value in curve]}) + "\n")
    if hasattr(classifier, "nearest_words"):
        words = classifier.nearest_words(NEAREST_WORDS)
        write_atomically(folder / "nearest_words.json", json.dumps(words, ensure_ascii=False) + "\n")


def _per_class(verdict: Verdict) -> Iterable[tuple[Any, ...]]:
    counts = np.bincount(verdict.targets, minlength=len(verdict.classes))
    rights = np.bincount(verdict.targets, weights=verdict.right, minlength=len(verdict.classes)).astype(int)
    for name, count, right in zip(verdict.classes, counts.tolist(), rights.tolist(), strict=True):
        if count:
            low, high = wilson_interval(right, count)
            yield name, count, right, f"{right / count:.4f}", f"{low:.4f}", f"{high:.4f}"
        else:
            yield name, 0, 0, "", "", ""


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `write_verdict` wrote."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))
