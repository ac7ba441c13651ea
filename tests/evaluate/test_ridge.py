"""Ridge classification beside refits without each picture and scikit-learn's; bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeClassifierCV, RidgeCV

from tests.evaluate.sealed import SealedLabels
from wordsight.evaluate import features as features_module
from wordsight.evaluate.ridge import RidgePath, ridge_probe


def clusters(num: int, width: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes far from the origin, in features of unlike spread: float64 [N, D], [N]."""
    centres = np.random.default_rng(3).normal(size=(num_classes, width))
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), draw.integers(0, num_classes, num - num_classes)])
    return (centres[labels] + draw.normal(size=(num, width))) * np.arange(1, width + 1) ** -0.5 + 5, labels


def plus_minus(labels: np.ndarray) -> np.ndarray:
    return 2.0 * (labels[:, None] == np.arange(labels.max() + 1)) - 1


SHAPES = [(60, 9, 4), (30, 50, 3), (40, 40, 5), (50, 12, 2), (20, 70, 2)]  # primal and dual


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lam", [1e-2, 1.0, 300.0])
def test_solution_is_scikit_learns(shape: tuple[int, int, int], lam: float) -> None:
    features, labels = clusters(*shape)
    ours = RidgePath(features, torch.tensor(labels), shape[2]).solve(lam)
    theirs = Ridge(alpha=lam, solver="svd").fit(features, plus_minus(labels))
    assert np.abs(ours.weights_DC.numpy() - theirs.coef_.T).max() < 1e-8
    assert np.abs(ours.bias_C.numpy() - theirs.intercept_).max() < 1e-8
    new, _ = clusters(300, *shape[1:], seed=1)
    classifier = RidgeClassifier(alpha=lam, solver="svd").fit(features, labels)
    assert (ours.logits(new).argmax(1).numpy() == classifier.predict(new)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lam", [1e-2, 1.0, 300.0])
def test_leave_one_out_is_what_refits_say(shape: tuple[int, int, int], lam: float) -> None:
    features, labels = clusters(*shape)
    expected = np.stack(
        [
            Ridge(alpha=lam, solver="svd")
            .fit(np.delete(features, row, 0), np.delete(plus_minus(labels), row, 0))
            .predict(features[[row]])[0]
            for row in range(len(features))
        ]
    )
    path = RidgePath(features, torch.tensor(labels), shape[2])
    assert np.abs(path.outputs(lam).numpy() - expected).max() < 1e-8
    accuracies, errors = path.leave_one_out([lam])
    assert accuracies[lam] == np.mean(expected.argmax(1) == labels)
    assert errors[lam] == pytest.approx(np.mean((expected - plus_minus(labels)) ** 2), abs=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_path_is_ridge_cvs(shape: tuple[int, int, int]) -> None:
    features, labels = clusters(*shape)
    lambdas = [10.0**exponent for exponent in range(-2, 4)]
    theirs = RidgeCV(lambdas, store_cv_results=True).fit(features, plus_minus(labels))
    _, errors = RidgePath(features, torch.tensor(labels), shape[2]).leave_one_out(lambdas)
    expected = theirs.cv_results_.mean((0, 1))
    assert [errors[lam] for lam in lambdas] == pytest.approx(expected.tolist(), abs=1e-8)
    assert min(errors, key=lambda lam: errors[lam]) == theirs.alpha_
    by_accuracy = RidgeClassifierCV(lambdas, scoring="accuracy").fit(features, labels)
    accuracies, _ = RidgePath(features, torch.tensor(labels), shape[2]).leave_one_out(lambdas)
    assert max(accuracies.values()) == pytest.approx(by_accuracy.best_score_)


def test_blocks_and_memory_maps_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    features, labels = clusters(700, 9, 4)
    np.save(tmp_path / "train.npy", features)
    whole = ridge_probe(features, labels, features, labels)
    monkeypatch.setattr(features_module, "BLOCK_NUMBERS", 1)  # blocks of 256
    for given in (features, np.load(tmp_path / "train.npy", mmap_mode="r"), torch.tensor(features)):
        parts = ridge_probe(given, labels, given, labels)
        assert parts.best_lambda == pytest.approx(whole.best_lambda)
        torch.testing.assert_close(parts.solution.weights_DC, whole.solution.weights_DC, atol=1e-9, rtol=1e-9)
        assert list(parts.trace.values()) == list(whole.trace.values())


def test_lambda_is_chosen_on_train_and_reported_on_test() -> None:
    train, labels = clusters(80, 60, 4, seed=1)
    test, test_labels = clusters(400, 60, 4, seed=2)
    names = np.array(["fir", "oak", "elm", "ash"])
    found = ridge_probe(train, names[labels], test, names[test_labels])
    wrong = ridge_probe(train, names[labels], -test, names[(test_labels + 1) % 4])
    assert (found.best_lambda, found.trace) == (wrong.best_lambda, wrong.trace)
    assert found.classes == ("ash", "elm", "fir", "oak")
    best = max(found.trace.values())
    assert found.best_lambda == max(lam for lam, accuracy in found.trace.items() if accuracy == best)
    theirs = RidgeClassifier(alpha=found.best_lambda).fit(train, names[labels])
    assert found.accuracy.value == theirs.score(test, names[test_labels])
    assert (found.accuracy.count, found.accuracy.chance) == (400, 0.25)
    assert found.accuracy.value > 0.6


def test_scale_of_features_changes_nothing() -> None:
    train, labels = clusters(80, 12, 4, seed=1)
    test, test_labels = clusters(400, 12, 4, seed=2)
    once = ridge_probe(train, labels, test, test_labels)
    for scale in (1e-3, 1e3):
        scaled = ridge_probe(train * scale, labels, test * scale, test_labels)
        assert scaled.accuracy == once.accuracy
        assert scaled.best_lambda == pytest.approx(once.best_lambda * scale**2)


def test_pictures_all_alike_say_how_often_a_class_is() -> None:
    same = np.ones((9, 4))
    for features in (same, np.ones((3, 8))):
        labels = [0, 1, 1] * (len(features) // 3)
        found = ridge_probe(features, labels, features, labels)
        assert found.accuracy.value == pytest.approx(2 / 3)


def test_one_picture_a_class_needs_a_lambda() -> None:
    features, labels = clusters(4, 6, 4)
    found = ridge_probe(features, labels, features, labels, lambdas=[1.0])
    assert (found.best_lambda, found.accuracy.value, found.trace) == (1.0, 1.0, {1.0: 0.0})


def test_test_labels_are_read_by_the_final_scoring_alone() -> None:
    train, targets = clusters(50, 5, 3, seed=1)
    sealed = SealedLabels(targets.tolist())
    ridge_probe(train, targets, train, sealed)
    assert sealed.was_read


def spoiled(value: float) -> np.ndarray:
    features = clusters(20, 4, 2)[0]
    features[7, 2] = value
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_labels": [*"ab" * 9, "c", "d"]}, "test has 2 labels that train lacks: 'c', 'd'"),
        ({"train_labels": ["a"] * 20}, "at least 2 classes, train has one: 'a'"),
        ({"train_labels": ["a"] * 19}, "train has 20 pictures and 19 labels"),
        ({"train": spoiled(np.nan)}, "row 7 of train are infinite or undefined"),
        ({"test": spoiled(np.inf)}, "row 7 of test are infinite or undefined"),
        ({"test": np.zeros((20, 5))}, "test has 5 features a picture and train 4"),
        ({"train": np.zeros((0, 4)), "train_labels": []}, "at least one picture"),
        ({"lambdas": [1.0, -1.0]}, "positive numbers, got"),
        ({"lambdas": []}, "positive numbers, got"),
        ({"train_labels": [*"abcdefghijklmnopqrst"]}, "every class of train has one picture"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    features, labels = clusters(20, 4, 2)[0], [*"ab" * 10]
    given: dict[str, Any] = {"train": features, "train_labels": labels, "test": features, "test_labels": labels}
    with pytest.raises(ValueError, match=message):
        ridge_probe(**(given | change))
