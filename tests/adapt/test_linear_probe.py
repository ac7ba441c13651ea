"""LinearProbe beside scikit-learn: its solutions, its two searches, cross-validation, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.model_selection import StratifiedKFold

import wordsight
from tests.adapt.shots import NAMES, shots
from wordsight.adapt import ImageFeatures, LinearProbe, load_classifier
from wordsight.adapt.linear_probe import coop_search
from wordsight.evaluate.probe import search


def test_given_C_is_scikit_learns() -> None:
    X, y = shots(8)
    new = shots(20, seed=1)[0]
    ours = LinearProbe(C=0.1).fit(X, y)
    theirs = Reference(C=0.1, tol=1e-9, max_iter=5000).fit(X.astype(np.float64), y)
    np.testing.assert_allclose(ours.predict_proba(new), theirs.predict_proba(new), atol=2e-3)
    assert list(ours.classes_) == sorted(NAMES)
    assert (ours.C_, ours.trace_) == (0.1, [])
    vectors, scale, bias = ours.linear_head()
    torch.testing.assert_close(scale * torch.tensor(new) @ vectors.T + bias, ours.logits(new))


def test_weights_are_scikit_learns_and_0_is_absence() -> None:
    X, y = shots(8, noise=2.0)
    new = shots(20, seed=1)[0]
    weight = np.random.default_rng(0).uniform(0, 3, len(y))
    weight[::5] = 0
    ours = LinearProbe(C=0.1).fit(X, y, sample_weight=weight)
    theirs = Reference(C=0.1, tol=1e-9, max_iter=5000).fit(X.astype(np.float64), y, sample_weight=weight)
    np.testing.assert_allclose(ours.predict_proba(new), theirs.predict_proba(new), atol=2e-3)
    assert np.abs(ours.predict_proba(new) - LinearProbe(C=0.1).fit(X, y).predict_proba(new)).max() > 0.02
    kept = weight > 0
    without = LinearProbe(C=0.1).fit(X[kept], y[kept], sample_weight=weight[kept])
    assert torch.equal(ours.class_vectors_, without.class_vectors_)
    searched = LinearProbe().fit(X, y, sample_weight=weight)  # in folds, each with its weights
    assert searched.C_ == LinearProbe().fit(X[kept], y[kept], sample_weight=weight[kept]).C_


@pytest.mark.parametrize("how", ["clip", "coop"])
def test_C_is_chosen_on_validation_and_learned_from_train_alone(how: Any) -> None:
    X, y = shots(4, noise=2.0)
    held_out = shots(8, seed=1, noise=2.0)

    def score(lam: float) -> float:
        return LinearProbe(C=1 / lam).fit(X, y).score(*held_out)

    lam, trace = (search if how == "clip" else coop_search)(score)
    found = LinearProbe(search=how).fit(X, y, validation=held_out)
    assert pytest.approx(1 / lam) == found.C_
    np.testing.assert_allclose([a for _, a in found.trace_], [trace[lam] for lam in sorted(trace, reverse=True)])
    alone = LinearProbe(C=found.C_).fit(X, y)
    torch.testing.assert_close(found.class_vectors_, alone.class_vectors_, rtol=1e-2, atol=2e-3)


def test_coops_search_is_the_published_one() -> None:
    """The published steps, on a curve with a peak between the first ones, and on one that is flat."""

    def published(accuracy: Any) -> tuple[float, list[float]]:
        asked = []

        def ask(C: float) -> float:
            asked.append(round(np.log10(C), 9))
            return accuracy(C)

        first = [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
        peak = first[int(np.argmax([ask(C) for C in first]))]
        left, right = 1e-1 * peak, 1e1 * peak
        for _ in range(8):
            at_left, at_right = ask(left), ask(right)
            middle = 10 ** (0.5 * (np.log10(left) + np.log10(right)))
            if at_left < at_right:
                final, left = right, middle
            else:
                final, right = left, middle
        return final, asked

    for accuracy in (lambda C: -abs(np.log10(C) - 2.6), lambda C: 0.5, lambda C: C, lambda C: round(-abs(np.log10(C)), 1)):
        final, asked = published(accuracy)
        lam, trace = coop_search(lambda lam, accuracy=accuracy: accuracy(1 / lam))
        assert np.log10(1 / lam) == pytest.approx(np.log10(final))
        assert sorted({round(-np.log10(lam), 6) + 0.0 for lam in trace}) == sorted({round(e, 6) + 0.0 for e in asked})


def test_without_validation_the_pictures_are_folded() -> None:
    X, y = shots(5, noise=2.0)
    found = LinearProbe(seed=3).fit(X, y)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=3).split(X, y))
    for C, accuracy in found.trace_[::4]:
        hits = [(LinearProbe(C=C).fit(X[kept], y[kept]).predict(X[left]) == y[left]).sum() for kept, left in folds]
        assert accuracy == pytest.approx(sum(hits) / len(y), abs=0.041)  # one picture may lie on a border
    assert max(accuracy for _, accuracy in found.trace_) == dict(found.trace_)[found.C_]
    single = LinearProbe().fit(*shots(1))
    assert (single.C_, single.trace_) == (1.0, [])


def test_names_two_classes_and_order_of_classes() -> None:
    X, y = shots(6)
    two = np.isin(y, ["ant", "wolf"])
    probe = LinearProbe(C=1.0).fit(X[two], y[two])
    theirs = Reference(C=1.0, tol=1e-9, max_iter=5000).fit(X[two].astype(np.float64), y[two])
    np.testing.assert_allclose(probe.predict_proba(X), theirs.predict_proba(X), atol=2e-3)
    given = LinearProbe(classes=["wolf", "ant"], C=1.0).fit(X[two], y[two])
    assert list(given.classes_) == ["ant", "wolf"]
    np.testing.assert_array_equal(given.predict_proba(X), probe.predict_proba(X))


def test_reads_the_layer_that_it_names() -> None:
    torch.manual_seed(0)
    model = wordsight.create("clip-tiny")
    from PIL import Image

    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)) for i in range(6)]
    y = ["a", "b"] * 3
    probe = LinearProbe(model, C=1.0).fit(pictures, y)
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(picture) for picture in pictures])
        penultimate = model.image_tower.features(pixels)
    assert probe.n_features_in_ == penultimate.shape[1] == model.image_tower.config.width
    np.testing.assert_allclose(
        probe.predict_proba(pictures), LinearProbe(C=1.0).fit(penultimate.numpy(), y).predict_proba(penultimate), atol=1e-4
    )
    with pytest.raises(ValueError, match="reads penultimate features, X holds projected ones"):
        probe.predict(ImageFeatures(torch.zeros(2, 32)))
    projected = LinearProbe(model, C=1.0, layer="projected").fit(pictures, y)
    assert projected.n_features_in_ == 512


def test_file_round_trip(tmp_path: Path) -> None:
    X, y = shots(4)
    probe = LinearProbe(C="search").fit(X, y)
    found = load_classifier(probe.save(tmp_path / "probe"))
    assert isinstance(found, LinearProbe)
    assert torch.equal(found.logits(X), probe.logits(X))
    assert found.get_params() == probe.get_params()
    assert (found.C_, found.trace_, found.n_iter_) == (probe.C_, probe.trace_, probe.n_iter_)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"C": 0.0}, "C must be a number above 0"),
        ({"C": "best"}, "C must be a number above 0 or 'search', got 'best'"),
        ({"search": "grid"}, "search must be one of clip, coop, got 'grid'"),
        ({"layer": "last"}, "layer must be one of projected, penultimate"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearProbe(**settings).fit(*shots(2))
