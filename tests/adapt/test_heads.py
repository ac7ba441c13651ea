"""ClipAdapter, LPPlusPlus, CLAP and CrossModalProbe beside plain loops of their published computations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot, relu

from tests.adapt.shots import NAMES, WIDTH, TinyEmbedder, shots
from wordsight.adapt import CLAP, ClipAdapter, CrossModalProbe, ImageFeatures, LPPlusPlus, ZeroShot
from wordsight.adapt.clap import zero_shot_certainty

C = len(NAMES)


@pytest.fixture(scope="module")
def model() -> TinyEmbedder:
    return TinyEmbedder()


def places(y: np.ndarray) -> torch.Tensor:
    return torch.tensor([sorted(NAMES).index(name) for name in y])


def raw_texts(model: TinyEmbedder) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_text(model.tokenize([f"A photo of a {name}." for name in sorted(NAMES)]), normalize=False)


def rate(epoch: int, epochs: int, lr: float) -> float:
    return 1e-5 if epoch == 0 else lr / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


# ------------------------------------------------------------------------------------------------------------- ClipAdapter


def test_clip_adapter_is_trained_as_published(model: TinyEmbedder) -> None:
    X, y = shots(4, noise=1.5)
    found = ClipAdapter(model, epochs=5, batch_size=8, learning_rate=0.1, seed=2).fit(X, y)
    f, targets, text = torch.tensor(X), places(y), normalize(raw_texts(model), dim=1)
    generator = torch.Generator().manual_seed(2)
    down = (2 * torch.rand(6, WIDTH, generator=generator) - 1) / WIDTH**0.5
    up = (2 * torch.rand(WIDTH, 6, generator=generator) - 1) / 6**0.5
    layers = [torch.nn.Parameter(down), torch.nn.Parameter(up)]
    optimizer = torch.optim.SGD(layers, lr=0.1, momentum=0.9, weight_decay=5e-4)

    def logits(f: torch.Tensor) -> torch.Tensor:
        x = 0.2 * relu(relu(f @ layers[0].T) @ layers[1].T) + 0.8 * f
        return math.exp(3.0) * normalize(x, dim=1) @ text.T

    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = rate(epoch, 5, 0.1)
        for rows in torch.randperm(20, generator=generator)[:16].split(8):  # the 4 that fill no batch are left out
            optimizer.zero_grad()
            cross_entropy(logits(f[rows]), targets[rows]).backward()
            optimizer.step()
    torch.testing.assert_close(found.down_, layers[0].detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.up_, layers[1].detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits(X), logits(f).detach(), atol=1e-3, rtol=1e-4)
    assert len(found.loss_curve_) == 5
    with pytest.raises(ValueError, match="no linear function"):
        found.linear_head()


def test_clip_adapters_ratio(model: TinyEmbedder) -> None:
    X, y = shots(4)
    quick = {"epochs": 3, "learning_rate": 0.05}
    none = ClipAdapter(model, ratio=0, **quick).fit(X, y)
    torch.testing.assert_close(none.logits(X), ZeroShot(model, classes=NAMES).fit().logits(X))
    held_out = shots(10, seed=3)
    found = ClipAdapter(model, ratio="search", **quick).fit(X, y, validation=held_out)
    scores = {i / 10: ClipAdapter(model, ratio=i / 10, **quick).fit(X, y).score(*held_out) for i in range(1, 11)}
    assert found.ratio_ == max(scores, key=lambda ratio: (scores[ratio], -ratio))
    assert found.score(*held_out) == max(scores.values())
    assert ClipAdapter(model, ratio="search", **quick).fit(X, y).ratio_ == 0.2


def test_views_take_turns(model: TinyEmbedder) -> None:
    X, y = shots(2)
    same = torch.tensor(X).expand(3, -1, -1)
    settings = {"epochs": 4, "learning_rate": 0.05}
    one = ClipAdapter(model, **settings).fit(X, y)
    three = ClipAdapter(model, num_views=3, **settings).fit(ImageFeatures(torch.tensor(X), same), y)
    assert torch.equal(one.down_, three.down_)
    other = ClipAdapter(model, num_views=2, **settings).fit(ImageFeatures(torch.tensor(X), torch.stack([same[0], -same[0]])), y)
    assert not torch.allclose(one.down_, other.down_)


# -------------------------------------------------------------------------------------------------------------- LPPlusPlus


def test_lp_plus_plus_is_the_published_descent(model: TinyEmbedder) -> None:
    X, y = shots(4, noise=1.5)
    found = LPPlusPlus(model, iterations=25).fit(X, y)
    f, targets = normalize(torch.tensor(X), dim=1).double(), places(y)
    text, hot = normalize(raw_texts(model), dim=1).double(), one_hot(targets).double()
    w, b, speed_w, speed_b = hot.T @ f, torch.zeros(C).double(), 0.0, 0.0
    similarity = f @ text.T
    a = torch.full((C,), float(250 * ((hot * similarity).sum(0) / 4).mean())).double()
    rate_w = 4 * 20 / float(torch.linalg.eigvalsh(f.T @ f).max())
    rate_a = 20 / (4 * float(similarity.square().sum(0).max()))
    for step in range(1, 26):
        residual = ((f @ w.T + b + a * similarity).softmax(1) - hot) / 20
        speed_w, speed_b = 0.9 * speed_w + residual.T @ f, 0.9 * speed_b + residual.sum(0)
        w, b = w - rate_w * speed_w, b - rate_w * speed_b
        if step % 10 == 0:
            a = a - rate_a * (residual * similarity).sum(0)
    torch.testing.assert_close(found.class_vectors_.double(), w + a[:, None] * text, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(found.bias_.double(), b, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found.alpha_.double(), a, atol=1e-3, rtol=1e-5)
    assert found.iteration_ == 25
    assert found.loss_curve_[-1] < found.loss_curve_[0]


def test_lp_plus_plus_keeps_the_iteration_that_is_best_on_validation(model: TinyEmbedder) -> None:
    X, y = shots(2, noise=2.0)
    held_out = shots(20, seed=4, noise=2.0)
    found = LPPlusPlus(model, iterations=40).fit(X, y, validation=held_out)
    scores = [LPPlusPlus(model, iterations=n).fit(X, y).score(*held_out) for n in range(1, 41)]
    assert found.score(*held_out) == max(scores)
    assert found.iteration_ == 40 - scores[::-1].index(max(scores))


# --------------------------------------------------------------------------------------------------------------------- CLAP


@pytest.mark.parametrize("pull", [True, False])
def test_clap_is_trained_as_published(model: TinyEmbedder, pull: bool) -> None:
    X, y = shots(4, noise=1.5)
    views = torch.stack([torch.tensor(shots(4, noise=1.5)[0]), torch.tensor(X) + 1])
    settings = {"epochs": 6, "batch_size": 8, "learning_rate": 0.5, "seed": 1, "pull": pull, "num_views": 2}
    found = CLAP(model, **settings).fit(ImageFeatures(torch.tensor(X), views), y)
    f, targets = normalize(views.flatten(0, 1), dim=1), places(y).repeat(2)
    text = raw_texts(model)
    scale = math.exp(3.0)
    zero_shot = (scale * f @ normalize(text, dim=1).T).softmax(1)
    certainty = torch.stack([zero_shot[targets == c, c].mean() for c in range(C)])
    w = torch.nn.Parameter(text.clone())
    optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = rate(epoch, 6, 0.5)
        for rows in torch.randperm(40, generator=generator).split(8)[:2]:  # 20 pictures make 2 batches, of 40 rows
            loss = cross_entropy(scale * f[rows] @ normalize(w, dim=1).T, targets[rows])
            loss = loss + (certainty * (w - text).pow(2).sum(1)).mean() * pull
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(found.class_vectors_, normalize(w.detach(), dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pull_, certainty * pull, atol=1e-5, rtol=1e-4)


def test_claps_pull_is_how_sure_zero_shot_is() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    found = zero_shot_certainty(p.log(), torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(found, torch.tensor([0.6, 0.6, 0.4]))


def test_claps_pull_holds_the_vectors(model: TinyEmbedder) -> None:
    X, y = shots(4, noise=1.5)
    text = normalize(raw_texts(model), dim=1)
    held, free = (CLAP(model, epochs=50, pull=pull).fit(X, y).class_vectors_ for pull in (True, False))
    assert (held * text).sum(1).mean() > (free * text).sum(1).mean()


# ---------------------------------------------------------------------------------------------------------- CrossModalProbe


def test_cross_modal_probe_is_trained_as_published(model: TinyEmbedder) -> None:
    X, y = shots(4, noise=1.5)
    templates = ["a photo of a {label}.", "art of the {label}."]
    found = CrossModalProbe(model, prompts=templates, iterations=130, batch_size=8, seed=5).fit(X, y)
    f, targets = normalize(torch.tensor(X), dim=1), places(y)
    texts = [template.replace("{label}", name) for name in sorted(NAMES) for template in templates]
    with torch.no_grad():
        t = normalize(model.encode_text(model.tokenize(texts)), dim=1)
    start = normalize(t.unflatten(0, (C, 2)).mean(1), dim=1)
    w = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(5)

    def rows(num: int, size: int) -> Any:
        while True:
            yield from torch.randperm(num, generator=generator)[: num // size * size].split(size)

    pictures, others = rows(20, 4), rows(10, 4)
    for step in range(130):
        warm = 1e-5 if step == 0 else 1e-3 * step / 50
        optimizer.param_groups[0]["lr"] = warm if step < 50 else 5e-4 * (1 + math.cos(math.pi * (step - 50) / 130))
        own, other = next(pictures), next(others)
        logits = math.exp(3.0) * torch.cat([f[own], t[other]]) @ w.T
        loss = cross_entropy(logits, torch.cat([targets[own], torch.arange(C).repeat_interleave(2)[other]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found.class_vectors_, w.detach(), atol=1e-5, rtol=1e-4)
    assert found.chosen_ == {"learning_rate": 1e-3, "weight_decay": 0.01, "batch_size": 8, "iteration": 130}
    assert len(found.loss_curve_) == 2
    assert (found.class_vectors_ - start).norm() > 0.05


def test_cross_modal_probe_chooses_on_validation(model: TinyEmbedder) -> None:
    X, y = shots(2, noise=2.0)
    held_out = shots(20, seed=4, noise=2.0)
    found = CrossModalProbe(model, iterations=300).fit(X, y, validation=held_out)
    scores = {}
    for learning_rate in (1e-3, 1e-4):
        for weight_decay in (0.0, 0.01, 1e-4):
            for batch_size in (8, 32):
                settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "batch_size": batch_size}
                one = CrossModalProbe(model, iterations=300, **settings).fit(X, y, validation=held_out)
                assert {key: one.chosen_[key] for key in settings} == settings
                assert one.chosen_["iteration"] in (100, 200, 300)
                scores[tuple(settings.values())] = one.score(*held_out)
    chosen = tuple(found.chosen_[key] for key in ("learning_rate", "weight_decay", "batch_size"))
    assert found.score(*held_out) == scores[chosen] == max(scores.values())
    assert len(found.loss_curve_) == 3
    vectors, scale, bias = found.linear_head()
    f = normalize(torch.tensor(held_out[0]), dim=1)
    torch.testing.assert_close(scale * f @ vectors.T + bias, found.logits(held_out[0]))


# -------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (ClipAdapter, {"ratio": 1.5}, r"ratio must be a number in \[0, 1\] or 'search', got 1.5"),
        (ClipAdapter, {"ratio": "best"}, "ratio must be"),
        (ClipAdapter, {"reduction": 25}, "reduction must be at most the features' width 24, got 25"),
        (ClipAdapter, {"learning_rate": math.inf}, "learning_rate must be a number above 0, got inf"),
        (LPPlusPlus, {"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        (CLAP, {"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        (CLAP, {"momentum": -1}, "momentum must be a number of at least 0, got -1"),
        (CrossModalProbe, {"batch_size": 9}, "batch_size must be an even number of at least 2"),
        (CrossModalProbe, {"learning_rate": -1.0}, "learning_rate must be above 0, or None, got -1.0"),
    ],
)
def test_bad_settings_are_named(model: TinyEmbedder, method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(model, **settings).fit(*shots(2))


@pytest.mark.parametrize("method", [ClipAdapter, CLAP, CrossModalProbe])
def test_a_loss_that_is_not_finite_names_its_step(model: TinyEmbedder, method: Any) -> None:
    with pytest.raises(ValueError, match=rf"{method.__name__}'s loss is .*(nan|inf).* at step \d+"):
        method(model, learning_rate=1e38).fit(*shots(3))
