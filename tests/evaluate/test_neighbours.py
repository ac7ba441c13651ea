"""Nearest neighbours and means beside their definitions and scikit-learn's: ties, blocks, lengths, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from tests.evaluate.sealed import SealedLabels
from wordsight.evaluate import neighbours
from wordsight.evaluate.neighbours import knn, nearest, nearest_mean, vote


def clusters(num: int, width: int, num_classes: int, seed: int, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes; with `levels` of whole numbers, so that many features are equal."""
    centres = np.random.default_rng(3).normal(size=(num_classes, width))
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), draw.integers(0, num_classes, num - num_classes)])
    features = centres[labels] + 1.5 * draw.normal(size=(num, width))
    if levels:
        features = np.round(features * levels)
        features[(features == 0).all(1)] = 1
    return features.astype(np.float32), labels


def by_definition(
    train: np.ndarray, targets: np.ndarray, test: np.ndarray, k: int, weight: Any
) -> tuple[list[list[int]], list[int]]:
    """Neighbours and votes of each picture alone, with the module's rules for ties."""
    rows, predicted = [], []
    unit = train.astype(np.float64) / np.linalg.norm(train.astype(np.float64), axis=1, keepdims=True)
    for query in test.astype(np.float64):
        similarities = np.round((unit @ (query / np.linalg.norm(query))) * 2**30) / 2**30
        order = sorted(range(len(train)), key=lambda row: (-similarities[row], row))[:k]
        votes: dict[int, float] = {}
        for row in order:
            votes[targets[row]] = votes.get(targets[row], 0.0) + weight(float(similarities[row]), float(similarities[order[0]]))
        rows.append(order)
        predicted.append(max(votes, key=lambda label: votes[label]))  # the first of equals, and they come nearest first
    return rows, predicted


@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 7, 60])
def test_neighbours_and_votes_are_the_definitions_ties_included(levels: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, targets = clusters(90, 3 if levels else 6, 4, seed=1, levels=levels)
    test, _ = clusters(40, 3 if levels else 6, 4, seed=2, levels=levels)
    for weighted, weight in ((False, lambda near, first: 1.0), (True, lambda near, first: np.exp((near - first) / 0.07))):
        rows, predicted = by_definition(train, targets, test, k, weight)
        for queries, bank in ((1024, 8192), (7, 13), (40, 4)):
            monkeypatch.setattr(neighbours, "QUERIES_AT_ONCE", queries)
            monkeypatch.setattr(neighbours, "BANK_AT_ONCE", bank)
            found = nearest(train, test, k)
            assert found.rows_QK.tolist() == rows
            assert vote(found, targets, 4, weighted=weighted).tolist() == predicted
    if levels:
        first = nearest(train, test, 60).similarities_QK
        assert (first[:, 1:] == first[:, :-1]).mean() > 0.2, "there were ties"


def test_it_is_scikit_learns() -> None:
    train, targets = clusters(200, 8, 5, seed=1)
    test, labels = clusters(150, 8, 5, seed=2)
    names = np.array(["fir", "oak", "elm", "ash", "yew"])
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = theirs.fit(train.astype(np.float64), names[targets]).predict(test.astype(np.float64))
    scored = knn(train, names[targets], test, names[labels])
    assert scored.hits.tolist() == (expected == names[labels]).tolist()
    assert scored.metrics["top1"].value == pytest.approx(np.mean(expected == names[labels]))
    assert scored.metrics["top1"].chance == 1 / 5
    found = nearest(train, test, 50)
    for k in (5, 20, 50):
        plain = KNeighborsClassifier(k, metric="cosine").fit(train.astype(np.float64), targets)
        theirs_votes = np.sort(plain.predict_proba(test.astype(np.float64)), axis=1)
        clear = theirs_votes[:, -1] > theirs_votes[:, -2] + 1e-9  # they order equal votes by label
        agreed = vote(found, targets, 5, k=k, weighted=False) == plain.predict(test.astype(np.float64))
        assert agreed[clear].all()


def test_weights_are_dinos() -> None:
    """The published computation: one-hot labels of the neighbours times exp(similarity / T), summed."""
    train, targets = (torch.tensor(part) for part in clusters(100, 6, 4, seed=1))
    test = torch.tensor(clusters(60, 6, 4, seed=2)[0])
    unit = [torch.nn.functional.normalize(part.double(), dim=1) for part in (train, test)]
    similarities, rows = (unit[1] @ unit[0].T).topk(10)
    one_hot = torch.nn.functional.one_hot(targets[rows], 4)
    expected = (one_hot * (similarities / 0.07).exp()[:, :, None]).sum(1).argmax(1)
    assert vote(nearest(train, test, 10), targets.numpy(), 4).tolist() == expected.tolist()


def test_ties_go_to_the_earlier_row_and_the_nearest_class() -> None:
    train = np.array([[1.0, 0], [0, 1], [0, 1], [1, 0], [1, 1]])
    found = nearest(train, np.array([[0, 2.0], [3, 0]]), 5)
    assert found.rows_QK.tolist() == [[1, 2, 4, 0, 3], [0, 3, 4, 1, 2]]
    # two votes each, and the nearest neighbour is of class 2
    assert vote(found, np.array([1, 2, 1, 2, 0]), 3, k=2, weighted=False).tolist() == [2, 1]
    assert vote(found, np.array([0, 2, 1, 2, 1]), 3, k=5, weighted=False)[0] == 2


def test_length_says_nothing_however_small_or_large() -> None:
    train, targets = clusters(50, 5, 3, seed=1)
    test, labels = clusters(30, 5, 3, seed=2)
    lengths = np.random.default_rng(0).uniform(0.1, 10, (50, 1))
    expected = knn(train, targets, test, labels, k=5).hits
    for scale in (1e-25, 1.0, 1e25):
        scaled = train.astype(np.float64) * lengths * scale
        assert (knn(scaled, targets, test * 7, labels, k=5).hits == expected).mean() > 0.95  # float32 features were rounded
    tiny = (train * 1e-30).astype(np.float32)
    assert np.isfinite(nearest(tiny, test, 3).similarities_QK).all()
    cold = vote(nearest(train, test, 5), targets, 3, temperature=1e-9)
    assert cold.tolist() == vote(nearest(train, test, 1), targets, 3).tolist(), "no weight overflows"


def test_no_more_than_a_block_of_similarities_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda keys, *given, **how: (sizes.append(keys.numel()), topk(keys, *given, **how))[1]
    )
    monkeypatch.setattr(neighbours, "BANK_AT_ONCE", 2048)
    train, _ = clusters(5000, 2, 3, seed=1)
    nearest(train, train[:3000], 3)
    assert max(sizes) == neighbours.QUERIES_AT_ONCE * 2048
    assert sum(sizes) > 5000 * 3000


def test_memory_mapped_features_are_read_in_blocks(tmp_path: Any) -> None:
    train, targets = clusters(70, 5, 3, seed=1)
    np.save(tmp_path / "train.npy", train)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    for judge in (knn, nearest_mean):
        assert judge(mapped, targets, mapped, targets).hits.tolist() == judge(train, targets, train, targets).hits.tolist()


def test_nearest_mean_is_scikit_learns_and_the_cosines() -> None:
    train, targets = clusters(120, 6, 4, seed=1)
    test, labels = clusters(90, 6, 4, seed=2)
    theirs = NearestCentroid().fit(train.astype(np.float64), targets).predict(test.astype(np.float64))
    assert nearest_mean(train, targets, test, labels, distance="euclidean").hits.tolist() == (theirs == labels).tolist()
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    means = np.stack([unit[targets == label].mean(0) for label in range(4)])
    cosines = test @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert nearest_mean(train, targets, test, labels).hits.tolist() == (cosines.argmax(1) == labels).tolist()


@pytest.mark.parametrize("judge", [knn, nearest_mean])
def test_test_labels_are_read_by_the_final_scoring_alone(judge: Any) -> None:
    train, targets = clusters(50, 5, 3, seed=1)
    sealed = SealedLabels(targets.tolist())
    judge(train, targets, train, sealed)
    assert sealed.was_read


def spoiled(value: float) -> np.ndarray:
    features = clusters(20, 4, 2, seed=0)[0]
    features[7] = value
    return features


@pytest.mark.parametrize("judge", [knn, nearest_mean])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_labels": [*"ab" * 9, "c", "d"]}, "test has 2 labels that train lacks: 'c', 'd'"),
        ({"train_labels": ["a"] * 20}, "at least 2 classes, train has one: 'a'"),
        ({"train_labels": ["a"] * 19}, "train has 20 pictures and 19 labels"),
        ({"train_labels": [*"ab" * 9, "a", None]}, "1 pictures of train have no label, first row 19"),
        ({"train": spoiled(np.nan)}, "row 7 of train are infinite or undefined"),
        ({"test": spoiled(np.inf)}, "row 7 of test are infinite or undefined"),
        ({"train": spoiled(0.0)}, "row 7 of train are all 0"),
        ({"test": spoiled(0.0)}, "row 7 of test are all 0"),
        ({"test": np.zeros((20, 5))}, "test has 5 features a picture and train 4"),
        ({"test": np.zeros((0, 4)), "test_labels": []}, "at least one picture"),
    ],
)
def test_bad_input_is_named(judge: Any, change: dict[str, Any], message: str) -> None:
    features, labels = clusters(20, 4, 2, seed=0)[0], [*"ab" * 10]
    given: dict[str, Any] = {"train": features, "train_labels": labels, "test": features, "test_labels": labels}
    with pytest.raises(ValueError, match=message):
        judge(**(given | change))


def test_bad_settings_are_named() -> None:
    features, labels = clusters(20, 4, 2, seed=0)
    for settings, message in (({"k": 21}, "20 pictures of train, got 21"), ({"k": 0}, "got 0"), ({"temperature": 0}, "above 0")):
        with pytest.raises(ValueError, match=message):
            knn(features, labels, features, labels, **({"k": 5} | settings))
    with pytest.raises(ValueError, match="'l1'"):
        nearest_mean(features, labels, features, labels, distance="l1")  # type: ignore[arg-type]
    opposite = np.array([[1.0, 0], [-1, 0], [0, 1], [0, 1]])
    with pytest.raises(ValueError, match="class 0 sum to 0"):
        nearest_mean(opposite, [0, 0, 1, 1], opposite, [0, 0, 1, 1])
