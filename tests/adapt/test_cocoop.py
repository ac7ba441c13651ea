"""CoCoOp beside the published loop over pictures; its sizes, files, other names; what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import cross_val_score
from torch.nn.functional import cross_entropy, linear, normalize, relu

import wordsight
from tests.adapt.test_coop import NAMES, shots
from tests.adapt.towers import embedder
from wordsight.adapt import CoCoOp, load_classifier
from wordsight.data.tokenize import train_tokenizer
from wordsight.nn.text import TextConfig, TextTransformer

QUICK = {"epochs": 2, "batch_size": 3, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return wordsight.create("clip-tiny")


def published_logits(model: Any, features: torch.Tensor, learned: list[torch.Tensor], names: list[str]) -> torch.Tensor:
    """One picture after the other: its shift on the context, all C x L tokens, the cosines."""
    context, *net = learned
    tower, tokenizer = model.text_tower, model.tokenizer
    tokens = tokenizer([" ".join(["X"] * len(context)) + " " + name.replace("_", " ") + "." for name in names])
    embedded = tower.token_embedding(tokens).detach()
    prefix, suffix = embedded[:, :1], embedded[:, 1 + len(context) :]
    rows = []
    for picture in features:
        picture = normalize(picture, dim=0)
        shifted = context + linear(relu(linear(picture, net[0], net[1])), net[2], net[3])
        x = torch.cat([prefix, shifted.expand(len(names), -1, -1), suffix], dim=1) + tower.position_embedding
        x = tower.norm_final(tower.blocks.forward_tokens(x, is_causal=True))
        text = x[torch.arange(len(names)), tokens.argmax(1)] @ tower.projection
        rows.append(model.log_scale.exp() * normalize(text, dim=1) @ picture)
    return torch.stack(rows)


def learned_of(made: CoCoOp) -> list[torch.Tensor]:
    return [made.context_, made.hidden_weight_, made.hidden_bias_, made.shift_weight_, made.shift_bias_]


def test_training_and_prediction_are_the_published_ones(model: Any) -> None:
    X, y = shots(2)
    features, names = torch.from_numpy(X), sorted(NAMES)
    targets = torch.tensor([names.index(name) for name in y])
    # one step of next to no rate leaves what it starts from
    start = CoCoOp(model, NAMES, epochs=1, learning_rate=1e-9, weight_decay=0.0, batch_size=8, seed=5).fit(X, y)
    torch.testing.assert_close(
        start.context_, model.text_tower.token_embedding.weight[model.tokenizer.encode("a photo of a")], rtol=0, atol=1e-3
    )
    found = CoCoOp(model, NAMES, epochs=3, batch_size=8, learning_rate=0.02, seed=5).fit(X, y)

    torch.manual_seed(5)
    net = [torch.nn.Linear(512, 32), torch.nn.Linear(32, 32)]
    parameters = [model.text_tower.token_embedding.weight[model.tokenizer.encode("a photo of a")].detach().clone()]
    parameters += [p.detach() for layer in net for p in layer.parameters()]
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)
    for epoch, rate in enumerate((1e-5, 0.02, 0.01 * (1 + np.cos(np.pi / 3)))):
        optimizer.param_groups[0]["lr"] = rate
        loss = cross_entropy(published_logits(model, features, parameters, names), targets)
        assert found.loss_curve_[epoch] == pytest.approx(loss.item(), rel=1e-4)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for ours, theirs in zip(learned_of(found), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    with torch.no_grad():
        expected = published_logits(model, features, learned_of(found), names)
    torch.testing.assert_close(found.logits(X), expected, rtol=0, atol=1e-4)


def test_how_many_are_computed_at_once_changes_nothing(model: Any) -> None:
    X, y = shots(3)
    made = [
        CoCoOp(model, NAMES, **QUICK, **more).fit(X, y)
        for more in ({}, {"class_chunk_tokens": 10}, {"class_chunk_tokens": 40}, {"exact_reference": True})
    ]
    for other in made[1:]:
        torch.testing.assert_close(other.context_, made[0].context_, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.logits(X), made[0].logits(X), rtol=0, atol=1e-3)
        alone = torch.cat([other.logits(x[None]) for x in X])
        torch.testing.assert_close(alone, other.logits(X), rtol=0, atol=1e-4)


def test_parameters_of_the_published_size() -> None:
    """ViT-B/16's widths, 512 and 512, and 4 tokens: 35,360."""
    tokenizer = train_tokenizer(["a cat and a dog"], 520)
    tower = TextTransformer(TextConfig(vocab_size=tokenizer.vocab_size, num_layers=1), 512, "quick_gelu")
    towers = SimpleNamespace(text_tower=tower, tokenizer=tokenizer, log_scale=torch.tensor(4.6))
    g = np.random.default_rng(0)
    made = CoCoOp(towers, ["cat", "dog"], 4, init=None, epochs=1).fit(g.normal(size=(2, 512)), ["cat", "dog"])
    assert sum(tensor.numel() for tensor in learned_of(made)) == 35_360


def test_it_learns_and_repeats(model: Any) -> None:
    X, y = shots(4)
    settings = {"epochs": 12, "batch_size": 4, "learning_rate": 0.05}
    first, again, other = (CoCoOp(model, NAMES, seed=seed, **settings).fit(X, y) for seed in (1, 1, 2))
    assert first.loss_curve_[-1] < 0.8 * first.loss_curve_[0]
    assert all(torch.equal(a, b) for a, b in zip(learned_of(first), learned_of(again), strict=True))
    assert not torch.equal(first.context_, other.context_)
    assert first.score(X, y) > 0.5


def test_defaults_are_the_published_ones() -> None:
    settings = CoCoOp().get_params()
    published = {"num_context_tokens": 4, "init": "a photo of a", "epochs": 10, "batch_size": 1, "learning_rate": 0.002}
    assert published.items() <= settings.items()


def test_other_class_names(model: Any) -> None:
    X, y = shots(2)
    made = CoCoOp(model, NAMES, **QUICK).fit(X, y)
    new = made.with_classes(["zebra", "cat"])
    assert new.classes_.tolist() == ["cat", "zebra"]
    torch.testing.assert_close(new.logits(X)[:, 0], made.logits(X)[:, 0], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="given more than once"):
        made.with_classes(["zebra", "zebra"])
    with pytest.raises(ValueError, match="has room for"):
        made.with_classes(["zebra", "y " * 40])


def test_files(model: Any, tmp_path: Path) -> None:
    X, y = shots(2)
    made = CoCoOp(model, NAMES, **QUICK).fit(X, y)
    made.save(tmp_path / "c", with_model=False)
    read = load_classifier(tmp_path / "c", model)
    assert torch.equal(read.logits(X), made.logits(X))


def test_learned_elsewhere(model: Any) -> None:
    X, y = shots(2)
    made = CoCoOp(model, NAMES, **QUICK).fit(X, y)
    context, *net = learned_of(made)
    taken = CoCoOp.from_context(model, NAMES, context, tuple(net))
    torch.testing.assert_close(taken.logits(X), made.logits(X), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"CoCoOp's context is \[M, W\].* \(1, 4, 32\)"):
        CoCoOp.from_context(model, NAMES, context[None], tuple(net))
    with pytest.raises(ValueError, match=r"meta_net is \[H, D\].* W = 32"):
        CoCoOp.from_context(model, NAMES, context, (net[0], net[1], net[2].T[:3], net[3]))
    with pytest.raises(ValueError, match="infinite or undefined"):
        CoCoOp.from_context(model, NAMES, context, (net[0] * torch.nan, *net[1:]))
    with pytest.raises(ValueError, match=r"a context is \[4, 32\]"):
        CoCoOp.from_context(model, NAMES, torch.zeros(4, 20), (net[0], net[1], net[2][:20], net[3][:20]))


@pytest.mark.parametrize("name", ["siglip", "bert mean", "lit causal"])
def test_any_tower(name: str) -> None:
    towers = embedder(name)
    towers.log_scale = torch.tensor(2.0)
    X, y = shots(2, width=6 if name.startswith("lit") else 8)
    plain, quick = (CoCoOp(towers, NAMES, init=None, exact_reference=exact, **QUICK).fit(X, y) for exact in (True, False))
    for ours, theirs in zip(learned_of(quick), learned_of(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_cross_validation_and_bfloat16(model: Any) -> None:
    X, y = shots(4)
    assert len(cross_val_score(CoCoOp(model, precision="bf16", **QUICK), X, y, cv=2)) == 2


def test_bad_settings(model: Any) -> None:
    for settings, says in (
        ({"precision": "half"}, "precision must be one of"),
        ({"epochs": -1}, "epochs must be at least 1"),
        ({"init": "y " * 40}, "has room for 0"),
    ):
        with pytest.raises(ValueError, match=says):
            CoCoOp(model, NAMES, **settings).fit(*shots(1))
