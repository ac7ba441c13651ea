"""CrossModalProbe's parts beside torch's own, and its contract: files, clones, seeds, views, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.nn.functional import cross_entropy, normalize

from tests.adapt.shots import NAMES, WIDTH, TinyEmbedder, shots
from wordsight.adapt import CrossModalProbe, ImageFeatures, ZeroShot, load_classifier
from wordsight.adapt.cross_modal import SideBySideAdamW, _batches, learning_rate_at, loss_and_gradient


@pytest.fixture(scope="module")
def model() -> TinyEmbedder:
    return TinyEmbedder()


def test_loss_and_gradient_are_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    features = normalize(torch.randn(11, 7, dtype=torch.float64, generator=generator), dim=1)
    targets = torch.randint(0, 5, (11,), generator=generator)
    losses = torch.stack([cross_entropy(20.0 * features @ w.T, targets) for w in weights])
    losses.sum().backward()
    found, gradient = loss_and_gradient(weights.detach(), features, targets, 20.0)
    torch.testing.assert_close(found, losses.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, weights.grad, rtol=1e-12, atol=1e-12)


def test_weights_side_by_side_take_torchs_adamw_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator)
    decays = torch.tensor([0.0, 0.1, 0.01], dtype=torch.float64)
    ours = start.clone()
    optimizer = SideBySideAdamW(ours, decays)
    alone = [torch.nn.Parameter(weights.clone()) for weights in start]
    others = [
        torch.optim.AdamW([weights], lr=1.0, weight_decay=float(decay)) for weights, decay in zip(alone, decays, strict=True)
    ]
    for step in range(40):
        gradient = torch.randn(start.shape, dtype=torch.float64, generator=generator) * 10.0 ** (step % 5 - 4)
        rates = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64) / (step + 1)
        optimizer.step(gradient, rates)
        for s, other in enumerate(others):
            other.param_groups[0]["lr"] = float(rates[s])
            alone[s].grad = gradient[s].clone()
            other.step()
    torch.testing.assert_close(ours, torch.stack([weights.detach() for weights in alone]), rtol=1e-12, atol=1e-13)


def test_schedule_is_the_published_one() -> None:
    """Linear warm-up from 1e-5 over 50 steps, then PyTorch's cosine, which only then begins to count."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12800)
    assert [learning_rate_at(i, 12800, 1e-3) for i in (0, 1, 25, 49)] == pytest.approx([1e-5, 2e-5, 5e-4, 9.8e-4])
    for i in range(50, 400):
        assert learning_rate_at(i, 12800, 1e-3) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()


def test_batches_go_round_the_rows() -> None:
    stream = _batches(10, 4, torch.Generator().manual_seed(0))
    for _ in range(3):
        rows = torch.cat([next(stream), next(stream)])
        assert len(rows) == len(set(rows.tolist())) == 8
    few = _batches(3, 16, torch.Generator().manual_seed(0))
    assert sorted(next(few).tolist()) == [0, 1, 2]  # a half is no larger than what there is


def test_pictures_improve_on_text_alone(model: TinyEmbedder) -> None:
    test = shots(40, seed=1, noise=1.5)
    zero_shot = ZeroShot(model, NAMES).fit().score(*test)
    one, many = (CrossModalProbe(model, iterations=300).fit(*shots(num, noise=1.5)) for num in (1, 16))
    assert many.score(*test) > max(zero_shot, one.score(*test))
    assert many.loss_curve_[-1] < many.loss_curve_[0]


def test_texts_are_shots() -> None:
    """Where pictures of one class are far from its text, a text of that class is still judged to be of it."""
    model = TinyEmbedder(text_noise=0.0)
    X, y = shots(4, noise=3.0)
    text = ZeroShot(model, NAMES).fit().class_vectors_
    found = CrossModalProbe(model, iterations=400, learning_rate=0.01).fit(X, y)
    assert list(found.predict(text)) == sorted(NAMES)
    assert float((found.class_vectors_ - text).norm()) > 0.1


def test_views_are_shots(model: TinyEmbedder) -> None:
    X, y = shots(3)
    views = torch.stack([torch.tensor(X), torch.tensor(shots(3, noise=1.2)[0])])
    found = CrossModalProbe(model, iterations=60, num_views=2, seed=3).fit(ImageFeatures(torch.zeros(len(X), WIDTH), views), y)
    same = CrossModalProbe(model, iterations=60, seed=3).fit(np.concatenate(list(views.numpy())), np.tile(y, 2))
    assert torch.equal(found.class_vectors_, same.class_vectors_)


def test_a_tie_goes_to_the_surer_one(model: TinyEmbedder) -> None:
    X, y = shots(4, noise=0.1)
    held_out = shots(4, seed=2, noise=0.1)
    found = CrossModalProbe(model, iterations=200, batch_size=8).fit(X, y, validation=held_out)
    assert found.score(*held_out) == 1.0
    targets = torch.tensor([sorted(NAMES).index(name) for name in held_out[1]])
    best = float(cross_entropy(found.logits(held_out[0]), targets))
    for rate in (1e-3, 1e-4):
        for decay in (0.0, 0.01, 1e-4):
            one = CrossModalProbe(model, iterations=200, batch_size=8, learning_rate=rate, weight_decay=decay).fit(X, y)
            assert best <= float(cross_entropy(one.logits(held_out[0]), targets)) * (1 + 1e-5)


def test_file_clone_and_seed(model: TinyEmbedder, tmp_path: Path) -> None:
    X, y = shots(3)
    found = CrossModalProbe(model, iterations=120, seed=4).fit(X, y, validation=shots(2, seed=1))
    again = clone(found).fit(X, y, validation=shots(2, seed=1))
    assert torch.equal(again.class_vectors_, found.class_vectors_)
    assert again.loss_curve_ == found.loss_curve_
    other = clone(found).set_params(seed=5).fit(X, y)
    assert not torch.equal(other.class_vectors_, found.class_vectors_)
    read = load_classifier(found.save(tmp_path / "probe", with_model=False), model)
    assert torch.equal(read.logits(X), found.logits(X))
    assert read.get_params() == found.get_params()
    assert (read.chosen_, read.loss_curve_) == (found.chosen_, found.loss_curve_)
    assert set(found.chosen_) == {"learning_rate", "weight_decay", "batch_size", "iteration"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, or None, got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, or None, got -1.0"),
        ({"batch_size": 7}, "batch_size must be an even number of at least 2, .* got 7"),
        ({"batch_size": 0}, "batch_size must be an even number"),
        ({"num_views": -1}, "num_views must be at least 0"),
    ],
)
def test_bad_settings_are_named(model: TinyEmbedder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossModalProbe(model, **settings).fit(*shots(2))


def test_bad_input_is_named(model: TinyEmbedder) -> None:
    X, y = shots(2)
    with pytest.raises(ValueError, match="the model's texts 24"):
        CrossModalProbe(model).fit(X[:, :20], y)
    X[3, 5] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        CrossModalProbe(model).fit(X, y)
    with pytest.raises(ValueError, match="needs a model"):
        CrossModalProbe().fit(*shots(2))
    with pytest.raises(ValueError, match=r"CrossModalProbe's loss is (nan|inf) at step \d+ of 400: lower learning_rate"):
        CrossModalProbe(model, iterations=400, learning_rate=1e38).fit(*shots(2))
