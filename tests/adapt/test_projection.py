"""The plain projection starts as zero-shot and learns its matrix alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator

from tests.adapt.test_decoder import LABELS, create, pictures
from tests.adapt.test_fine_tune import CLASSES, colours
from wordsight.adapt import Projection, image_features
from wordsight.adapt.features import ImageFeatures
from wordsight.adapt.imbalanced import LOSSES
from wordsight.adapt.zero_shot import ZeroShot


@pytest.fixture(scope="module")
def model() -> Any:
    return create()


@pytest.mark.parametrize("name", ["clip-tiny", "lit-tiny", "clip-tiny-resnet", "clip-quickstart", "align-tiny", "siglip-tiny"])
def test_a_projection_starts_as_zero_shot(name: str) -> None:
    model = create(name)
    start = Projection(model, epochs=0).fit(pictures(), LABELS)
    torch.testing.assert_close(start.logits(pictures()), ZeroShot(model, CLASSES).fit().logits(pictures()), rtol=1e-4, atol=1e-4)


def test_a_projection_learns_its_matrix_alone(model: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    features = image_features(model, colours(), layer="penultimate")
    found = Projection(model, epochs=20, learning_rate=1e-2).fit(features, LABELS)
    start = Projection(model, epochs=0).fit(features, LABELS)
    assert found.score(features, LABELS) == 1
    assert torch.equal(found.vectors_, start.vectors_)
    assert not torch.equal(found.matrix_, start.matrix_)
    assert not found.offset_.any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with_head = Projection(model, epochs=20, learning_rate=1e-2, learn_head=True).fit(features, LABELS)
    assert not torch.equal(with_head.vectors_, start.vectors_)
    torch.testing.assert_close(found.logits(features), found.logits(colours()))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_projection_learns_under_every_loss(loss: str, model: Any) -> None:
    features = image_features(model, colours(), layer="penultimate")
    found = Projection(model, loss=loss, epochs=20, learning_rate=1e-2).fit(features, LABELS)
    assert found.score(features, LABELS) == 1
    assert found.scale_ == (30 if loss == "ldam" else pytest.approx(float(model.log_scale.detach().exp())))


def test_a_projection_weighs_pictures(model: Any) -> None:
    features = image_features(model, colours(), layer="penultimate")
    weight = np.r_[0.0, np.ones(11)]
    found = Projection(model, epochs=5).fit(features, ["dog", *LABELS[1:]], sample_weight=weight)
    without = Projection(model, epochs=5).fit(features.take(np.arange(1, 12)), LABELS[1:])
    assert torch.equal(found.logits(features), without.logits(features))
    assert found.counts_.tolist() == [3, 4, 4]


class RandomProjection(Projection):
    """In place of a model: scikit-learn's checks give features of 1 to 20 numbers."""

    needs_model = False

    def _start(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.eye(self.n_features_in_), torch.zeros(self.n_features_in_)

    def _text_rows(self) -> torch.Tensor:
        return torch.randn(len(self.classes_), self.n_features_in_, generator=torch.Generator().manual_seed(0))

    def _scale(self) -> float:
        return 10.0


def test_a_projection_keeps_scikit_learns_contract() -> None:
    projection = RandomProjection(epochs=20, learning_rate=0.1, learn_head=True)
    known = {
        # as with the decoder: a weight of 2 is not bit by bit what a picture twice is
        "check_sample_weight_equivalence_on_dense_data": "rows are drawn",
        "check_methods_subset_invariance": "float32 sums of other batches differ by 1e-7, which the check wants exact",
        "check_classifiers_train": "its blobs of one number differ in length, which a cosine does not see",
    }
    results = check_estimator(projection, on_skip=None, expected_failed_checks=known)
    assert {result["check_name"] for result in results if result["status"] == "xfail"} <= set(known)


def test_bad_input_is_named(model: Any) -> None:
    with pytest.raises(ValueError, match="Projection reads penultimate features, X holds projected ones"):
        Projection(model).fit(ImageFeatures(torch.randn(12, 8)), LABELS)
    with pytest.raises(ValueError, match="the features have 8 numbers and the model's projection reads"):
        Projection(model).fit(np.ones((12, 8)), LABELS)
    for options, message in (
        ({"epochs": -1}, "epochs must be a number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"scale": 0}, "scale must be a number above 0, got 0"),
        ({"loss": "hinge"}, "loss must be one of cross_entropy"),
    ):
        with pytest.raises(ValueError, match=message):
            Projection(model, **options).fit(pictures(), LABELS)
