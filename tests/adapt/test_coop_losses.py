"""CoOp under the losses of the long tail: exact beside their plain definition, weights and counts, sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import wordsight
from wordsight.adapt import CoOp, load_classifier
from wordsight.adapt.imbalanced import EFFECTIVE_BETA, LOSSES
from wordsight.adapt.prompt_training import draw_order, make_encoder
from wordsight.losses.imbalance import effective_number_weights

NAMES = ["cat", "great white shark", "sea lion", "tree frog"]
COUNTS = (24, 8, 4, 2)
QUICK: dict[str, Any] = {"num_context_tokens": 4, "epochs": 3, "learning_rate": 0.05, "batch_size": 8}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return wordsight.create("clip-tiny")


def skewed(counts: tuple[int, ...] = COUNTS, noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around a direction a class, and the names."""
    draw, centres = np.random.default_rng(seed), np.random.default_rng(7).normal(size=(len(NAMES), 512))
    labels = np.repeat(np.arange(len(NAMES)), counts)
    features = centres[labels] + noise * draw.normal(size=(len(labels), 512))
    return features.astype(np.float32), np.array(NAMES)[labels]


# The definition


def whole_prompts(model: Any, context_MW: Tensor) -> Tensor:
    """Unit class vectors of whole prompts through the whole tower, as published."""
    tower, num_context = model.text_tower, len(context_MW)
    tokens = model.tokenizer([" ".join(["X"] * num_context) + f" {name}." for name in NAMES])
    embedded = tower.token_embedding(tokens).detach()
    parts = (embedded[:, :1], context_MW.expand(len(NAMES), -1, -1), embedded[:, 1 + num_context :])
    x = tower.blocks.forward_tokens(torch.cat(parts, dim=1) + tower.position_embedding, is_causal=True)
    return normalize(tower.norm_final(x)[torch.arange(len(NAMES)), tokens.argmax(1)] @ tower.projection, dim=1)


def plain_loss(name: str, cosines: Tensor, y: Tensor, w: Tensor, counts: Tensor, scale: float, late: bool) -> Tensor:
    """The losses as they are written, row by row and class by class."""
    pi = counts / counts.sum()
    if name == "ldam":
        w = w * effective_number_weights(counts, EFFECTIVE_BETA)[y] if late else w
        margin = 0.5 * counts**-0.25 / (counts**-0.25).max()
        z = 30 * torch.stack([row - margin[c] * torch.eye(len(counts)).to(row)[c] for row, c in zip(cosines, y, strict=True)])
        return (w * cross_entropy(z, y, reduction="none")).sum() / w.sum()
    z = scale * cosines
    balanced = (w * cross_entropy(z + pi.log(), y, reduction="none")).sum() / w.sum()
    if name == "balanced_softmax":
        return balanced
    regret = balanced * 0
    for c in range(len(counts)):
        own = y == c
        first = (w[own] * z[own, c]).sum() / w[own].sum() if own.any() else balanced * 0
        second = (w / w.sum() * (z[:, c] - pi[c].log() - np.log(len(counts))).exp()).sum().log()
        regret = regret + pi[c] * (first - second - 0.1 * second**2)
    return balanced - 0.1 * regret


@pytest.mark.parametrize("loss", ["balanced_softmax", "ldam", "lade"])
@pytest.mark.parametrize("memory", [{}, {"class_chunk_tokens": 10}, {"exact_reference": True}])
def test_loss_and_gradient_are_those_of_the_definition(loss: str, memory: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = wordsight.create("clip-tiny").double()
    X, y = skewed()
    features = normalize(torch.from_numpy(X).double(), dim=1)
    targets = torch.tensor([NAMES.index(name) for name in y])
    weights = torch.rand(len(y), dtype=torch.float64) + 0.1
    learner = CoOp(model, NAMES, 4, epochs=2, batch_size=8, loss=loss, **memory)
    learner.classes_ = np.array(NAMES)
    objective = learner._objective(make_encoder(learner, NAMES), features[None], targets, weights)
    counts = torch.zeros(4, dtype=torch.float64).index_add_(0, targets, weights)
    for step in range(8):  # 2 epochs of 38 // 8 steps: LDAM weighs classes from step 7 on
        rows = torch.randperm(len(y))[:8]
        context = (0.02 * torch.randn(4, 32, dtype=torch.float64)).requires_grad_()
        found = objective(context, 0, rows)
        cosines = features[rows] @ whole_prompts(model, context).T
        expected = plain_loss(loss, cosines, targets[rows], weights[rows], counts, learner._scale(), late=step >= 0.8 * 8)
        gradients = [torch.autograd.grad(value, context)[0] for value in (found, expected)]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert (gradients[0] - gradients[1]).abs().max() < 1e-12 * max(1.0, gradients[1].abs().max().item())


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_and_is_kept_in_files(model: Any, loss: str, tmp_path: Path) -> None:
    X, y = skewed((6, 4, 2, 2))
    made = CoOp(model, NAMES, loss=loss, gamma=1.5, tau=0.5, **(QUICK | {"epochs": 8, "learning_rate": 0.1})).fit(X, y)
    assert made.loss_curve_[5] < made.loss_curve_[0]  # before LDAM weighs classes
    assert made.scale_ == pytest.approx(30 if loss == "ldam" else float(model.log_scale.detach().exp()))
    made.save(tmp_path / "c", with_model=False)
    read = load_classifier(tmp_path / "c", model)
    assert (read.loss, read.gamma, read.tau, read.scale_) == (loss, 1.5, 0.5, made.scale_)
    assert torch.equal(read.logits(X), made.logits(X))
    torch.testing.assert_close(made.with_classes(NAMES).logits(X), made.logits(X))


def test_balanced_softmax_helps_the_rare_class(model: Any) -> None:
    seen = model.text_tower.projection.detach().numpy()  # what a text vector of this small tower can point at

    def drawn(counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
        draw, centres = np.random.default_rng(seed), np.random.default_rng(7).normal(size=(len(NAMES), 32))
        labels = np.repeat(np.arange(len(NAMES)), counts)
        return ((centres[labels] + draw.normal(size=(len(labels), 32))) @ seen).astype(np.float32), np.array(NAMES)[labels]

    recall, accuracy = {}, {}
    for loss in ("cross_entropy", "balanced_softmax"):
        made = CoOp(model, NAMES, 4, class_specific=True, loss=loss, epochs=20, learning_rate=0.1).fit(*drawn((40, 40, 40, 3), 0))
        recall[loss], accuracy[loss] = made.score(*drawn((0, 0, 0, 100), 1)), made.score(*drawn((50, 50, 50, 50), 2))
    assert recall["balanced_softmax"] > recall["cross_entropy"] + 0.3
    assert accuracy["balanced_softmax"] > accuracy["cross_entropy"] + 0.05


# Weights


def test_a_picture_of_weight_0_is_as_if_it_were_not_there(model: Any) -> None:
    X, y = skewed()
    weight = np.where(np.arange(len(y)) % 3 == 1, 0.0, 1.5)
    weight[-1] = 0.25
    kept = weight > 0
    for loss in ("cross_entropy", "lade"):
        all_of_them = CoOp(model, loss=loss, **QUICK).fit(X, y, sample_weight=weight)
        without = CoOp(model, loss=loss, **QUICK).fit(X[kept], y[kept], sample_weight=weight[kept])
        assert torch.equal(all_of_them.context_, without.context_)
    equal = CoOp(model, NAMES, **QUICK).fit(X, y, sample_weight=np.full(len(y), 3.0))
    torch.testing.assert_close(equal.context_, CoOp(model, NAMES, **QUICK).fit(X, y).context_, rtol=1e-4, atol=1e-6)
    only = CoOp(model, **QUICK).fit(X, y, sample_weight=(y != "tree frog").astype(float))
    assert only.classes_.tolist() == NAMES[:3]
    with pytest.raises(ValueError, match="1 classes have no picture: 'tree frog'"):
        CoOp(model, NAMES, **QUICK).fit(X, y, sample_weight=(y != "tree frog").astype(float))
    for bad in (weight[1:], np.full(38, np.nan), -weight, 0 * weight):
        with pytest.raises(ValueError, match="sample_weight must be"):
            CoOp(model, NAMES, **QUICK).fit(X, y, sample_weight=bad)


# Sampling


def test_class_balanced_draws_each_class_and_in_it_each_picture_alike() -> None:
    targets = torch.tensor([1, 0, 2, 0, 0, 2, 0, 0])  # class 1 once, 2 twice, 0 five times
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_order("class_balanced", targets, generator) for _ in range(1500)])
    of_class = torch.bincount(targets[drawn], minlength=3) / len(drawn)
    assert of_class.tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    of_picture = torch.bincount(drawn, minlength=8) / len(drawn)
    assert of_picture.tolist() == pytest.approx([1 / 3, 1 / 15, 1 / 6, 1 / 15, 1 / 15, 1 / 6, 1 / 15, 1 / 15], abs=0.015)
    assert sorted(draw_order("instance", targets, generator).tolist()) == list(range(8))


def test_sampling_is_used_and_repeats(model: Any) -> None:
    X, y = skewed()
    first, again = (CoOp(model, NAMES, sampling="class_balanced", **QUICK).fit(X, y) for _ in range(2))
    assert torch.equal(first.context_, again.context_)
    assert not torch.equal(first.context_, CoOp(model, NAMES, **QUICK).fit(X, y).context_)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "hinge"}, "loss must be one of cross_entropy, class_balanced.* got 'hinge'"),
        ({"sampling": "often"}, "sampling must be one of instance, class_balanced, got 'often'"),
        ({"loss": "focal", "gamma": -1.0}, "gamma must be a finite number 0 or more, got -1.0"),
        ({"loss": "logit_adjustment", "tau": -1.0}, "tau must be a finite number 0 or more, got -1.0"),
    ],
)
def test_bad_settings(model: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CoOp(model, NAMES, **(QUICK | settings)).fit(*skewed())
