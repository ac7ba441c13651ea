"""ZeroShot: class names alone, beside the evaluator and the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.adapt.shots import NAMES, TinyEmbedder, shots
from wordsight.adapt import ZeroShot
from wordsight.evaluate.prompts import class_embeddings


@pytest.fixture(scope="module")
def model() -> TinyEmbedder:
    return TinyEmbedder()


def test_probabilities_are_the_papers(model: TinyEmbedder) -> None:
    X, y = shots(4)
    templates = ["A photo of a {label}.", "art of the {label}."]
    found = ZeroShot(model, classes=NAMES, prompts=templates).fit()
    text = torch.stack([class_embeddings(model, [name], templates)[0] for name in sorted(NAMES)])
    expected = (20.085537 * normalize(torch.tensor(X), dim=1) @ text.T).double().softmax(1)
    np.testing.assert_allclose(found.predict_proba(X), expected, atol=1e-5)
    assert found.score(X, y) > 0.8


def test_a_sigmoid_models_bias_cancels(model: TinyEmbedder) -> None:
    X, _ = shots(2)
    other = TinyEmbedder()
    other.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    plain, biased = (ZeroShot(one, classes=NAMES).fit().predict_proba(X) for one in (model, other))
    np.testing.assert_array_equal(plain, biased)


def test_names_come_from_classes_or_labels(model: TinyEmbedder) -> None:
    X, y = shots(1)
    by_name, by_label = ZeroShot(model, classes=NAMES).fit(), ZeroShot(model).fit(X, y)
    np.testing.assert_array_equal(by_name.predict_proba(X), by_label.predict_proba(X))
    # order of classes changes nothing but is not given back
    turned = ZeroShot(model, classes=NAMES[::-1]).fit()
    assert list(turned.classes_) == sorted(NAMES)
    np.testing.assert_array_equal(turned.predict_proba(X), by_name.predict_proba(X))


def test_unlabelled_classes_are_allowed(model: TinyEmbedder) -> None:
    X, y = shots(2)
    found = ZeroShot(model, classes=[*NAMES, "fox"]).fit(X, y)
    assert found.predict_proba(X).shape == (10, 6)


@pytest.mark.parametrize(
    ("classes", "y", "message"),
    [
        (None, None, "y to be passed"),
        (["ant"], None, "at least 2 classes, got one class: 'ant'"),
        (["ant", "ant"], None, "more than once: 'ant'"),
        (["ant", ""], None, "class name 1 is empty"),
        ("ant", None, "classes must be a list of names, got 'ant'"),
        ([], None, "classes must be a list of names"),
        (["ant", "bee"], ["cow"], "1 labels are not among the 2 classes: 'cow'"),
    ],
)
def test_bad_names_are_named(model: TinyEmbedder, classes: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZeroShot(model, classes=classes).fit(None if y is None else np.zeros((1, 24)), y)


def test_a_mismatch_of_widths_is_named(model: TinyEmbedder) -> None:
    found = ZeroShot(model, classes=NAMES).fit()
    with pytest.raises(ValueError, match="X has 7 features, but ZeroShot is expecting 24 features"):
        found.predict(np.zeros((2, 7)))
