"""Figures for classes of unequal size: scikit-learn's exactly, golden values, intervals that hold the truth, bad input."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

from wordsight.evaluate import long_tail
from wordsight.evaluate.calibration import BOOTSTRAP, WILSON, expected_calibration_error
from wordsight.evaluate.long_tail import MACRO, WILSON_KISH, judge
from wordsight.evaluate.metrics import wilson_interval


def answers(images: int, classes: int, seed: int, share: float = 0.6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets skewed towards class 0, predictions of which `share` are right and the others guesses, confidences."""
    rng = np.random.default_rng(seed)
    targets = np.minimum(rng.geometric(min(1.0, 2 / classes), images) - 1, classes - 1)
    guesses = rng.integers(0, classes, images)
    return targets, np.where(rng.random(images) < share, targets, guesses), rng.random(images)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0]))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_figures_are_scikit_learns(images: int, classes: int, seed: int, share: float) -> None:
    targets, predicted, confidences = answers(images, classes, seed, share)
    found = judge(targets, predicted, np.arange(classes) * 15, confidences=confidences)
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert values["top1"] == accuracy_score(targets, predicted)
    assert values["mean_per_class"] == pytest.approx(balanced_accuracy_score(targets, predicted), abs=1e-14)
    theirs = precision_recall_fscore_support(targets, predicted, average="macro", zero_division=0)
    assert [values[name] for name in MACRO] == pytest.approx(theirs[:3], abs=1e-14)
    names = list(range(classes))
    each = precision_recall_fscore_support(targets, predicted, labels=names, zero_division=0)
    table = found.per_class
    for place, field in enumerate(("precision", "recall")):
        ours = [getattr(row, field).value if getattr(row, field) else 0 for row in table]
        assert ours == pytest.approx(each[place].tolist(), abs=1e-14)
    assert [row.f1 or 0 for row in table] == pytest.approx(each[2].tolist(), abs=1e-14)
    assert [row.count for row in table] == each[3].tolist()
    # the confusion of groups is scikit-learn's matrix of them
    group = np.array(["many few medium".split().index(row.group) for row in table])
    matrix = confusion_matrix(group[targets], group[predicted], labels=range(3), normalize="true")
    for (source, target), metric in found.confusion.items():
        row, column = ("many few medium".split().index(name) for name in (source, target))
        assert metric.value == pytest.approx(matrix[row, column], abs=1e-14)
    for name in ("many", "medium", "few"):
        rows = np.isin(targets, [i for i in names if table[i].group == name])
        assert (f"top1_{name}" in values) == rows.any()
        if rows.any():
            assert values[f"top1_{name}"] == accuracy_score(targets[rows], predicted[rows])
            assert values[f"mean_per_class_{name}"] == pytest.approx(
                balanced_accuracy_score(targets[rows], predicted[rows]), abs=1e-14
            )
            assert values[f"ece_{name}"] == expected_calibration_error((targets == predicted)[rows], confidences[rows])
    for name, metric in found.metrics.items():
        low, high = metric.ci95
        assert 0 <= low <= metric.value <= high <= 1, name
        assert low < high, name
        assert found.intervals[name] in (WILSON, WILSON_KISH, BOOTSTRAP)


@pytest.mark.parametrize(("images", "num_bins"), [(1, 15), (200, 15), (200, 7), (1000, 10)])
def test_calibration_is_that_of_scikit_learns_bins(images: int, num_bins: int) -> None:
    rng = np.random.default_rng(images)
    confidences = np.r_[rng.random(images - 1), 1.0] if num_bins != 7 else rng.integers(0, 8, images) / 7  # edges too
    correct = rng.random(images) < confidences
    shares, means = calibration_curve(correct, confidences, n_bins=num_bins)
    edges = np.linspace(0, 1, num_bins + 1)
    sizes = np.bincount(np.searchsorted(edges[1:-1], confidences), minlength=num_bins)
    expected = np.sum(sizes[sizes > 0] * np.abs(shares - means)) / images
    assert expected_calibration_error(correct, confidences, num_bins) == pytest.approx(expected, abs=1e-12)


def test_golden() -> None:
    """200, 50 and 5 training images. Tests: four of a (3 right, 1 as b), two of b (1 right, 1 as a), one of c as a."""
    targets, predicted = [0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 0]
    found = judge(targets, predicted, [200, 50, 5], confidences=[0.9, 0.9, 0.9, 0.5, 0.5, 0.9, 0.2], classes=["a", "b", "c"])
    expected = {
        "top1": 4 / 7,
        "mean_per_class": (3 / 4 + 1 / 2 + 0) / 3,
        "macro_precision": (3 / 5 + 1 / 2 + 0) / 3,
        "macro_recall": (3 / 4 + 1 / 2 + 0) / 3,
        "macro_f1": (6 / 9 + 2 / 4 + 0) / 3,
        "ece": (abs(3 - 3.6) + abs(1 - 1) + abs(0 - 0.2)) / 7,
        "top1_many": 3 / 4,
        "top1_medium": 1 / 2,
        "top1_few": 0.0,
    }
    for name, value in expected.items():
        assert found.metrics[name].value == pytest.approx(value), name
    assert found.metrics["top1"].ci95 == wilson_interval(4, 7)
    assert found.metrics["top1_few"].ci95 == wilson_interval(0, 1)
    assert found.metrics["top1"].chance == pytest.approx(1 / 3)
    assert {pair: metric.value for pair, metric in found.confusion.items() if metric.value} == {
        ("many", "many"): 0.75,
        ("many", "medium"): 0.25,
        ("medium", "many"): 0.5,
        ("medium", "medium"): 0.5,
        ("few", "many"): 1.0,
    }
    assert found.confusion["few", "many"].chance == pytest.approx(1 / 3)
    assert found.groups == {"many": ("a",), "medium": ("b",), "few": ("c",), "unseen": ()}
    row = found.per_class[0]
    assert (row.name, row.group, row.train_count, row.count, row.predicted, row.right) == ("a", "many", 200, 4, 5, 3)
    assert (row.recall.value, row.precision.value, row.precision.chance) == (3 / 4, 3 / 5, 4 / 7)
    assert found.per_class[2].precision is None
    assert found.notes == ("many: more than 100 training images, few: fewer than 20, medium: the others",)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, ["few", "medium", "medium", "many"]),
        ({"many_above": 99, "few_below": 21}, ["few", "few", "many", "many"]),
        ({"many_above": 19, "few_below": 20}, ["few", "many", "many", "many"]),
        ({"many_above": 0, "few_below": 0}, ["many"] * 4),
    ],
)
def test_limits_of_the_groups(limits: dict[str, float], expected: list[str]) -> None:
    """Medium is 20 to 100, both included."""
    found = judge([0, 1, 2, 3], [0, 1, 2, 3], [19, 20, 100, 101], **limits)
    assert [row.group for row in found.per_class] == expected


def test_classes_that_train_or_test_lack_are_handled_and_named() -> None:
    classes = ["head", "tail", "new", "untested", "nowhere", "taken"]
    found = judge([0, 0, 1, 2, 2], [0, 5, 1, 2, 0], [150, 3, 0, 40, 0, 30], classes=classes, confidences=[0.5] * 5)
    assert found.groups["unseen"] == ("new", "nowhere")
    assert found.metrics["top1_few"].count == 3, "unseen classes are few"
    assert found.metrics["top1_unseen"].value == 0.5
    assert found.metrics["mean_per_class"].value == pytest.approx((1 / 2 + 1 + 1 / 2) / 3), "over classes with images"
    assert found.metrics["macro_recall"].value == pytest.approx((1 / 2 + 1 + 1 / 2 + 0) / 4), "and those predicted"
    assert not any(name.endswith("_medium") for name in found.metrics)
    by_name = {row.name: row for row in found.per_class}
    assert by_name["nowhere"].recall is by_name["nowhere"].precision is by_name["nowhere"].f1 is None
    assert by_name["taken"].recall is None
    assert by_name["taken"].precision.value == by_name["taken"].f1 == 0
    told = "\n".join(found.notes)
    for line in (
        "1 classes have test images and no training images: they are among the few, and shown as unseen: new",
        "1 classes have neither training nor test images: nowhere",
        "2 classes have no test images, so no recall and no part in means per class: untested, taken",
        "1 classes without test images were predicted and count 0 in the macro figures: taken",
        "no test image is of a class that is medium: untested, taken",
    ):
        assert line in told
    assert "no class is many" in judge([0], [0], [5]).notes
    many = judge([0] * 30, [0] * 30, [9] * 30, classes=[f"c{i}" for i in range(30)])
    assert any("c1, c2, c3, c4, c5, c6, c7, c8, c9, c10 and 19 more" in note for note in many.notes)


def test_a_single_image_has_figures_and_wide_intervals() -> None:
    for predicted in (0, 1):
        found = judge([0], [predicted], [10, 200], confidences=[0.7])
        for name in ("top1", "mean_per_class", *MACRO):
            metric = found.metrics[name]
            assert metric.count == 1
            assert metric.ci95 == wilson_interval(1 - predicted, 1)
        low, high = found.metrics["ece"].ci95
        assert high - low > 0.5
        assert "mean_per_class" not in found.over_classes, "no interval over one class"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(2, 8), st.integers(0, 99), st.data())
def test_order_of_images_and_names_of_classes_do_not_matter(images: int, classes: int, seed: int, data: st.DataObject) -> None:
    targets, predicted, confidences = answers(images, classes, seed)
    counts = np.random.default_rng(seed).integers(0, 200, classes)
    found = judge(targets, predicted, counts, confidences=confidences)
    order = np.array(data.draw(st.permutations(range(images))))
    renamed = np.array(data.draw(st.permutations(range(classes))))
    moved = np.empty(classes)
    moved[renamed] = counts
    again = judge(renamed[targets[order]], renamed[predicted[order]], moved, confidences=confidences[order])
    assert set(found.metrics) == set(again.metrics)
    for name, metric in found.metrics.items():
        assert again.metrics[name].value == pytest.approx(metric.value, abs=1e-12)
        assert again.metrics[name].chance == (metric.chance if metric.chance is None else pytest.approx(metric.chance))
    for pair, metric in found.confusion.items():
        assert again.confusion[pair].value == metric.value
    same = judge(targets, predicted, counts, confidences=confidences)
    assert same.metrics == found.metrics, "the bootstrap is repeatable"
    assert same.over_classes == found.over_classes


@pytest.mark.parametrize("sizes", [(50,) * 20, (40, 30, 20, 10, 8, 6, 5, 4, 3, 2) * 3])
def test_intervals_hold_the_truth(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over images: the same classes measured again and again. 95% of the intervals should hold the figure of endless images."""
    monkeypatch.setattr("wordsight.evaluate.metrics.RESAMPLES", 200)
    rng = np.random.default_rng(3)
    classes, targets = len(sizes), np.repeat(np.arange(len(sizes)), sizes)
    right_C = np.clip(rng.normal(0.6, 0.2, classes), 0.05, 0.95)
    wrong_CC = rng.dirichlet(np.ones(classes), classes)
    joint_CC = np.diag(right_C) + (1 - right_C)[:, None] * wrong_CC
    share_C = np.bincount(targets) / len(targets)
    hit_C, taken_C = share_C * np.diag(joint_CC), share_C @ joint_CC
    sure_C = np.linspace(0.1, 0.9, classes)  # whoever predicts class c says so with this confidence
    truth = {
        "macro_precision": np.mean(hit_C / taken_C),
        "macro_recall": np.mean(np.diag(joint_CC)),
        "macro_f1": np.mean(2 * hit_C / (taken_C + share_C)),
    }
    bins = np.ceil(sure_C * 15).astype(int) - 1
    truth["ece"] = np.abs(np.bincount(bins, weights=hit_C - taken_C * sure_C)).sum()
    inside = dict.fromkeys(truth, 0)
    rounds = 80
    cumulative = joint_CC.cumsum(1)
    cumulative /= cumulative[:, -1:]
    for _ in range(rounds):
        drawn = rng.choice(classes, len(targets), p=share_C)
        predicted = (rng.random(len(drawn))[:, None] > cumulative[drawn]).sum(1)
        found = judge(drawn, predicted, sizes, confidences=sure_C[predicted]).metrics
        for name, value in truth.items():
            low, high = found[name].ci95
            inside[name] += low <= value <= high
    assert min(inside.values()) >= 0.85 * rounds, inside


def test_interval_over_classes_holds_the_mean_of_the_classes_that_they_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wordsight.evaluate.metrics.RESAMPLES", 200)
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(100):
        shares = rng.beta(3, 2, 40)  # mean 0.6
        targets = np.repeat(np.arange(40), 50)
        correct = rng.random(len(targets)) < shares[targets]
        found = judge(targets, np.where(correct, targets, (targets + 1) % 40), [30] * 40)
        low, high = found.over_classes["mean_per_class"]
        inside += low <= 0.6 <= high
        images_low, images_high = found.metrics["mean_per_class"].ci95
        assert high - low > images_high - images_low, "classes differ by more than chance"
    assert inside >= 88


def test_chance_is_what_guessing_gives() -> None:
    rng = np.random.default_rng(5)
    counts = np.array([500, 90, 30, 15, 2, 0])
    targets = rng.choice(6, 200_000, p=[0.5, 0.2, 0.15, 0.1, 0.05, 0.0])
    found = judge(targets, rng.integers(0, 6, len(targets)), counts, classes=list("abcdef"))
    for name, metric in found.metrics.items():
        assert metric.value == pytest.approx(metric.chance, abs=0.01), name
    for metric in found.confusion.values():
        assert metric.value == pytest.approx(metric.chance, abs=0.01)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: judge([], [], [1]), "at least one image"),
    (lambda: judge([0, 1], [0], [1, 2]), "2 targets and 1 predictions"),
    (lambda: judge([0, 2], [0, 1], [1, 2]), "targets must be 0 to 1, there are 2 train_counts; got 0 to 2"),
    (lambda: judge([0, 1], [-1, 1], [1, 2]), "predicted must be 0 to 1.*got -1 to 1"),
    (lambda: judge([0.0, 1.0], [0, 1], [1, 2]), "integers.*float64"),
    (lambda: judge([0], [0], [1, -2]), r"train_counts .* from -2 to 1"),
    (lambda: judge([0], [0], [1, math.nan]), "train_counts"),
    (lambda: judge([0], [0], []), "train_counts"),
    (lambda: judge([0], [0], [1], classes=["a", "b"]), "2 class names, 2 different ones, for 1 counts"),
    (lambda: judge([0], [0], [1, 2], classes=["a", "a"]), "2 class names, 1 different ones"),
    (lambda: judge([0], [0], [1], confidences=[1.5]), r"1 probabilities, 0 to 1.*from 1.5 to 1.5"),
    (lambda: judge([0], [0], [1], confidences=[math.nan]), "probabilities"),
    (lambda: judge([0], [0], [1], confidences=[0.5, 0.5]), r"shape \(2,\)"),
    (lambda: judge([0], [0], [1], many_above=10, few_below=20), "few_below is at most many_above"),
    (lambda: judge([0], [0], [1], confidences=[0.5], num_bins=0), "num_bins"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_macro_resamples_are_those_of_whole_lists() -> None:
    """Drawing how often pairs occur is drawing images: same mean and spread as resampled lists."""
    targets, predicted, _ = answers(80, 6, 1)
    read = long_tail._Given.read(targets, predicted, np.ones(6), None, None, 100, 20, 15)
    fast = long_tail._resample_macro(read)
    rng = np.random.default_rng(0)
    slow = []
    for _ in range(400):
        rows = rng.integers(0, 80, 80)
        slow.append(precision_recall_fscore_support(targets[rows], predicted[rows], average="macro", zero_division=0)[:3])
    assert fast.mean(0) == pytest.approx(np.mean(slow, axis=0), abs=0.01)
    assert fast.std(0) == pytest.approx(np.std(slow, axis=0), rel=0.15)
