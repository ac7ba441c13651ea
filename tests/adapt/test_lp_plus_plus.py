"""LPPlusPlus beyond the published loop (`test_heads`): what its step size promises, its start, files, clones, views."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.nn.functional import cross_entropy, normalize, one_hot

from tests.adapt.shots import NAMES, WIDTH, TinyEmbedder, shots
from wordsight.adapt import ImageFeatures, LPPlusPlus, ZeroShot, load_classifier


@pytest.fixture(scope="module")
def model() -> TinyEmbedder:
    return TinyEmbedder()


def test_first_step_in_closed_form(model: TinyEmbedder) -> None:
    """One step from the sums of shots, by hand: w - 4 N / lambda_max(F'F) (p - y)'F / N."""
    X, y = shots(3)
    found = LPPlusPlus(model, iterations=1).fit(X, y)
    f = normalize(torch.tensor(X), dim=1).double()
    targets = torch.tensor([sorted(NAMES).index(name) for name in y])
    hot = one_hot(targets).double()
    text = ZeroShot(model, NAMES).fit().class_vectors_.double()
    alpha = 250 * torch.stack([(f[targets == c] @ text[c]).mean() for c in range(len(NAMES))]).mean()
    logits = f @ (hot.T @ f + alpha * text).T
    assert found.loss_curve_[0] == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-4)
    largest = torch.linalg.svdvals(f)[0] ** 2
    w = hot.T @ f - 4 / largest * (logits.softmax(1) - hot).T @ f
    torch.testing.assert_close(found.class_vectors_.double(), w + alpha * text, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(found.alpha_, torch.full((len(NAMES),), float(alpha)), rtol=1e-5, atol=0)


def test_without_momentum_the_loss_never_rises(model: TinyEmbedder) -> None:
    """w's step is twice one over the curvature's bound lambda_max(F'F) / (2 N): the longest that can't raise the loss."""
    for seed in range(3):
        X, y = shots(4, seed=seed, noise=2.0)
        curve = LPPlusPlus(model, momentum=0.0, iterations=60).fit(X, y).loss_curve_
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(curve))
        assert curve[-1] < 0.9 * curve[0]


def test_pictures_improve_on_text_alone(model: TinyEmbedder) -> None:
    test = shots(40, seed=1, noise=1.5)
    assert LPPlusPlus(model).fit(*shots(16, noise=1.5)).score(*test) > ZeroShot(model, NAMES).fit().score(*test)


def test_equal_views_change_nothing(model: TinyEmbedder) -> None:
    """The same picture as every view is the same mean loss, the same bounds and the same start."""
    X, y = shots(3)
    views = torch.tensor(X).repeat(4, 1, 1)
    once = LPPlusPlus(model, iterations=20).fit(X, y)
    often = LPPlusPlus(model, iterations=20, num_views=4).fit(ImageFeatures(torch.zeros(len(X), WIDTH), views), y)
    torch.testing.assert_close(often.class_vectors_, once.class_vectors_, rtol=1e-3, atol=1e-2)


def test_file_clone_and_linear_head(model: TinyEmbedder, tmp_path: Path) -> None:
    X, y = shots(3)
    held_out = shots(5, seed=1)
    found = LPPlusPlus(model, iterations=40).fit(X, y, validation=held_out)
    assert torch.equal(clone(found).fit(X, y, validation=held_out).logits(X), found.logits(X))
    read = load_classifier(found.save(tmp_path / "probe", with_model=False), model)
    assert torch.equal(read.logits(X), found.logits(X))
    assert read.get_params() == found.get_params()
    assert (read.loss_curve_, read.iteration_) == (found.loss_curve_, found.iteration_)
    vectors, scale, bias = found.linear_head()
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    np.testing.assert_allclose(scale * unit @ vectors.numpy().T + bias.numpy(), found.logits(X).numpy(), rtol=1e-4, atol=1e-3)
