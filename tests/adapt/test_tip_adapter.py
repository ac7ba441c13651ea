"""Tip-Adapter beside its definition, its search beside the published one, its training beside a plain loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from tests.adapt.shots import NAMES, TinyEmbedder, shots
from wordsight.adapt import ImageFeatures, TipAdapter, TipAdapterF, ZeroShot
from wordsight.adapt.tip_adapter import grid, search


@pytest.fixture(scope="module")
def model() -> TinyEmbedder:
    return TinyEmbedder()


def test_logits_are_the_papers(model: TinyEmbedder) -> None:
    X, y = shots(3)
    new = shots(5, seed=1)[0]
    tip = TipAdapter(model, alpha=1.3, beta=4.0).fit(X, y)
    zero_shot = ZeroShot(model, classes=NAMES).fit()
    f, keys = normalize(torch.tensor(new), dim=1).double(), normalize(torch.tensor(X), dim=1).double()
    values = one_hot(torch.tensor([sorted(NAMES).index(name) for name in y])).double()
    expected = zero_shot.logits(new) + 1.3 * torch.exp(-4.0 * (1 - f @ keys.T)) @ values
    torch.testing.assert_close(tip.logits(new).double(), expected.double(), atol=1e-4, rtol=1e-5)
    off = TipAdapter(model, alpha=0.0).fit(X, y)
    torch.testing.assert_close(off.logits(new), zero_shot.logits(new))
    with pytest.raises(ValueError, match="no linear function"):
        tip.linear_head()


def test_keys_are_the_means_of_the_views(model: TinyEmbedder) -> None:
    X, y = shots(2)
    views = torch.stack([torch.tensor(shots(2, seed=seed)[0]) for seed in range(3)])
    tip = TipAdapter(model, num_views=3).fit(ImageFeatures(torch.tensor(X), views), y)
    torch.testing.assert_close(tip.keys_, normalize(views.mean(0), dim=1))
    with pytest.raises(ValueError, match="X has 3 views, num_views=4 are asked for"):
        TipAdapter(model, num_views=4).fit(ImageFeatures(torch.tensor(X), views), y)
    with pytest.raises(ValueError, match="X is an array of features"):
        TipAdapter(model, num_views=3).fit(X, y)


def published_search(zero_shot: Any, affinity: Any, values: Any, targets: Any, betas: Any, alphas: Any) -> Any:
    best, found = 0.0, (0.0, 0.0)
    for beta in betas:
        for alpha in alphas:
            logits = zero_shot + ((-1) * (beta - beta * affinity)).exp() @ values * alpha
            accuracy = float((logits.argmax(1) == targets).double().mean())
            if accuracy > best:
                best, found = accuracy, (beta, alpha)
    return (best, *found)


@pytest.mark.parametrize("seed", range(6))
def test_search_finds_what_the_published_one_does(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(5, (40,), generator=draw)
    zero_shot = 3 * torch.randn(40, 5, generator=draw).double() + one_hot(targets, 5)
    affinity = torch.rand(40, 15, generator=draw).double() + 0.2 * one_hot(targets, 5).repeat(1, 3)
    values = one_hot(torch.arange(5).repeat(3)).double()
    betas, alphas = grid(12, 20), grid(5, 20)
    ours = search(zero_shot, affinity, values, targets, betas, alphas)
    theirs = published_search(zero_shot, affinity, values, targets, betas, alphas)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert ours[0] > float((zero_shot.argmax(1) == targets).double().mean())


def test_grid_is_the_published_one() -> None:
    values = grid(12, 200)
    assert (len(values), values[0]) == (200, 0.1)
    assert values[-1] == pytest.approx(0.1 + 199 * 11.9 / 200)


def test_settings_are_searched_on_validation_alone(model: TinyEmbedder) -> None:
    X, y = shots(2, noise=1.5)
    held_out = shots(20, seed=5, noise=1.5)
    tip = TipAdapter(model, search_steps=(20, 10)).fit(X, y, validation=held_out)
    assert tip.score(*held_out) == pytest.approx(tip.validation_accuracy_)
    assert tip.score(*held_out) >= TipAdapter(model).fit(X, y).score(*held_out)
    one = TipAdapter(model, beta=2.0, search_steps=(20, 10)).fit(X, y, validation=held_out)
    assert (one.beta_, one.alpha_ in grid(5, 10)) == (2.0, True)
    plain = TipAdapter(model).fit(X, y)
    assert (plain.alpha_, plain.beta_, plain.validation_accuracy_) == (1.17, 1.0, None)


def test_keys_are_trained_as_published(model: TinyEmbedder) -> None:
    X, y = shots(3, noise=2.0)
    tip = TipAdapterF(model, alpha=1.0, beta=2.0, batch_size=6, epochs=4, learning_rate=0.01, seed=3).fit(X, y)
    f = normalize(torch.tensor(X), dim=1)
    targets = torch.tensor([sorted(NAMES).index(name) for name in y])
    adapter = torch.nn.Linear(24, 15, bias=False)
    adapter.weight = torch.nn.Parameter(f.clone())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, eps=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * 3)
    order = torch.Generator().manual_seed(3)
    curve = []
    for _ in range(4):
        losses = []
        for rows in torch.randperm(15, generator=order).split(6):
            cache = torch.exp(-2.0 * (1 - adapter(f[rows]))) @ one_hot(targets).float()
            loss = cross_entropy(tip.scale_ * f[rows] @ tip.text_vectors_.T + cache, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        curve.append(np.mean(losses))
    torch.testing.assert_close(tip.keys_, adapter.weight.detach(), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(tip.loss_curve_, curve, rtol=1e-4)
    assert (tip.keys_ - f).norm() > 0.01


def test_a_loss_that_is_not_finite_names_its_step(model: TinyEmbedder) -> None:
    X, y = shots(3)
    with pytest.raises(ValueError, match=r"TipAdapterF's loss is (nan|inf) at step \d+"):
        TipAdapterF(model, learning_rate=1e30, epochs=5).fit(X, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha must be a number of at least 0, got -1.0"),
        ({"beta": "best"}, "beta must be a number of at least 0 or 'search', got 'best'"),
        ({"alpha": math.nan}, "alpha must be a number"),
        ({"search_scale": (0.05, 3.0)}, "search_scale must be"),
        ({"search_steps": (0, 3)}, "search_steps must be"),
        ({"num_views": -1}, "num_views must be at least 0"),
    ],
)
def test_bad_settings_are_named(model: TinyEmbedder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TipAdapter(model, **settings).fit(*shots(2))
    for setting, value in (("epochs", 0), ("batch_size", 1.5), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=setting):
            TipAdapterF(model, **{setting: value}).fit(*shots(2))
