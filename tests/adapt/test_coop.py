"""CoOp beside the published training loop; its schedule, seeds, views, words, files; what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch.nn.functional import cross_entropy, normalize

import wordsight
from tests.adapt.towers import embedder
from wordsight.adapt import CoOp, ZeroShot, load_classifier
from wordsight.adapt.prompt_encoder import PromptEncoder
from wordsight.adapt.prompt_training import default_epochs, learning_rate_at
from wordsight.adapt.prompts import POSITIONS

NAMES = ["sea lion", "cat", "great_white_shark", "tree frog"]
QUICK = {"num_context_tokens": 4, "epochs": 3, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return wordsight.create("clip-tiny")


def shots(num: int, seed: int = 0, width: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Features around a direction a class, and the names."""
    g = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(len(NAMES), width))
    features = np.repeat(centres, num, axis=0) + 0.5 * g.normal(size=(num * len(NAMES), width))
    return features.astype(np.float32), np.repeat(NAMES, num)


def published_training(model: Any, features: torch.Tensor, targets: torch.Tensor, context: torch.Tensor, epochs: int) -> Any:
    """The published loop with whole prompts and one batch an epoch: (context, losses)."""
    tower, tokenizer = model.text_tower, model.tokenizer
    names = sorted(NAMES)
    num_context = len(context)
    tokens = tokenizer([" ".join(["X"] * num_context) + " " + name.replace("_", " ") + "." for name in names])
    embedded = tower.token_embedding(tokens).detach()
    prefix, suffix = embedded[:, :1], embedded[:, 1 + num_context :]
    context = context.clone().requires_grad_()
    optimizer = torch.optim.SGD([context], lr=0.002, momentum=0.9, weight_decay=5e-4)
    losses = []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-5 if epoch == 0 else 0.001 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        x = torch.cat([prefix, context.expand(len(names), -1, -1), suffix], dim=1) + tower.position_embedding
        x = tower.norm_final(tower.blocks.forward_tokens(x, is_causal=True))
        text = x[torch.arange(len(names)), tokens.argmax(1)] @ tower.projection
        logits = model.log_scale.exp() * normalize(features, dim=1) @ normalize(text, dim=1).T
        loss = cross_entropy(logits, targets)
        (context.grad,) = torch.autograd.grad(loss, context)
        optimizer.step()
        losses.append(loss.item())
    return context.detach(), losses


def test_training_is_the_published_one(model: Any) -> None:
    X, y = shots(4)
    epochs = 12
    start = 0.02 * torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([sorted(NAMES).index(name) for name in y])
    expected, losses = published_training(model, torch.from_numpy(X), targets, start, epochs)
    found = CoOp(model, classes=NAMES, epochs=epochs, seed=3).fit(X, y)
    torch.testing.assert_close(found.context_, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.tensor(found.loss_curve_), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    assert (expected - start).norm() > 0.01


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_the_accelerated_training_equals_the_definition(model: Any, position: Any, class_specific: bool) -> None:
    X, y = shots(3)
    made = [
        CoOp(model, NAMES, 4, position, class_specific, epochs=3, batch_size=5, learning_rate=0.02, **more).fit(X, y)
        for more in ({"exact_reference": True}, {}, {"class_chunk_tokens": 10})
    ]
    assert made[0].context_.shape == ((4, 4, 32) if class_specific else (4, 32))
    for other in made[1:]:
        torch.testing.assert_close(other.context_, made[0].context_, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.class_vectors_, made[0].class_vectors_, rtol=0, atol=1e-5)


def test_it_learns(model: Any) -> None:
    X, y = shots(4)
    learned = CoOp(model, num_context_tokens=4, epochs=40, learning_rate=0.1).fit(X, y)
    assert learned.loss_curve_[-1] < 0.8 * learned.loss_curve_[0]
    held_out = shots(10, seed=1)
    assert learned.score(*held_out) > ZeroShot(model, NAMES).fit().score(*held_out) + 0.2
    assert learned.classes_.tolist() == sorted(NAMES)
    assert len(learned.loss_curve_) == 40
    np.testing.assert_allclose(learned.predict_proba(X).sum(1), 1)
    assert set(learned.predict(X)) <= set(NAMES)


def test_class_vectors_are_the_plain_texts_where_the_context_is_words(model: Any) -> None:
    """One step of next to no rate: the classifier is zero-shot with those words."""
    X, y = shots(2)
    made = CoOp(model, NAMES, init="a photo of a", epochs=1, weight_decay=0.0).fit(X, y)
    plain = model.embed_texts([f"a photo of a {name.replace('_', ' ')}." for name in sorted(NAMES)])
    torch.testing.assert_close(made.class_vectors_, plain, rtol=0, atol=1e-3)
    assert made.context_.shape == (4, 32)


def test_schedule_and_epochs() -> None:
    assert [learning_rate_at(e, 50, 0.002) for e in (0, 1, 26)] == pytest.approx([1e-5, 0.002, 0.001])
    assert learning_rate_at(49, 50, 0.002) == pytest.approx(0.001 * (1 + math.cos(math.pi * 48 / 50)))
    found = [default_epochs(torch.tensor([0] * most + [1])) for most in (1, 2, 3, 4, 6, 8, 16, 500)]
    assert found == [50, 100, 100, 100, 150, 200, 200, 200]


def test_published_epochs_are_taken_by_the_class_with_most_shots(model: Any) -> None:
    X, y = shots(1)
    assert len(CoOp(model, NAMES, 1).fit(X, y).loss_curve_) == 50


def test_seeds_repeat_on_one_thread_and_on_two(model: Any) -> None:
    X, y = shots(3)

    def fit(seed: int, threads: int = 1) -> CoOp:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return CoOp(model, NAMES, 4, epochs=2, seed=seed, learning_rate=0.05).fit(X, y)
        finally:
            torch.set_num_threads(before)

    first = fit(1)
    assert torch.equal(fit(1).context_, first.context_)
    assert not torch.equal(fit(2).context_, first.context_)
    two = fit(1, threads=2)
    # torch promises equal bits for equal thread counts; between counts sums may be put together in another order
    torch.testing.assert_close(two.context_, first.context_, rtol=0, atol=1e-5)
    assert two.predict(X).tolist() == first.predict(X).tolist()


def test_the_global_random_state_is_left_alone(model: Any) -> None:
    state = torch.get_rng_state()
    CoOp(model, NAMES, **QUICK).fit(*shots(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_epoch_takes_its_view(model: Any) -> None:
    from wordsight.adapt import ImageFeatures

    X, y = shots(2)
    views = torch.stack([torch.from_numpy(X), torch.from_numpy(-X[:, ::-1].copy())])
    features = ImageFeatures(torch.from_numpy(X), views)
    both = CoOp(model, NAMES, num_views=2, **QUICK).fit(features, y)
    one = CoOp(model, NAMES, num_views=1, **QUICK).fit(features, y)
    fixed = CoOp(model, NAMES, **QUICK).fit(features, y)
    assert torch.equal(one.context_, fixed.context_)
    assert both.loss_curve_[0] == fixed.loss_curve_[0]
    assert abs(both.loss_curve_[1] - fixed.loss_curve_[1]) > 1e-3


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    CoOp(model, NAMES, **QUICK).fit(*shots(1))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_text_is_encoded_once_for_all_pictures(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CoOp(model, NAMES, **QUICK).fit(*shots(1))
    monkeypatch.setattr(PromptEncoder, "__call__", lambda *args: pytest.fail("the text tower ran"))
    assert set(made.predict(shots(5)[0])) <= set(NAMES)


def test_bfloat16_is_near(model: Any) -> None:
    X, y = shots(3)
    exact, near = (CoOp(model, NAMES, precision=precision, **QUICK).fit(X, y) for precision in ("fp32", "bf16"))
    assert 0 < (exact.context_ - near.context_).norm() < 0.1 * exact.context_.norm()
    assert near.context_.dtype == torch.float32


def test_other_class_names(model: Any) -> None:
    made = CoOp(model, NAMES, **QUICK).fit(*shots(2))
    new = made.with_classes(["zebra", "apple pie", "cat"])
    assert new.classes_.tolist() == ["apple pie", "cat", "zebra"]
    assert torch.equal(new.context_, made.context_)
    torch.testing.assert_close(new.class_vectors_[1], made.class_vectors_[0], rtol=0, atol=1e-6)
    assert made.classes_.tolist() == sorted(NAMES)
    own = CoOp(model, NAMES, class_specific=True, **QUICK).fit(*shots(1))
    with pytest.raises(ValueError, match="class-specific context belongs to the classes"):
        own.with_classes(["zebra", "apple pie"])


def test_a_context_from_elsewhere_follows_the_names_as_given(model: Any) -> None:
    shared = torch.randn(3, 32)
    made = CoOp.from_context(model, NAMES, shared, position="middle", published_tokens=True)
    expected = normalize(PromptEncoder(model, sorted(NAMES), 3, "middle", exact_reference=True)(shared), dim=1)
    torch.testing.assert_close(made.class_vectors_, expected, rtol=0, atol=1e-5)
    own = torch.randn(4, 3, 32)
    made = CoOp.from_context(model, NAMES, own)
    for name, context in zip(NAMES, own, strict=True):
        assert torch.equal(made.context_[made.classes_.tolist().index(name)], context)
    assert made.predict(shots(1)[0]).shape == (4,)
    with pytest.raises(ValueError, match=r"a class-specific context is \[4, 3, 32\] .* got \(5, 3, 32\)"):
        CoOp.from_context(model, NAMES, torch.randn(5, 3, 32))
    with pytest.raises(ValueError, match=r"\[3, 32\].* got \(3, 16\)"):
        CoOp.from_context(model, NAMES, torch.randn(3, 16))
    with pytest.raises(ValueError, match="infinite or undefined"):
        CoOp.from_context(model, NAMES, torch.full((3, 32), torch.nan))
    with pytest.raises(ValueError, match="a context is"):
        CoOp.from_context(model, NAMES, torch.randn(32))


def test_nearest_words(model: Any) -> None:
    ids = model.tokenizer.encode("photo of zebra")
    embedding = model.text_tower.token_embedding.weight.detach()
    made = CoOp.from_context(model, NAMES, embedding[ids])
    found = made.nearest_words(3)
    assert [[len(found), len(found[0])], [rows[0][0] for rows in found]] == [[3, 3], ["photo", "of", "zebra"]]
    for (_, nearest), *others in found:
        assert nearest == pytest.approx(0, abs=1e-7)
        assert all(distance > 0.01 for _, distance in others)
    word, distance = found[0][1]
    by_hand = (embedding - embedding[ids[0]]).norm(dim=1).sort()
    assert distance == pytest.approx(by_hand.values[1].item(), rel=1e-5)
    assert word == (model.tokenizer.decode([by_hand.indices[1].item()]) or f"<token {by_hand.indices[1].item()}>")
    own = CoOp.from_context(model, NAMES, embedding[ids].expand(4, -1, -1)).nearest_words(1)
    assert [[word for [(word, _)] in rows] for rows in own] == [["photo", "of", "zebra"]] * 4
    with pytest.raises(ValueError, match=r"k must be in \[1, 49408\], got 0"):
        made.nearest_words(0)


@pytest.mark.parametrize("class_specific", [False, True])
def test_files(model: Any, tmp_path: Path, class_specific: bool) -> None:
    X, y = shots(2)
    made = CoOp(model, NAMES, class_specific=class_specific, **QUICK).fit(X, y)
    made.save(tmp_path / "c", with_model=False)
    read = load_classifier(tmp_path / "c", model)
    assert torch.equal(read.logits(X), made.logits(X))
    assert torch.equal(read.context_, made.context_)
    assert read.loss_curve_ == made.loss_curve_
    assert read.nearest_words(1) == made.nearest_words(1)


def test_grid_search_and_clones_share_the_model(model: Any) -> None:
    X, y = shots(3)
    search = GridSearchCV(CoOp(model, NAMES, epochs=2), {"num_context_tokens": [1, 4]}, cv=3).fit(X, y)
    assert search.best_estimator_.model is model
    assert clone(CoOp(model, NAMES, 2)).get_params()["num_context_tokens"] == 2


@pytest.mark.parametrize("name", ["siglip", "bert cls", "lit causal"])
def test_any_tower(name: str) -> None:
    towers = embedder(name)
    towers.log_scale = torch.tensor(2.0)
    width = 6 if name.startswith("lit") else 8
    X, y = shots(2, width=width)
    plain, quick = (CoOp(towers, NAMES, exact_reference=exact, **QUICK).fit(X, y) for exact in (True, False))
    torch.testing.assert_close(quick.context_, plain.context_, rtol=0, atol=1e-6)
    assert quick.class_vectors_.dtype == torch.float32


def test_what_is_not_finite_stops_with_the_step(model: Any) -> None:
    X, y = shots(2)
    with pytest.raises(ValueError, match=r"CoOp's loss is nan at step 2 \(epoch 2 of 3\): lower learning_rate"):
        CoOp(model, NAMES, 4, init="a", epochs=3, weight_decay=1e38).fit(X, y)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
        ({"epochs": 0}, "epochs must be at least 1, or None for the published number, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"position": "start"}, "position must be one of"),
        ({"num_context_tokens": 30}, r"room for 0: of the 32 tokens of a text, 30 are context"),
        ({"init": " "}, "init=' ' has no tokens"),
    ],
)
def test_bad_settings(model: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CoOp(model, NAMES, **settings).fit(*shots(1))


def test_features_of_another_width(model: Any) -> None:
    with pytest.raises(ValueError, match="the features have 20 numbers and the model's texts 512"):
        CoOp(model, NAMES, **QUICK).fit(*shots(1, width=20))
