"""Weights between zero-shot and fine-tuned: exact at both ends, a line between them, chosen on validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapt.test_decoder import LABELS, create, pictures
from tests.adapt.test_fine_tune import CLASSES, FAST, PARTS, colours
from wordsight.adapt import CLAP, LIFT, CrossModalProbe, FineTune, LinearProbe, Projection, image_features, load_classifier
from wordsight.adapt.decoder import class_vectors
from wordsight.adapt.estimator import AdaptedClassifier
from wordsight.adapt.wise_ft import ALPHAS, WisePoint, choose_alpha, wise_ft, wise_ft_curve
from wordsight.adapt.zero_shot import ZeroShot
from wordsight.types import Metric


@pytest.fixture(scope="module")
def model() -> Any:
    return create()


def fitted(kind: str, model: Any) -> AdaptedClassifier:
    match kind.split():
        case ["projection"]:
            return Projection(model, epochs=10, learning_rate=1e-2, learn_head=True).fit(colours(), LABELS)
        case ["clap"]:
            return CLAP(model, epochs=5, learning_rate=2.0).fit(colours(), LABELS)
        case ["cross_modal"]:
            return CrossModalProbe(model, iterations=20).fit(colours(), LABELS)
        case ["ldam"]:
            return FineTune(model, loss="ldam", **FAST).fit(colours(), LABELS)
        case [part, head]:
            return FineTune(model, part=part, head=head, **FAST).fit(colours(), LABELS)  # type: ignore[arg-type]
    raise AssertionError(kind)


KINDS = [*(f"{part} cosine" for part in PARTS), "full linear", "lora linear", "ldam", "projection", "clap", "cross_modal"]


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_are_exact(kind: str, model: Any) -> None:
    found = fitted(kind, model)
    before = found.logits(pictures())
    zero_shot = ZeroShot(model, CLASSES).fit().logits(pictures())
    assert float((before - zero_shot).abs().max()) > 0.05  # there is something between them
    torch.testing.assert_close(wise_ft(found, 0).logits(pictures()), zero_shot, rtol=1e-5, atol=2e-5)
    assert torch.equal(wise_ft(found, 1).logits(pictures()), before)
    assert torch.equal(found.logits(pictures()), before)  # stays as it is
    half = wise_ft(found, 0.5).logits(pictures())
    assert not torch.allclose(half, before)
    assert not torch.allclose(half, zero_shot)


@pytest.mark.parametrize("name", ["align-tiny", "clip-tiny-resnet", "lit-tiny"])
def test_zero_is_the_models_own_weights_bit_by_bit(name: str) -> None:
    model = create(name)
    found = FineTune(model, **FAST).fit(colours(), LABELS)
    back = wise_ft(found, 0)
    own = dict(model.image_tower.named_parameters())
    assert all(torch.equal(value, own[key]) for key, value in back.tuned_.tower.named_parameters())
    assert torch.equal(back.tuned_.head.weight, class_vectors(back))
    assert back.scale_ == back.tuned_.head.scale == pytest.approx(float(model.log_scale.detach().exp()))


def test_between_them_lies_a_line(model: Any) -> None:
    found = FineTune(model, head="linear", **FAST).fit(colours(), LABELS)
    start = wise_ft(found, 0).tuned_.learned()
    for name, value in wise_ft(found, 0.3).tuned_.learned().items():
        torch.testing.assert_close(value, 0.7 * start[name] + 0.3 * found.tuned_.learned()[name])
    scaled = FineTune(model, scale=5.0, **FAST).fit(colours(), LABELS)
    own = float(model.log_scale.detach().exp())
    assert wise_ft(scaled, 0.25).tuned_.head.scale == pytest.approx(0.75 * own + 0.25 * 5)


def test_of_lora_the_merged_matrices_are_interpolated(model: Any) -> None:
    found = FineTune(model, part="lora", **FAST).fit(colours(), LABELS)
    mixed = wise_ft(found, 0.4)
    for own, low, between in zip(model.image_tower.blocks, found.tuned_.tower.blocks, mixed.tuned_.tower.blocks, strict=True):  # type: ignore[arg-type]
        expected = 0.6 * own.attn.qkv.weight + 0.4 * low.attn.qkv.weight
        torch.testing.assert_close(between.attn.qkv.weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["last cosine", "lora linear", "ldam", "projection"])
def test_a_mixture_is_a_classifier_like_others(kind: str, model: Any, tmp_path: Path) -> None:
    mixed = wise_ft(fitted(kind, model), 0.6)
    loaded = load_classifier(mixed.save(tmp_path, with_model=False), model)
    assert torch.equal(loaded.logits(pictures()), mixed.logits(pictures()))
    assert mixed.score(colours(), LABELS) > 0.5


def test_a_curve_says_what_each_alpha_is_worth(model: Any) -> None:
    found = FineTune(model, **FAST).fit(colours(), LABELS)
    given, labels = [*colours(), *pictures()], [*LABELS, *LABELS]
    curve = wise_ft_curve(found, given, labels, alphas=(0, 0.5, 1))
    assert [point.alpha for point in curve] == [0, 0.5, 1]
    for point in curve:
        one = wise_ft(found, point.alpha)
        assert point.top1.value == one.score(given, labels)
        assert point.top1.count == 24
        assert point.top1.ci95[0] < point.top1.value < point.top1.ci95[1]
        recalls = [np.mean(one.predict(given)[np.array(labels) == name] == name) for name in CLASSES]
        assert point.mean_per_class.value == pytest.approx(np.mean(recalls))
    assert len(wise_ft_curve(found, colours(), LABELS)) == len(ALPHAS) == 11
    features = image_features(model, colours(), layer="penultimate")
    projection = Projection(model, epochs=5).fit(features, LABELS)
    assert wise_ft_curve(projection, features, LABELS, [1])[0].top1.value == projection.score(features, LABELS)


@pytest.mark.parametrize("kind", [Projection, FineTune])
def test_an_estimator_does_it_itself_by_a_share_or_on_validation(kind: Any, model: Any, tmp_path: Path) -> None:
    settings = {"epochs": 5, "num_views": 0, "learning_rate": 3e-2 if kind is Projection else 3e-3, "loss": "balanced_softmax"}
    given, others = colours(), (colours(24)[12:], LABELS)
    if kind is Projection:
        given, others = (image_features(model, one, layer="penultimate") for one in (given, others[0]))  # type: ignore[assignment]
        others = (others, LABELS)
    plain = kind(model, **settings).fit(given, LABELS, validation=others)
    assert plain.wise_ft_ is None
    half = kind(model, wise_ft=0.3, **settings).fit(given, LABELS)
    assert half.wise_ft_ == 0.3
    assert torch.equal(half.logits(given), wise_ft(plain, 0.3).logits(given))
    chosen = kind(model, wise_ft="validation", **settings).fit(given, LABELS, validation=others)
    best = choose_alpha(wise_ft_curve(plain, *others)).alpha
    assert 0 < best < 1
    assert chosen.wise_ft_ == best
    assert torch.equal(chosen.logits(given), wise_ft(plain, best).logits(given))
    loaded = load_classifier(chosen.save(tmp_path, with_model=False), model)
    assert loaded.wise_ft_ == best
    assert torch.equal(loaded.logits(given), chosen.logits(given))
    nearer = wise_ft(half, 0.5)
    assert nearer.wise_ft_ == 0.15
    torch.testing.assert_close(nearer.logits(given), wise_ft(plain, 0.15).logits(given), rtol=1e-5, atol=1e-5)
    for wrong in (-0.1, 1.1, float("nan"), "test"):
        with pytest.raises(ValueError, match="wise_ft must be a number of 0 to 1, 'validation' or None, got"):
            kind(model, wise_ft=wrong, **settings).fit(given, LABELS)
    with pytest.raises(ValueError, match="chooses on validation pictures, and there are none"):
        kind(model, wise_ft="validation", **settings).fit(given, LABELS)


def test_the_best_is_chosen_and_of_equals_the_nearest_to_zero_shot() -> None:
    def point(alpha: float, top1: float, mean: float) -> WisePoint:
        return WisePoint(alpha=alpha, top1=Metric(top1, 9, (0, 1)), mean_per_class=Metric(mean, 9, (0, 1)))

    points = [point(0, 0.5, 0.3), point(0.5, 0.6, 0.7), point(0.7, 0.8, 0.7), point(1, 0.8, 0.6)]
    assert choose_alpha(points).alpha == 0.5
    assert choose_alpha(points, by="top1").alpha == 0.7
    with pytest.raises(ValueError, match="by must be one of top1, mean_per_class, got 'f1'"):
        choose_alpha(points, by="f1")
    with pytest.raises(ValueError, match="no points to choose from"):
        choose_alpha([])


def test_what_has_no_zero_shot_start_is_named(model: Any) -> None:
    found = FineTune(model, **{**FAST, "epochs": 0}).fit(pictures(), LABELS)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got"):
            wise_ft(found, alpha)
    for other in (
        FineTune(model, init="random", epochs=0).fit(pictures(), LABELS),
        LIFT(model, epochs=0).fit(pictures(), LABELS),
    ):
        with pytest.raises(ValueError, match=f"this {type(other).__name__} did not start as the zero-shot classifier"):
            wise_ft(other, 0.5)
    with pytest.raises(ValueError, match="this FineTune did not start as the zero-shot classifier"):
        FineTune(model, reads="penultimate", wise_ft=0.5).fit(pictures(), LABELS)
    with pytest.raises(ValueError, match="LinearProbe's weights do not start as the zero-shot classifier's"):
        wise_ft(LinearProbe(model, C=1.0).fit(pictures(), LABELS), 0.5)
    with pytest.raises(ValueError, match="X has 12 pictures and y 11 labels"):
        wise_ft_curve(found, pictures(), LABELS[1:])
    with pytest.raises(ValueError, match="1 labels are not among the 3 classes: 'fox'"):
        wise_ft_curve(found, pictures(), ["fox", *LABELS[1:]])
