"""Each second stage changes what its paper says and nothing else, starts as the classifier it corrects, and helps the tail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, normalize

from tests.adapt.test_decoder import LABELS, create, pictures, skewed
from wordsight.adapt.decoder import Decoder
from wordsight.adapt.estimator import load_classifier
from wordsight.adapt.imbalanced import Schedule
from wordsight.adapt.second_stage import KINDS, TAUS, second_stage
from wordsight.adapt.token_cache import cache_tokens
from wordsight.losses.imbalance import adjust_logits, class_means, ncm_logits, tau_normalise

NO_STEPS = Schedule(steps=0)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, np.ndarray]:
    tokens, labels = skewed()
    return tokens, np.array(labels)


@pytest.fixture(scope="module")
def first(data: tuple[torch.Tensor, np.ndarray]) -> Decoder:
    return Decoder(steps=120, batch_size=64, num_layers=1).fit(*data)


@pytest.fixture(scope="module")
def cosine(data: tuple[torch.Tensor, np.ndarray]) -> Decoder:
    return Decoder(steps=120, batch_size=64, num_layers=1, head="cosine").fit(*data)


@pytest.mark.parametrize("kind", ["lws", "disalign", "marc"])
def test_starts_as_the_classifier(kind: str, first: Decoder, cosine: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    for one in (first, cosine):
        torch.testing.assert_close(second_stage(one, kind, *data, schedule=NO_STEPS).logits(data[0]), one.logits(data[0]))


@pytest.mark.parametrize("kind", ["tau_normalisation", "logit_adjustment"])
def test_tau_of_zero_is_the_classifier(kind: str, first: Decoder, cosine: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    for one in (first, cosine):
        assert torch.equal(second_stage(one, kind, tau=0.0).logits(data[0]), one.logits(data[0]))


def test_tau_normalisation_is_the_papers(first: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    features, head = first.token_features(data[0]), first.decoder_.head
    for tau in (0.5, 1.0):
        expected = linear(features, tau_normalise(head.weight, tau)) + head.bias / head.weight.norm(dim=1) ** tau
        torch.testing.assert_close(second_stage(first, "tau_normalisation", tau=tau).logits(data[0]), expected)
    assert second_stage(first, "tau_normalisation").second_stage_tau_ == 1.0


def test_cosine_head_has_no_lengths_to_normalise(cosine: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    second = second_stage(cosine, "tau_normalisation", tau=1.0)
    torch.testing.assert_close(second.logits(data[0]) * 25, cosine.logits(data[0]))


def test_logit_adjustment_is_the_papers(first: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    expected = adjust_logits(first.logits(data[0]), [200, 20, 5], 0.7)
    torch.testing.assert_close(second_stage(first, "logit_adjustment", tau=0.7).logits(data[0]), expected)


def test_nearest_mean_is_the_papers(first: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    features, targets = first.token_features(data[0]), first._targets(data[1])
    means = torch.stack([features[targets == c].mean(0) for c in range(3)])
    torch.testing.assert_close(second_stage(first, "ncm", *data).logits(data[0]), 25 * ncm_logits(features, means))
    weight = np.where(np.arange(len(data[1])) % 2, 1.0, 3.0)
    weighed = second_stage(first, "ncm", *data, sample_weight=weight)
    means = class_means(features, targets, 3, weights=torch.tensor(weight))
    torch.testing.assert_close(weighed.logits(data[0]), 25 * ncm_logits(features, means))


def test_calibrations_are_their_formulas(first: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    z, f = first.logits(data[0]), first.token_features(data[0])
    schedule = Schedule(steps=20, batch_size=32)
    lws, marc, disalign = (second_stage(first, kind, *data, schedule=schedule) for kind in ("lws", "marc", "disalign"))
    with torch.no_grad():
        torch.testing.assert_close(lws.logits(data[0]), lws.decoder_.calibration.scale * z)
        part, lengths = marc.decoder_.calibration, first.decoder_.head.weight.norm(dim=1)
        torch.testing.assert_close(marc.logits(data[0]), part.scale * z + part.shift * lengths)
        part = disalign.decoder_.calibration
        g = torch.sigmoid(f @ part.confidence.weight.T + part.confidence.bias)
        torch.testing.assert_close(disalign.logits(data[0]), (1 + g * part.scale) * z + g * part.shift)
    for second in (lws, marc, disalign):
        learned = {name for name, value in second.decoder_.named_parameters() if value.requires_grad and "blocks" not in name}
        extra = {"calibration.confidence.weight", "calibration.confidence.bias"} if second is disalign else set()
        shift = set() if second is lws else {"calibration.shift"}
        assert learned == {"calibration.scale"} | shift | extra
        assert (second.decoder_.calibration.scale != (0 if second is disalign else 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_first_stage_stands_still_and_the_tail_gains(kind: str, first: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    before = {name: value.clone() for name, value in first.decoder_.state_dict().items()}
    test, truth = skewed((100, 100, 100), seed=1)
    test = test * 0.9
    second = second_stage(first, kind, *data, schedule=Schedule(steps=80, batch_size=64, learning_rate=0.1))
    assert all(torch.equal(value, before[name]) for name, value in first.decoder_.state_dict().items())
    assert first.second_stage_ == "none"
    assert second.second_stage_ == kind
    assert second.decoder_.blocks is first.decoder_.blocks
    assert torch.equal(second.token_features(test), first.token_features(test))
    tail = np.array(truth) == "c2"
    gain = (second.predict(test) == truth)[tail].mean() - (first.predict(test) == truth)[tail].mean()
    assert gain > 0, gain
    if kind == "crt":
        assert not torch.allclose(second.decoder_.head.weight, first.decoder_.head.weight, atol=0.05)


def test_crt_begins_anew(first: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    a, b, c = (
        second_stage(first, "crt", *data, schedule=Schedule(steps=0, seed=seed)).decoder_.head.weight for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, first.decoder_.head.weight)
    assert float(a.abs().max()) <= 8**-0.5  # as nn.Linear draws


def test_tau_is_chosen_by_validation(first: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    test, truth = skewed((60, 60, 60), seed=2)
    for kind in ("tau_normalisation", "logit_adjustment"):
        chosen = second_stage(first, kind, validation=(test, truth))
        scores = [
            second_stage(first, kind, tau=tau).score(test, truth) for tau in TAUS
        ]  # as many of each class: the mean of classes
        assert chosen.second_stage_tau_ == TAUS[int(np.argmax(scores))]
        assert chosen.score(test, truth) == max(scores)


def test_views_and_pictures(tmp_path: Path) -> None:
    model = create()
    tokens = cache_tokens(model, pictures(), tmp_path, num_views=2, kind="float32")
    first = Decoder(model, steps=4, batch_size=8, num_views=2, token_kind="float32").fit(tokens, LABELS)
    means = [torch.stack([first.token_features(tokens, v)[[0, 3, 6, 9]] for v in range(2)]).mean((0, 1))]
    second = second_stage(first, "ncm", tokens, LABELS)
    torch.testing.assert_close(second.decoder_.head.weight[0], means[0])
    for kind in ("marc", "crt"):
        a, b = (second_stage(first, kind, X, LABELS, schedule=Schedule(steps=3, batch_size=8)) for X in (tokens, pictures()))
        assert torch.equal(a.logits(tokens), b.logits(tokens))


@pytest.mark.parametrize("kind", ["crt", "ncm", "disalign", "marc", "logit_adjustment"])
def test_save_and_load(kind: str, first: Decoder, data: tuple[torch.Tensor, np.ndarray], tmp_path: Path) -> None:
    second = second_stage(first, kind, *data, schedule=Schedule(steps=2, batch_size=8))
    second.save(tmp_path)
    loaded = load_classifier(tmp_path)
    assert torch.equal(loaded.logits(data[0]), second.logits(data[0]))
    assert (loaded.second_stage_, loaded.second_stage_tau_) == (kind, 1.0 if kind == "logit_adjustment" else None)


def test_marc_of_a_cosine_head_takes_its_rows_as_they_count(cosine: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    second = second_stage(cosine, "marc", *data, schedule=NO_STEPS)
    torch.testing.assert_close(second.decoder_.calibration.lengths, torch.full((3,), 25.0))
    rows = cosine.decoder_.classifier_rows()
    torch.testing.assert_close(cosine.logits(data[0]), normalize(cosine.token_features(data[0])) @ rows.T)


def test_bad_input_is_named(first: Decoder, data: tuple[torch.Tensor, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"kind must be one of crt, lws, .*, got 'mark'"):
        second_stage(first, "mark", *data)
    with pytest.raises(ValueError, match="marc learns from pictures: give those of the first stage"):
        second_stage(first, "marc")
    with pytest.raises(ValueError, match=r"had its second stage \(logit_adjustment\): start from the first one"):
        second_stage(second_stage(first, "logit_adjustment"), "marc", *data)
    with pytest.raises(ValueError, match="tau is of tau_normalisation and logit_adjustment, crt has none"):
        second_stage(first, "crt", *data, tau=0.5)
    with pytest.raises(ValueError, match="tau must be"):
        second_stage(first, "tau_normalisation", tau=-1.0)
    with pytest.raises(ValueError, match="X has 225 pictures and y 224 labels"):
        second_stage(first, "crt", data[0], data[1][1:])
    with pytest.raises(ValueError, match="X has 5 features, but Decoder is expecting 8 features"):
        second_stage(first, "crt", data[0][:, 0, :5], data[1])
    assert first.n_features_in_ == 8
    with pytest.raises(ValueError, match="1 classes have no picture: 'c2'"):
        second_stage(first, "crt", data[0][:220], data[1][:220])
    with pytest.raises(ValueError, match="validation has 3 pictures and 2 labels"):
        second_stage(first, "tau_normalisation", validation=(data[0][:3], data[1][:2]))
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        second_stage(Decoder(), "crt", *data)


def test_a_decoder_takes_its_second_stage_along(first: Decoder, data: tuple[torch.Tensor, np.ndarray], tmp_path: Path) -> None:
    both = Decoder(steps=120, batch_size=64, num_layers=1, stage2="marc").fit(*data)
    assert torch.equal(both.logits(data[0]), second_stage(first, "marc", *data).logits(data[0]))
    read = load_classifier(both.save(tmp_path / "both"))
    assert (read.second_stage_, read.get_params()["stage2"]) == ("marc", "marc")
    assert torch.equal(read.logits(data[0]), both.logits(data[0]))
    by_validation = Decoder(steps=120, batch_size=64, num_layers=1, stage2="tau_normalisation").fit(*data, validation=data)
    chosen = second_stage(first, "tau_normalisation", validation=data)
    assert by_validation.second_stage_tau_ == chosen.second_stage_tau_
    with pytest.raises(ValueError, match=r"stage2 must be one of crt, lws.* got 'tau'"):
        Decoder(stage2="tau").fit(*data)
