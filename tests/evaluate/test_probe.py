"""The linear probe beside scikit-learn's, its search, its protocol, and bad input."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression as Reference

from tests.evaluate.sealed import SealedLabels
from wordsight.evaluate import features as features_module
from wordsight.evaluate import probe
from wordsight.evaluate.metrics import wilson_interval
from wordsight.evaluate.probe import LogisticRegression, Path, linear_probe, search


def clusters(num: int, width: int, num_classes: int, *, seed: int = 0, spread: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap, in features with a mean and a falling spectrum, as towers give them: float32 [N, D], [N]."""
    world = np.random.default_rng(7)
    scale, centres, mean = np.arange(1, width + 1) ** -0.7, world.normal(size=(num_classes, width)), world.normal(size=width)
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), draw.integers(0, num_classes, num - num_classes)])
    features = 3 * (spread * centres[labels] + draw.normal(size=(num, width))) * scale + mean
    return features.astype(np.float32), labels


def loss_of(weights: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray, lam: float) -> float:
    """The objective by its definition, in float64: weights [D, C]."""
    logits = features.astype(np.float64) @ weights + bias
    return float((logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).sum() + lam / 2 * (weights**2).sum())


def reference(features: np.ndarray, labels: np.ndarray, lam: float) -> Reference:
    return Reference(C=1 / lam, max_iter=20_000, tol=1e-9).fit(features.astype(np.float64), labels)


@pytest.mark.parametrize("shape", [(300, 20, 5), (60, 90, 6), (40, 40, 3), (200, 3, 2), (50, 80, 2)])
@pytest.mark.parametrize("lam", [1e3, 1.0, 1e-2])
def test_solution_is_scikit_learns(shape: tuple[int, int, int], lam: float) -> None:
    features, labels = clusters(*shape)
    ours = LogisticRegression([features], torch.tensor(labels), shape[2]).solve(lam)
    theirs = reference(features, labels, lam)
    assert ours.converged
    new, _ = clusters(500, *shape[1:], seed=1)
    expected = torch.tensor(theirs.predict_proba(new.astype(np.float64)))
    torch.testing.assert_close(ours.logits(new.astype(np.float64)).softmax(1), expected, atol=4e-3, rtol=0)
    if shape[2] > 2:
        own = loss_of(ours.weights_DC.numpy(), ours.bias_C.numpy(), features, labels, lam)
        assert own == pytest.approx(ours.loss, rel=1e-9)
        assert own <= loss_of(theirs.coef_.T, theirs.intercept_, features, labels, lam) * (1 + 1e-5)
    else:  # one vector there, two opposite ones here
        torch.testing.assert_close(
            ours.weights_DC[:, 1] - ours.weights_DC[:, 0], torch.tensor(theirs.coef_[0]), atol=0.02, rtol=0.02
        )


def test_float32_is_as_good_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(400, 30, 4)
    monkeypatch.setattr(probe, "SMALL", 0)
    for lam in (10.0, 1e-3):
        theirs = reference(features, labels, lam)
        best = loss_of(theirs.coef_.T, theirs.intercept_, features, labels, lam)
        for block_numbers in (1 << 20, 1):
            monkeypatch.setattr(features_module, "BLOCK_NUMBERS", block_numbers)
            problem = LogisticRegression([features[:150], features[150:]], torch.tensor(labels), 4)
            assert problem.dtype == torch.float32
            ours = problem.solve(lam)
            assert loss_of(ours.weights_DC.numpy(), ours.bias_C.numpy(), features, labels, lam) <= best * (1 + 1e-5)


def test_small_losses_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every picture is right by far, log_softmax in float32 would say 0."""
    features, labels = clusters(400, 30, 4, spread=8.0)
    monkeypatch.setattr(probe, "SMALL", 0)
    solution = LogisticRegression([features], torch.tensor(labels), 4).solve(1e-5)
    theirs = reference(features, labels, 1e-5)
    assert solution.loss <= loss_of(theirs.coef_.T, theirs.intercept_, features, labels, 1e-5)
    by_definition = loss_of(solution.weights_DC.numpy(), solution.bias_C.numpy(), features, labels, 1e-5)
    assert solution.loss == pytest.approx(by_definition, rel=1e-3)


def test_gradient_is_the_losss() -> None:
    features, labels = clusters(60, 9, 4)
    problem = LogisticRegression([features], torch.tensor(labels), 4)
    x = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    weights_DC = problem.directions_DR @ x[:-1]
    logits_NC = (torch.tensor(features).double() - problem.mean_D) @ weights_DC + x[-1]
    loss = torch.nn.functional.cross_entropy(logits_NC, torch.tensor(labels), reduction="sum")
    loss.backward()
    point = problem._cross_entropy(x.detach())
    assert point.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(point.gradient, x.grad, atol=1e-10, rtol=1e-10)
    p_NC = logits_NC.detach().softmax(1)
    torch.testing.assert_close(point.spread_C, (p_NC * (1 - p_NC)).mean(0), atol=1e-12, rtol=1e-12)


def test_path_needs_fewer_steps_and_comes_to_the_same_end() -> None:
    features, labels = clusters(300, 20, 5)
    problem = LogisticRegression([features], torch.tensor(labels), 5)
    path = Path(problem)
    for lam in (100.0, 10.0, 9.0):
        warm, cold = path(lam), problem.solve(lam)
        assert warm.loss == pytest.approx(cold.loss, rel=1e-5)
    assert warm.num_iterations < cold.num_iterations
    assert path(9.0) is warm


def test_search_halves_around_the_peak() -> None:
    asked: list[float] = []

    def score(lam: float) -> float:
        asked.append(lam)
        return -abs(np.log10(lam) - 0.7)

    best, trace = search(score)
    steps = [round(8 * np.log10(lam)) for lam in asked]
    assert steps == [48, 32, 16, 0, -16, -32, -48, 8, -8, 12, 4, 6, 2, 7, 5]
    assert best == pytest.approx(10 ** (6 / 8))
    assert list(trace) == sorted(asked)
    assert len(set(asked)) == len(asked)


def test_search_stays_in_range_and_prefers_the_larger_of_equals() -> None:
    best, trace = search(lambda lam: 0.5)
    assert best == pytest.approx(1e6)
    assert max(trace) == pytest.approx(1e6)
    assert search(lambda lam: -lam)[0] == pytest.approx(1e-6)
    assert search(lambda lam: 0.5, [1, 10, 2])[0] == 10
    for wrong in ([], [0.0], [-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="positive"):
            search(lambda lam: 0.5, wrong)


def test_protocol_is_the_papers() -> None:
    """The whole of it beside the same search by scikit-learn: tuned on validation, fitted on both, reported on test."""
    train, train_labels = clusters(240, 24, 6, seed=1, spread=0.3)
    val, val_labels = clusters(200, 24, 6, seed=2, spread=0.3)
    test, test_labels = clusters(1500, 24, 6, seed=3, spread=0.3)
    names = np.array(["fir", "oak", "elm", "ash", "yew", "box"])
    result = linear_probe(train, names[train_labels], torch.tensor(val), list(names[val_labels]), test, names[test_labels])

    for lam, accuracy in result.trace.items():
        theirs = Reference(C=1 / lam, max_iter=5000, tol=1e-7).fit(train, train_labels)
        assert accuracy == pytest.approx(theirs.score(val, val_labels), abs=0.006)  # one picture of 200 may lie on a border
    assert len(result.trace) == 15
    final = reference(np.concatenate([train, val]), np.concatenate([train_labels, val_labels]), result.best_lambda)
    assert result.accuracy.value == pytest.approx(final.score(test, test_labels), abs=1e-3)
    assert result.trace[result.best_lambda] == max(result.trace.values())
    hits = result.accuracy.value * 1500
    assert result.accuracy.ci95 == wilson_interval(hits, 1500)
    assert (result.accuracy.count, result.accuracy.chance) == (1500, 1 / 6)
    assert result.classes == tuple(sorted(names))


def test_nothing_is_chosen_on_test() -> None:
    train, train_labels = clusters(90, 12, 3, seed=1)
    val, val_labels = clusters(60, 12, 3, seed=2)
    test, test_labels = clusters(60, 12, 3, seed=3)
    right = linear_probe(train, train_labels, val, val_labels, test, test_labels)
    wrong = linear_probe(train, train_labels, val, val_labels, -test, (test_labels + 1) % 3)
    assert (right.best_lambda, right.trace) == (wrong.best_lambda, wrong.trace)
    assert torch.equal(right.solution.weights_DC, wrong.solution.weights_DC)


def test_test_labels_are_read_by_the_final_scoring_alone() -> None:
    features, labels = clusters(60, 8, 3)
    sealed = SealedLabels(labels.tolist())
    with pytest.raises(AssertionError, match="before the final scoring"):
        list(sealed)
    linear_probe(features, labels, features, labels, features, sealed)
    assert sealed.was_read
    with pytest.raises(AssertionError, match="before the final scoring"):
        linear_probe(features, labels, features, SealedLabels(labels.tolist()), features, labels)


def test_large_problems_tune_roughly_and_report_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    train, train_labels = clusters(400, 24, 6, seed=1, spread=0.3)
    val, val_labels = clusters(400, 24, 6, seed=2, spread=0.3)
    exact = linear_probe(train, train_labels, val, val_labels, val, val_labels)
    monkeypatch.setattr(probe, "SMALL", 0)
    rough = linear_probe(train, train_labels, val, val_labels, val, val_labels)
    for lam in set(exact.trace) & set(rough.trace):
        assert abs(exact.trace[lam] - rough.trace[lam]) < 0.03
    assert rough.trace[rough.best_lambda] > max(exact.trace.values()) - 0.02
    both, labels = np.concatenate([train, val]), np.concatenate([train_labels, val_labels])
    theirs = reference(both, labels, rough.best_lambda)
    best = loss_of(theirs.coef_.T, theirs.intercept_, both, labels, rough.best_lambda)
    assert rough.solution.loss == pytest.approx(best, rel=1e-5)


def test_memory_mapped_features_and_rows_all_alike(tmp_path: Any) -> None:
    features, labels = clusters(120, 10, 3)
    np.save(tmp_path / "train.npy", features)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    kept = linear_probe(features, labels, features, labels, features, labels, lambdas=[1.0])
    read = linear_probe(mapped, labels, mapped, labels, mapped, labels, lambdas=[1.0])
    assert torch.equal(kept.solution.weights_DC, read.solution.weights_DC)
    same = np.ones((6, 4))
    result = linear_probe(same, [0, 1, 1] * 2, same, [0, 1, 1] * 2, same, [0, 1, 1] * 2, lambdas=[1.0])
    assert result.accuracy.value == pytest.approx(2 / 3)  # nothing to see but how often a class is


STREAMED = """
import resource, sys
import numpy as np
from wordsight.evaluate import probe

mapped = np.load(sys.argv[1], mmap_mode="r")
labels = np.load(sys.argv[2])
probe.TURNED_BYTES = 1 << 20
warm = probe.linear_probe(*(mapped[:500].copy(), labels[:500]) * 3, lambdas=[10.0])
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
limit = 1024 * used + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
result = probe.linear_probe(mapped, labels, mapped[:2000], labels[:2000], mapped[-2000:], labels[-2000:], lambdas=[10.0])
print(result.accuracy.value)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited by Linux's RLIMIT_DATA")
def test_memory_mapped_features_are_never_held_whole(tmp_path: Any) -> None:
    """160 MB of features are solved in a process that may take no more than 130 MB beyond what it starts with."""
    labels = np.random.default_rng(0).integers(0, 2, 40_000)
    np.save(tmp_path / "labels.npy", labels)
    features = np.lib.format.open_memmap(tmp_path / "train.npy", mode="w+", dtype=np.float32, shape=(40_000, 1000))
    for start in range(0, 40_000, 5000):
        part = slice(start, start + 5000)
        features[part] = np.random.default_rng(start).standard_normal((5000, 1000), dtype=np.float32)
        features[part, 0] += 3 * labels[part]
    features.flush()
    command = [sys.executable, "-c", STREAMED, str(tmp_path / "train.npy"), str(tmp_path / "labels.npy")]
    found = subprocess.run([*command, str(130_000_000)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) > 0.9


def spoiled(value: float) -> np.ndarray:
    features = clusters(20, 4, 2)[0]
    features[7, 2] = value
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_labels": [*"ab" * 9, "c", "d"]}, "test has 2 labels that train lacks: 'c', 'd'"),
        ({"val_labels": [*"ab" * 9, "c", "a"]}, "val has 1 labels that train lacks: 'c'"),
        ({"train_labels": ["a"] * 20}, "at least 2 classes, train has one: 'a'"),
        ({"train_labels": ["a"] * 19}, "train has 20 pictures and 19 labels"),
        ({"val": spoiled(np.nan)}, "row 7 of val are infinite or undefined"),
        ({"test": spoiled(np.inf)}, "row 7 of test are infinite or undefined"),
        ({"val": np.zeros((20, 5))}, "val has 5 features a picture and train 4"),
        ({"train": np.zeros((0, 4)), "train_labels": []}, "at least one picture"),
        ({"train": np.zeros((20, 4, 2))}, "at least one picture, got the shape"),
        ({"lambdas": [-1.0]}, "positive"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    features, labels = clusters(20, 4, 2)[0], [*"ab" * 10]
    given: dict[str, Any] = dict.fromkeys(("train", "val", "test"), features)
    given |= dict.fromkeys(("train_labels", "val_labels", "test_labels"), labels)
    with pytest.raises(ValueError, match=message):
        linear_probe(**(given | change))
