"""Classification without training: k nearest neighbours, weighted as in DINO (arXiv 2104.14294) or plain, and nearest class mean.

Neighbours are exact and found in blocks, so no matrix of all pictures against all is ever held. Similarity is the cosine:
features are brought to unit length, whatever length they have; one of length 0 has no direction and is an error. Cosines are
summed in float64 and rounded to 2^-30 (1e-9), so that equal features are equally near wherever they lie in a block.

Ties. Of training pictures that are equally near, the one that comes first is nearer. Of classes with equal votes, the one with
the nearest neighbour wins. Of class means that are equally near, the first class in sorted order.

Shape legend: Q test pictures, N training pictures, q and n of one block, D feature width, K neighbours, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from wordsight.evaluate.features import (
    CPU,
    Scored,
    check_features,
    classes_of,
    feature_blocks,
    score,
    targets_of,
)

K = 20
TEMPERATURE = 0.07  # of exp(similarity / T), DINO's
QUERIES_AT_ONCE = 1024
BANK_AT_ONCE = 8192
VOTES_AT_ONCE = 1 << 22
LAST_ROW = (1 << 32) - 1
STEPS = 1 << 30  # similarities are told apart by 1 / STEPS
Distance = Literal["cosine", "euclidean"]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The nearest training pictures of each test picture, nearest first.

    Attributes:
        rows_QK: int64, rows of train.
        similarities_QK: float64, cosines to 1e-9.
    """

    rows_QK: np.ndarray
    similarities_QK: np.ndarray


def knn(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    k: int = K,
    weighted: bool = True,
    temperature: float = TEMPERATURE,
) -> Scored:
    """The classes that the k nearest training pictures vote for.

    Args:
        train, test: float [N, D] and [Q, D], of any length.
        train_labels, test_labels: [N] and [Q].
        k: neighbours that vote; DINO reports 10, 20, 100 and 200.
        weighted: a vote weighs exp(similarity / temperature), as in DINO; else 1, the majority.
        temperature: of the weights.

    Raises:
        ValueError: features of other shapes, not finite or of length 0, no rows, one class alone, a test label that train
            lacks, k larger than train, a temperature that is not above 0.
    """
    train, test = _checked(train, train_labels, test, test_labels)
    classes = classes_of(train_labels)
    targets_N = targets_of("train", train_labels, classes).numpy()
    found = nearest(train, test, k)
    return score(vote(found, targets_N, len(classes), weighted=weighted, temperature=temperature), test_labels, classes)


def nearest_mean(train: Any, train_labels: Any, test: Any, test_labels: Any, *, distance: Distance = "cosine") -> Scored:
    """The class whose mean is nearest.

    Args:
        train, test: float [N, D] and [Q, D].
        train_labels, test_labels: [N] and [Q].
        distance: "cosine": of features at unit length to the direction of their class's mean; "euclidean": of features as they
            are to their mean (Mensink et al. 2013).

    Raises:
        ValueError: as for `knn`; another distance; for the cosine a class whose unit features sum to 0.
    """
    if distance not in get_args(Distance):
        raise ValueError(f"distance is one of {', '.join(get_args(Distance))}, got {distance!r}")
    train, test = _checked(train, train_labels, test, test_labels)
    classes = classes_of(train_labels)
    targets_N = targets_of("train", train_labels, classes)
    unit = distance == "cosine"
    means_CD = _class_means(train, targets_N, classes, unit=unit)
    offsets_C = torch.zeros(len(classes)) if unit else means_CD.square().sum(1).cpu() / 2
    predicted, at = [], 0
    for block_qD in feature_blocks(test, len(classes), means_CD.device, torch.float64):
        queries_qD = _unit(block_qD, "test", at) if unit else block_qD
        # numpy's argmax is the first of equals
        predicted.append(((queries_qD @ means_CD.T).cpu() - offsets_C).numpy().argmax(1))
        at += len(block_qD)
    return score(np.concatenate(predicted), test_labels, classes)


def nearest(train: Any, test: Any, k: int = K) -> Neighbours:
    """The k nearest training pictures of each test picture.

    Args:
        train: float [N, D], finite.
        test: float [Q, D], finite.
        k: 1 to N.

    Raises:
        ValueError: another k, or a feature of length 0.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k lies between 1 and the {len(train)} pictures of train, got {k}")
    device = train.device if isinstance(train, Tensor) else CPU
    rows, similarities, at = [], [], 0
    for chunk in range(0, len(test), QUERIES_AT_ONCE):
        queries_qD = torch.cat(list(feature_blocks(test[chunk : chunk + QUERIES_AT_ONCE], 1, device, torch.float64)))
        best_qK = _nearest_keys(train, _unit(queries_qD, "test", at), k, device)
        at += len(queries_qD)
        rows.append((LAST_ROW - (best_qK & LAST_ROW)).cpu().numpy())
        similarities.append((best_qK >> 32).cpu().numpy() / STEPS)
    return Neighbours(rows_QK=np.concatenate(rows), similarities_QK=np.concatenate(similarities))


def vote(
    found: Neighbours,
    targets_N: np.ndarray,
    num_classes: int,
    *,
    k: int | None = None,
    weighted: bool = True,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """int64 [Q], the class with the most votes of the k nearest.

    Args:
        found: K neighbours of each picture.
        targets_N: int64, the classes of train.
        num_classes: C.
        k: how many of them vote; None: all.
        weighted, temperature: see `knn`.
    """
    k = found.rows_QK.shape[1] if k is None else k
    if not 1 <= k <= found.rows_QK.shape[1]:
        raise ValueError(f"k lies between 1 and the {found.rows_QK.shape[1]} neighbours that were found, got {k}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    classes_QK = targets_N[found.rows_QK[:, :k]]
    similarities_QK = found.similarities_QK[:, :k]
    # relative to the nearest, which changes no vote: a small temperature would overflow
    weights_QK = np.exp((similarities_QK - similarities_QK[:, :1]) / temperature) if weighted else np.ones(classes_QK.shape)
    predicted = []
    step = max(1, VOTES_AT_ONCE // num_classes)
    for start in range(0, len(classes_QK), step):
        classes_qK, weights_qK = classes_QK[start : start + step], weights_QK[start : start + step]
        places_qK = classes_qK + num_classes * np.arange(len(classes_qK))[:, None]
        votes = np.bincount(places_qK.ravel(), weights=weights_qK.ravel(), minlength=num_classes * len(classes_qK))
        own_qK = votes[places_qK]
        first_q1 = (own_qK == own_qK.max(1, keepdims=True)).argmax(1)[:, None]  # the nearest of the classes with most votes
        predicted.append(np.take_along_axis(classes_qK, first_q1, 1)[:, 0])
    return np.concatenate(predicted)


def _checked(train: Any, train_labels: Any, test: Any, test_labels: Any) -> tuple[Any, Any]:
    train = check_features("train", train, len(train_labels))
    return train, check_features("test", test, len(test_labels), train.shape[1])


def _nearest_keys(train: Any, queries_qD: Tensor, k: int, device: torch.device) -> Tensor:
    """int64 [q, K], falling: the similarity in the upper 32 bits, in the lower ones what is larger for an earlier row.

    No two are equal, so that the order is `topk`'s to find but not to choose.
    """
    best_qK: Tensor | None = None
    at = 0
    for chunk in range(0, len(train), BANK_AT_ONCE):
        bank_nD = torch.cat(list(feature_blocks(train[chunk : chunk + BANK_AT_ONCE], 1, device, torch.float64)))
        keys_qn = (queries_qD @ _unit(bank_nD, "train", at).T).mul_(STEPS).round_().long() << 32
        keys_qn += LAST_ROW - torch.arange(at, at + len(bank_nD), device=device)
        at += len(bank_nD)
        found_qK = keys_qn.topk(min(k, len(bank_nD)), dim=1).values
        best_qK = found_qK if best_qK is None else torch.cat([best_qK, found_qK], 1)
        best_qK = best_qK.topk(min(k, best_qK.shape[1]), dim=1).values
    assert best_qK is not None
    return best_qK


def _unit(block_nD: Tensor, name: str, at: int) -> Tensor:
    """float64 rows of unit length; `at` is the first one's row, for errors."""
    # scaled first: squares of very long or short features are out of range
    scaled_nD = block_nD / block_nD.abs().amax(1, keepdim=True)
    lost_n = ~torch.isfinite(scaled_nD).all(1)
    if lost_n.any():
        row = at + int(lost_n.nonzero()[0, 0])
        raise ValueError(f"the features of row {row} of {name} are all 0: they have no direction, leave out that picture")
    return scaled_nD / scaled_nD.norm(dim=1, keepdim=True)


def _class_means(train: Any, targets_N: Tensor, classes: tuple[Any, ...], *, unit: bool) -> Tensor:
    """float64 [C, D]; of unit length where the features are."""
    device = train.device if isinstance(train, Tensor) else CPU
    targets_N = targets_N.to(device)
    sums_CD = torch.zeros(len(classes), train.shape[1], dtype=torch.float64, device=device)
    at = 0
    for block_nD in feature_blocks(train, len(classes), device, torch.float64):
        rows_nD = _unit(block_nD, "train", at) if unit else block_nD
        sums_CD.index_add_(0, targets_N[at : at + len(block_nD)], rows_nD)
        at += len(block_nD)
    if not unit:
        return sums_CD / targets_N.bincount(minlength=len(classes))[:, None]
    lengths_C1 = sums_CD.norm(dim=1, keepdim=True)
    if (lengths_C1 < 1e-9).any():
        lost = classes[int((lengths_C1 < 1e-9).nonzero()[0, 0])]
        raise ValueError(f"the features of class {lost!r} sum to 0: its mean has no direction, use distance='euclidean'")
    return sums_CD / lengths_C1
