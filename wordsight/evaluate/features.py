"""Features with labels, as probes and neighbours take them: checks, blocks, classes, a linear classifier and the final scoring.

Features are float arrays or tensors [N, D], on any device, taken as they are; a memory-mapped array is read in blocks and never
held whole. Labels are of any type that can be sorted. Test labels are read by `score` alone, when everything is fitted.

Shape legend: N pictures, n of one block, D feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wordsight.evaluate.metrics import classification_metrics
from wordsight.types import Metric

BLOCK_NUMBERS = 1 << 20  # logits of one block
BLOCK_FEATURES = 1 << 21  # numbers of one block of features: 8 MiB in float32
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """logits = x W + b.

    Attributes:
        weights_DC: float64 [D, C].
        bias_C: float64 [C].
        lam: lambda, the strength of the penalty.
    """

    weights_DC: Tensor
    bias_C: Tensor
    lam: float

    def logits(self, features_ND: Any) -> Tensor:
        """[N, D] -> [N, C], in blocks; float64 for float64 features, else float32."""
        dtype = torch.float64 if str(features_ND.dtype).endswith("float64") else torch.float32
        weights_DC, bias_C, device = self.weights_DC.to(dtype), self.bias_C.to(dtype), self.weights_DC.device
        blocks = feature_blocks(features_ND, len(bias_C), device, dtype)
        return torch.cat([torch.addmm(bias_C, block_nD, weights_DC) for block_nD in blocks])


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What became of the test pictures.

    Attributes:
        metrics: `top1` with Wilson's interval and `mean_per_class`, each with chance.
        hits: bool [N], whether the predicted class is right.
    """

    metrics: dict[str, Metric]
    hits: np.ndarray


def check_features(name: str, features: Any, num_labels: int, width: int | None = None) -> Any:
    """The features as an array or tensor of numbers [N, D], each finite.

    Args:
        name: what errors call them.
        features: [N, D].
        num_labels: how many labels came with them.
        width: the D that they must have; None: any.

    Raises:
        ValueError: another shape, no rows, as many labels as rows, or a value that is not finite.
    """
    if not isinstance(features, Tensor | np.ndarray):
        features = np.asarray(features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be features [N, D] of at least one picture, got the shape {tuple(features.shape)}")
    if width is not None and features.shape[1] != width:
        raise ValueError(f"{name} has {features.shape[1]} features a picture and train {width}: they are not of one model")
    if len(features) != num_labels:
        raise ValueError(f"{name} has {len(features)} pictures and {num_labels} labels")
    at = 0
    for block_nD in feature_blocks(features, features.shape[1], CPU, None):
        finite_n = torch.isfinite(block_nD).all(1)
        if not finite_n.all():
            row = at + int((~finite_n).nonzero()[0, 0])
            raise ValueError(
                f"the features of row {row} of {name} are infinite or undefined (NaN): mend or leave out that picture"
            )
        at += len(block_nD)
    return features


def as_list(labels: Any) -> list[Any]:
    """Labels as a list, whatever holds them."""
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)


def classes_of(labels: Any) -> tuple[Any, ...]:
    """The distinct labels of train, sorted by kind and value.

    Raises:
        ValueError: fewer than two, or a picture without a label.
    """
    given = as_list(labels)
    if unlabelled := [row for row, label in enumerate(given) if label is None or label != label]:
        raise ValueError(f"{len(unlabelled)} pictures of train have no label, first row {unlabelled[0]}: leave them out")
    classes = tuple(sort_labels(set(given)))
    if len(classes) < 2:
        raise ValueError(f"a classifier needs at least 2 classes, train has {f'one: {classes[0]!r}' if classes else 'none'}")
    return classes


def sort_labels(labels: Any) -> list[Any]:
    """By kind and value."""
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def targets_of(name: str, labels: Any, classes: tuple[Any, ...]) -> Tensor:
    """int64 [N], the class of each picture.

    Raises:
        ValueError: a label that is none of the classes.
    """
    places = {label: i for i, label in enumerate(classes)}
    given = as_list(labels)
    unknown = {label for label in given if label not in places}
    if unknown:
        listed = ", ".join(sorted(map(repr, unknown))[:10])
        raise ValueError(f"{name} has {len(unknown)} labels that train lacks: {listed}")
    return torch.tensor([places[label] for label in given])


def score(predicted_N: Tensor | np.ndarray, labels: Any, classes: tuple[Any, ...]) -> Scored:
    """Compare predictions with the test labels, which nothing has read before.

    Args:
        predicted_N: int64 index into `classes`.
        labels: [N] test labels.
        classes: those of train.

    Raises:
        ValueError: a label that train lacks.
    """
    predicted = predicted_N.cpu().numpy() if isinstance(predicted_N, Tensor) else predicted_N
    targets = targets_of("test", labels, classes).numpy()
    hits = predicted == targets
    return Scored(metrics=classification_metrics(targets, hits[:, None], predicted, len(classes), (1,)), hits=hits)


def as_tensor(part: Any, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """Features as a tensor; without a dtype in their own."""
    if not isinstance(part, Tensor):
        part = torch.from_numpy(np.array(part))  # a copy: torch can't hold what must not be written to
    return part.to(device, dtype)


def feature_blocks(part: Any, num_classes: int, device: torch.device, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """Rows [n, D] of a part, in order: few enough that a number for each class of each is not large.

    Nor is a block that is a copy, read from a file or turned into another type; a tensor that is as it is wanted is looked at.
    """
    size = BLOCK_NUMBERS // num_classes
    if not (isinstance(part, Tensor) and part.device == device and dtype in (None, part.dtype)):
        size = min(size, BLOCK_FEATURES // max(1, part.shape[1]))
    size = max(256, size)
    for start in range(0, len(part), size):
        yield as_tensor(part[start : start + size], device, dtype)
