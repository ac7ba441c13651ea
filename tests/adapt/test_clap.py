"""CLAP beyond the published loop (`test_heads`): the two ends of its pull, its first step, files, clones, seeds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn.base import clone
from torch.nn.functional import normalize, one_hot

from tests.adapt.shots import NAMES, TinyEmbedder, shots
from wordsight.adapt import CLAP, ZeroShot, clap, load_classifier


@pytest.fixture(scope="module")
def model() -> TinyEmbedder:
    return TinyEmbedder()


def test_a_strong_pull_is_zero_shot(model: TinyEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = shots(4, noise=1.5)
    zero_shot = ZeroShot(model, NAMES).fit()
    moved = []
    certainty = clap.zero_shot_certainty
    for strength in (0.0, 1.0, 20.0, 400.0):
        monkeypatch.setattr(clap, "zero_shot_certainty", lambda *a, strength=strength: strength * (0.5 + 0 * certainty(*a)))
        found = CLAP(model, epochs=200, learning_rate=0.01).fit(X, y)
        moved.append(float((found.class_vectors_ - zero_shot.class_vectors_).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.02 * moved[0]
    torch.testing.assert_close(found.logits(X), zero_shot.logits(X), rtol=0, atol=0.2)


def test_first_steps_in_closed_form(model: TinyEmbedder) -> None:
    """The warm-up moves by 1e-5 alone, so that the next step is 1.9 times the gradient at the texts, where nothing pulls:
    scale (I - tt') (p - y)'f / (B |t|)."""
    X, y = shots(4, noise=1.5)
    found = CLAP(model, epochs=2, learning_rate=0.1).fit(X, y)
    with torch.no_grad():
        raw = model.encode_text(model.tokenize([f"A photo of a {name}." for name in sorted(NAMES)]), normalize=False).double()
    unit, length = normalize(raw, dim=1), raw.norm(dim=1, keepdim=True)
    f = normalize(torch.tensor(X), dim=1).double()
    hot = one_hot(torch.tensor([sorted(NAMES).index(name) for name in y])).double()
    scale = math.exp(3.0)
    slope = scale * ((scale * f @ unit.T).softmax(1) - hot).T @ f / len(f)
    step = 0.19 * (slope - (slope * unit).sum(1, keepdim=True) * unit) / length
    moved = found.class_vectors_ - unit
    torch.testing.assert_close(moved, normalize(raw - step, dim=1) - unit, rtol=0, atol=2e-3 * float(moved.abs().max()))


def test_pictures_improve_on_text_alone(model: TinyEmbedder) -> None:
    train, test = shots(16, noise=2.5), shots(40, seed=1, noise=2.5)
    zero_shot = ZeroShot(model, NAMES).fit().score(*test)
    assert all(CLAP(model, pull=pull).fit(*train).score(*test) > zero_shot for pull in (True, False))


def test_file_clone_and_seed(model: TinyEmbedder, tmp_path: Path) -> None:
    X, y = shots(4)
    found = CLAP(model, epochs=8, batch_size=6, seed=2).fit(X, y)
    assert torch.equal(clone(found).fit(X, y).class_vectors_, found.class_vectors_)
    assert not torch.equal(clone(found).set_params(seed=3).fit(X, y).class_vectors_, found.class_vectors_)
    read = load_classifier(found.save(tmp_path / "probe", with_model=False), model)
    assert torch.equal(read.logits(X), found.logits(X))
    assert read.get_params() == found.get_params()
    assert read.loss_curve_ == found.loss_curve_
    assert torch.equal(read.pull_, found.pull_)


def test_bad_input_is_named(model: TinyEmbedder) -> None:
    X, y = shots(2)
    with pytest.raises(ValueError, match="the model's texts 24"):
        CLAP(model).fit(X[:, :20], y)
    with pytest.raises(ValueError, match="needs a model"):
        CLAP().fit(X, y)
