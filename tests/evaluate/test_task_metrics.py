"""Figures by task: scikit-learn's and CLIP_benchmark's on random scores, ties included; chance; intervals; published choices."""

from __future__ import annotations

import math
import warnings
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

from wordsight.evaluate import task_metrics
from wordsight.evaluate.metrics import wilson_interval
from wordsight.evaluate.task_metrics import (
    METRICS,
    average_precisions,
    mean_average_precision,
    published,
    roc_auc,
    task_metric,
)


def scores_of(rows: int, columns: int, levels: int, seed: int) -> np.ndarray:
    """Random scores; with `levels` > 0 whole numbers below it, so that ties are many."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, levels, (rows, columns)).astype(float) if levels else draw.random((rows, columns))


def clip_benchmark_average_precision(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What CLIP_benchmark 1.6.2 calls average_precision_per_class, by its definition; equal scores as torch.sort leaves them."""
    found = []
    for k in range(scores.shape[1]):
        truth = targets[:, k][torch.sort(scores[:, k], 0, True)[1]]
        precision = truth.float().cumsum(0) / torch.arange(1, len(scores) + 1).float()
        found.append(precision[truth].sum() / max(float(truth.sum()), 1))
    return torch.stack(found)


def eleven_points(scores: np.ndarray, positive: np.ndarray) -> float:
    """VOC2007's by its definition: at each threshold precision and recall, at each of 11 recalls the best precision."""
    pairs = []
    for threshold in np.unique(scores):
        taken = scores >= threshold
        pairs.append((int(positive[taken].sum()), float(positive[taken].mean())))
    total = int(positive.sum())
    return float(np.mean([max(precision for right, precision in pairs if 10 * right >= i * total) for i in range(11)]))


@pytest.mark.parametrize("levels", [0, 1, 2, 5, 50])
def test_average_precision_is_scikit_learns_and_voc2007s_ties_included(levels: int) -> None:
    for seed in range(4):
        scores = scores_of(60, 5, levels, seed)
        positives = np.random.default_rng(seed + 100).random((60, 5)) < 0.25
        positives[0] = True
        expected = [average_precision_score(positives[:, k], scores[:, k]) for k in range(5)]
        assert average_precisions(scores, positives) == pytest.approx(np.array(expected), abs=1e-12)
        points = [eleven_points(scores[:, k], positives[:, k]) for k in range(5)]
        assert average_precisions(scores, positives, eleven_point=True) == pytest.approx(np.array(points), abs=1e-12)


def test_average_precision_is_clip_benchmarks() -> None:
    for seed in range(5):
        scores = scores_of(80, 6, 0, seed).astype(np.float32)
        positives = np.random.default_rng(seed).random((80, 6)) < 0.2
        positives[0] = True
        theirs = clip_benchmark_average_precision(torch.tensor(scores), torch.tensor(positives))
        assert average_precisions(scores, positives) == pytest.approx(theirs.numpy(), abs=2e-7)  # theirs is summed in float32
        labels = [{k for k in range(6) if row[k]} for row in positives]
        assert mean_average_precision(scores, labels, range(6)).value == pytest.approx(float(theirs.mean()), abs=2e-7)


def test_a_picture_that_is_ignored_counts_neither_way() -> None:
    scores = scores_of(50, 3, 6, 1)
    positives = np.random.default_rng(1).random((50, 3)) < 0.3
    positives[0] = True
    ignored = np.random.default_rng(2).random((50, 3)) < 0.3
    labels, difficult = ([[name for k, name in enumerate("abc") if row[k]] for row in part] for part in (positives, ignored))
    expected = []
    for k in range(3):
        kept = ~(ignored[:, k] & ~positives[:, k])
        expected.append(average_precision_score(positives[kept, k], scores[kept, k]))
    assert mean_average_precision(scores, labels, "abc", ignored=difficult).value == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("levels", [0, 1, 2, 5, 50])
def test_roc_auc_is_scikit_learns_ties_included(levels: int) -> None:
    for seed in range(4):
        scores = scores_of(70, 1, levels, seed)
        targets = np.random.default_rng(seed + 100).integers(0, 2, 70)
        targets[:2] = 0, 1
        found = roc_auc(np.hstack([-scores, scores]), [("kind", "hateful")[target] for target in targets], ("kind", "hateful"))
        assert found.value == pytest.approx(roc_auc_score(targets, scores[:, 0]), abs=1e-12)
        assert found.ci95[0] <= found.value <= found.ci95[1]
        many = scores_of(70, 4, levels, seed) + 1e-3
        shares = many / many.sum(1, keepdims=True)
        targets = np.concatenate([np.arange(4), np.random.default_rng(seed).integers(0, 4, 66)])
        expected = roc_auc_score(targets, shares, multi_class="ovr")
        assert roc_auc(shares, targets.tolist(), range(4)).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("columns", [3, 5, 20])
def test_accuracies_are_scikit_learns(columns: int) -> None:
    for seed in range(4):
        scores = scores_of(90, columns, 0, seed)
        targets = np.concatenate([np.arange(columns), np.random.default_rng(seed).integers(0, columns, 90 - columns)])
        found = {name: task_metric(name, scores, targets.tolist(), range(columns)) for name in ("top1", "top5", "mean_top1_top5")}
        for k in (1, 5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns where k is as large as the number of classes
                assert found[f"top{k}"].value == pytest.approx(top_k_accuracy_score(targets, scores, k=k, labels=range(columns)))
        assert found["mean_top1_top5"].value == pytest.approx((found["top1"].value + found["top5"].value) / 2)
        assert found["mean_top1_top5"].chance == pytest.approx((1 + min(5, columns)) / 2 / columns)
        per_class = task_metric("mean_per_class", torch.tensor(scores), targets.tolist(), range(columns))
        assert per_class.value == pytest.approx(balanced_accuracy_score(targets, scores.argmax(1)), abs=1e-12)


def test_chance_of_average_precision_is_the_mean_over_all_orders() -> None:
    for count, positives in ((6, 2), (5, 1), (6, 4), (3, 3)):
        truth = np.zeros(count, bool)
        truth[:positives] = True
        orders = np.array(list(permutations(range(count)))).T.astype(float)
        found = average_precisions(orders, np.repeat(truth[:, None], orders.shape[1], 1))
        assert task_metrics._chance(count, positives, False) == pytest.approx(found.mean(), abs=1e-12)
        points = average_precisions(orders, np.repeat(truth[:, None], orders.shape[1], 1), eleven_point=True)
        assert task_metrics._chance(count, positives, True) == pytest.approx(points.mean(), abs=0.05)  # of 200 orders
    scores = scores_of(2000, 4, 0, 1)
    labels = [{k} for k in np.random.default_rng(2).integers(0, 4, 2000).tolist()]
    for eleven_point in (False, True):
        found = mean_average_precision(scores, labels, range(4), eleven_point=eleven_point)
        assert found.value == pytest.approx(found.chance, abs=0.02)
        assert found.ci95[0] < (found.chance or 0) < found.ci95[1]


@pytest.mark.parametrize(("count", "share", "shift"), [(60, 0.1, 1.5), (60, 0.5, 0.0), (400, 0.3, 1.0)])
def test_intervals_of_the_area_hold_the_truth(count: int, share: float, shift: float) -> None:
    draw = np.random.default_rng(5)
    labels = [int(i < share * count) for i in range(count)]
    truth, inside = 0.5 * math.erfc(-shift / 2), 0
    for _ in range(300):
        scores = draw.normal(size=count) + shift * np.array(labels)
        low, high = roc_auc(np.stack([0 * scores, scores], 1), labels, (0, 1)).ci95
        inside += low <= truth <= high
    assert 0.90 < inside / 300 < 0.99


def test_intervals_of_average_precision_hold_what_other_pictures_give() -> None:
    draw = np.random.default_rng(6)

    def pictures() -> tuple[np.ndarray, np.ndarray]:
        positives = draw.random((120, 3)) < 0.2
        positives[0] = True
        return draw.normal(size=(120, 3)) + 1.5 * positives, positives

    truth, inside = np.mean([average_precisions(*pictures()).mean() for _ in range(2000)]), 0
    for _ in range(80):
        scores, positives = pictures()
        low, high = mean_average_precision(scores, [set(np.flatnonzero(row).tolist()) for row in positives], range(3)).ci95
        inside += low <= truth <= high
    assert 0.86 < inside / 80 <= 1.0


def test_perfect_scores_are_no_proof_of_perfection() -> None:
    scores, labels = np.eye(3)[[0, 1, 2] * 4], [0, 1, 2] * 4
    for name in METRICS:
        found = task_metric(name, scores, labels, range(3))
        assert found.value == 1.0
        assert found.ci95[1] == 1.0
        assert 0.3 < found.ci95[0] < 0.95
    assert task_metric("map", scores, labels, range(3)).ci95 == wilson_interval(12, 12)
    rare = mean_average_precision(np.arange(20.0)[:, None] * [1, -1], [{"b"}] * 19 + [{"a"}], "ab")
    assert all(map(math.isfinite, rare.ci95))


def test_published_choices_are_complete_and_known() -> None:
    table = published()
    assert [len(table[name]) for name in ("clip27", "datacomp38")] == [27, 38]
    for name in ("clip27", "datacomp38"):
        assert len({one["name"] for one in table[name]}) == len(table[name])
        for one in table[name]:
            assert one["metric"] in table["metrics"]
            checked = one["checked"]
            marks = set(checked.values()) if isinstance(checked, dict) else {checked}
            assert marks <= {*table["sources"], "[M]"}
    clip = {one["name"]: one for one in table["clip27"]}
    assert {one["metric"] for one in clip.values()} <= set(METRICS), "all of the paper's can be computed"
    assert {name for name, one in clip.items() if one["metric"] == "mean_per_class"} == {
        "FGVC Aircraft",
        "Oxford-IIIT Pets",
        "Caltech-101",
        "Oxford Flowers 102",
    }
    assert clip["Pascal VOC 2007 Classification"]["metric"] == "map_11_point"
    assert clip["Hateful Memes"]["metric"] == "roc_auc"
    assert clip["Kinetics700"]["metric"] == "mean_top1_top5"
    for one in table["datacomp38"]:
        if one["metric"] in ("top1", "mean_per_class") and one["random_score"] is not None:
            # theirs is what the largest class or an unequal choice gives, no less than one in C; VOC's boxes are unequal
            assert one["random_score"] >= 0.99 / one["classes"]


@pytest.mark.parametrize("name", list(METRICS))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_NC": np.full((4, 3), np.nan)}, "row 0 are infinite or undefined"),
        ({"scores_NC": np.zeros((4, 2))}, r"scores are \[N, 3\]"),
        ({"scores_NC": np.zeros((0, 3)), "labels": []}, "at least one picture"),
        ({"labels": ["a", "b", "c"]}, "scores of 4 pictures and labels of 3"),
        ({"labels": ["a", "b", "c", "d"]}, "1 labels are not among the 3 classes: 'd'"),
        ({"classes": ["a", "b", "b"]}, "come twice or more: 'b'"),
        ({"classes": ["a"]}, "nothing to choose between"),
    ],
)
def test_bad_input_is_named(name: str, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"scores_NC": np.eye(3)[[0, 1, 2, 0]], "labels": ["a", "b", "c", "a"], "classes": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=message):
        task_metric(name, **(given | change))


def test_a_class_without_pictures_has_no_curve() -> None:
    for name in ("map", "map_11_point", "roc_auc"):
        with pytest.raises(ValueError, match="1 classes have no picture, so their curve is not defined: 'c'"):
            task_metric(name, np.eye(3)[[0, 1, 1]], ["a", "b", "b"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="choose among top1"):
        task_metric("top2", np.eye(2), [0, 1], [0, 1])
