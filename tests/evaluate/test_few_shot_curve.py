"""Few-shot probes beside the same by scikit-learn, and where they pass zero-shot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression as Reference

from tests.evaluate.sealed import SealedLabels
from wordsight.data.few_shot import LabelledSet, Splits, few_shot
from wordsight.evaluate.few_shot_curve import Crossing, crossing, few_shot_curve, table
from wordsight.evaluate.metrics import wilson_interval


def clusters(num: int, width: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes of at least `num` pictures."""
    centres = np.random.default_rng(3).normal(size=(num_classes, width))
    draw = np.random.default_rng(seed)
    labels = np.tile(np.arange(num_classes), num // num_classes)
    return (centres[labels] + 1.5 * draw.normal(size=(len(labels), width))).astype(np.float32), labels


def test_probes_are_fitted_to_the_shots_and_tuned_on_the_validation_shots() -> None:
    train, targets = clusters(60, 10, 3, seed=1)
    test, labels = clusters(300, 10, 3, seed=2)
    names = np.array(["fir", "oak", "elm"])
    keys = [f"tree {row}" for row in range(60)]
    lambdas = [0.1, 3.0, 100.0]
    curve = few_shot_curve(
        train, names[targets], test, names[labels], train_keys=keys, shots=(4, 1), seeds=(1, 2), lambdas=lambdas
    )
    assert curve.shots == (1, 4)
    # the same by hand, from what `few_shot` draws of pictures with these keys and labels
    rows: Any = range(60)
    classes = ("elm", "fir", "oak")
    whole = LabelledSet(source=rows, keys=tuple(keys), labels=tuple(names[targets].tolist()), classes=classes)
    for i, k in enumerate(curve.shots):
        for j, seed in enumerate(curve.seeds):
            drawn = few_shot(Splits(name="trees", classes=classes, train=whole), k, seed=seed)
            assert drawn.train is not None
            assert drawn.val is not None
            shot = [keys.index(key) for key in drawn.train.keys]
            held = [keys.index(key) for key in drawn.val.keys]
            assert len(shot) == len(held) == 3 * k
            assert not set(shot) & set(held)
            theirs = {lam: Reference(C=1 / lam, max_iter=10_000, tol=1e-8).fit(train[shot], targets[shot]) for lam in lambdas}
            best = max(lambdas, key=lambda lam: (theirs[lam].score(train[held], targets[held]), lam))
            assert curve.lambdas_SR[i, j] == best
            assert curve.accuracies_SR[i, j] == pytest.approx(theirs[best].score(test, labels), abs=0.004)
    assert curve.hits_SN.mean(1) == pytest.approx(curve.accuracies_SR.mean(1))
    assert curve.crossing is None
    point = curve.points[1]
    assert (point.count, point.chance) == (300, 1 / 3)
    spread = stats.t.ppf(0.975, 1) * curve.accuracies_SR[1].std(ddof=1) / np.sqrt(2)
    low = wilson_interval(point.value * 300, 300)[0]
    assert point.ci95[0] == pytest.approx(max(0, point.value - np.hypot(spread, point.value - low)))


def test_a_validation_split_is_where_pictures_to_tune_on_come_from() -> None:
    train, targets = clusters(6, 10, 3, seed=1)  # two pictures a class: no more than the shots
    val, val_labels = clusters(30, 10, 3, seed=4)
    with pytest.raises(ValueError, match="fewer than 2 pictures in what the shots left"):
        few_shot_curve(train, targets, train, targets, shots=(2,), lambdas=[1.0])
    curve = few_shot_curve(train, targets, val, val_labels, val=val, val_labels=val_labels, shots=(2,), lambdas=[0.01, 1.0, 1e3])
    assert curve.accuracies_SR.shape == (1, 3)


def test_crossing_is_interpolated_in_the_logarithm() -> None:
    shots = (1, 2, 4, 8)
    seeds = np.array([[0.2, 0.2], [0.3, 0.3], [0.5, 0.5], [0.6, 0.6]])
    found = crossing(shots, seeds, 0.4)
    assert found == Crossing(shots=pytest.approx(2**1.5), low=pytest.approx(2**1.5), high=pytest.approx(2**1.5), first=1, last=8)
    assert crossing(shots, seeds, 0.3).shots == pytest.approx(2.0)
    never = crossing(shots, seeds, 0.61)
    assert (never.shots, never.low, never.high) == (None, None, None)
    assert never.describe() == "the probe does not pass zero-shot up to 8 shots"
    assert crossing(shots, seeds, 0.1).describe().startswith("the probe passes zero-shot at 1 or fewer shots")


def test_crossings_interval_is_that_of_the_curves_edges() -> None:
    seeds = np.array([[0.20, 0.22, 0.24], [0.30, 0.33, 0.30], [0.50, 0.45, 0.49], [0.60, 0.61, 0.59]])
    found = crossing((1, 2, 4, 8), seeds, 0.4)
    half = stats.t.ppf(0.975, 2) * seeds.std(1, ddof=1) / np.sqrt(3)
    for bound, edge in ((found.low, seeds.mean(1) + half), (found.high, seeds.mean(1) - half)):
        assert np.interp(np.log2(bound), [0, 1, 2, 3], edge) == pytest.approx(0.4, abs=1e-9)
    assert found.low < found.shots < found.high
    wide = crossing((1, 2, 4, 8), seeds + np.array([[0.0], [0.0], [0.0], [-0.15]]) * np.array([0, 1, 2]), 0.52)
    assert wide.high is None
    assert "never up to 8" in wide.describe()


def test_more_shots_pass_a_zero_shot_classifier() -> None:
    train, targets = clusters(90, 10, 3, seed=1)
    test, labels = clusters(600, 10, 3, seed=2)
    hits = np.arange(600) % 100 < 72
    curve = few_shot_curve(train, targets, test, labels, shots=(1, 4, 16), lambdas=[1.0, 30.0], zero_shot_hits=hits)
    assert curve.zero_shot is not None
    assert curve.crossing is not None
    assert curve.zero_shot.value == 0.72
    assert 1 < (curve.crossing.shots or 0) < 16
    assert [row["shots"] for row in table(curve)] == [1, 4, 16]
    assert table(curve)[2]["seed 2"] == curve.accuracies_SR[2, 1]
    below = few_shot_curve(train, targets, test, labels, shots=(1, 2), lambdas=[1.0], zero_shot_hits=np.ones(600, bool))
    assert below.crossing is not None
    assert below.crossing.shots is None
    assert "does not pass" in below.crossing.describe()


def test_test_labels_are_read_by_the_final_scoring_alone() -> None:
    train, targets = clusters(30, 5, 3, seed=1)
    sealed = SealedLabels(targets.tolist())
    few_shot_curve(train, targets, train, sealed, shots=(1, 2), lambdas=[1.0])
    assert sealed.was_read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": (1,)}, "two seeds or more"),
        ({"shots": ()}, "one number of shots or more"),
        ({"shots": (0,)}, "num_shots is 1 or more"),
        ({"shots": (9,)}, r"fewer than 9 pictures in train: '0' \(4\)"),
        ({"train_labels": [1, "1", 2] * 4}, "come twice|there twice or more: '1'"),
        ({"train": np.full((12, 5), np.nan)}, "row 0 of train are infinite"),
        ({"test_labels": [0] * 11}, "test has 12 pictures and 11 labels"),
        ({"test_labels": [0] * 11 + [7]}, "test has 1 labels that train lacks: 7"),
        ({"train_labels": [0] * 12}, "at least 2 classes, train has one"),
        ({"zero_shot_hits": np.ones(3, bool)}, "12 test pictures and zero-shot hits of shape"),
        ({"train_keys": ["a"] * 3}, "3 keys"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    features, labels = clusters(12, 5, 3, seed=0)
    given: dict[str, Any] = {"train": features, "train_labels": labels, "test": features, "test_labels": labels}
    given |= {"shots": (1,), "lambdas": [1.0]}
    with pytest.raises(ValueError, match=message):
        few_shot_curve(**(given | change))
