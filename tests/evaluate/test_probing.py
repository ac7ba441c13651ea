"""The evaluators on features: pictures in, a finding out; what they hold out; hostile pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wordsight
from wordsight.data import open_source
from wordsight.data.few_shot import Splits, few_shot, label_source
from wordsight.evaluate.embedding import embed_source
from wordsight.evaluate.few_shot_curve import FewShotCurve
from wordsight.evaluate.neighbours import nearest_mean
from wordsight.evaluate.probing import KNN, LinearProbe, NearestMean, Ridge, held_out, labelled
from wordsight.evaluate.zero_shot import ZeroShot


@pytest.fixture
def folders(colour_folder: Any) -> tuple[Path, Path]:
    train = colour_folder(dict.fromkeys(("red", "green", "blue", "yellow"), 6), wrong=2, name="train")
    return train, colour_folder(dict.fromkeys(("red", "green", "blue", "yellow"), 3), wrong=1, name="test")


@pytest.mark.parametrize(
    ("evaluator", "task", "told"),
    [
        (KNN(k=3, layer="projected"), "knn", "3 nearest neighbours, weighted by exp(cosine / 0.07)"),
        (KNN(k=3, weighted=False, layer="projected"), "knn", "3 nearest neighbours, majority"),
        (NearestMean(layer="projected"), "nearest_mean", "nearest class mean, cosine"),
        (Ridge(layer="projected"), "ridge", "37 steps around the mean eigenvalue"),
        (LinearProbe(layer="projected", lambdas=[0.01, 1.0]), "linear_probe", "0.2 of train held out"),
    ],
)
def test_evaluators_judge_pictures(evaluator: Any, task: str, told: str, model: Any, folders: tuple[Path, Path]) -> None:
    train, test = (str(folder) for folder in folders)
    found = evaluator.judge(model, train=train, test=test)
    assert found.task == task
    # one picture of 12 shows another colour than its folder says
    assert found.metrics["top1"].value == pytest.approx(11 / 12)
    assert found.metrics["top1"].chance == 0.25
    assert found.metrics["mean_per_class"].value == pytest.approx(11 / 12)
    assert told in found.protocol
    assert "projected features, 4 classes" in found.protocol
    (outcomes,) = found.outcomes
    assert len(set(outcomes.keys)) == 12
    assert outcomes.values.mean() == found.metrics["top1"].value
    assert evaluator.run(model, train=train, test=test) == found.metrics
    embedded = [embed_source(model, folder) for folder in (train, test)]
    assert evaluator.judge(model, train=embedded[0], test=embedded[1]).fingerprint == found.fingerprint
    assert len(found.records("colours", "test")) == 2
    with torch.no_grad():
        model.mix[0, 0] += 0.25
    assert evaluator.judge(model, train=train, test=test).fingerprint != found.fingerprint


def test_few_shot_curve_has_the_zero_shot_evaluators_line(model: Any, folders: tuple[Path, Path]) -> None:
    train, test = (str(folder) for folder in folders)
    evaluator = FewShotCurve(shots=(1, 2), seeds=(1, 2), lambdas=[0.1], layer="projected")
    found = evaluator.judge(model, train=train, test=test)
    zero_shot = ZeroShot().judge(model, test)
    assert found.metrics["top1_zero_shot"] == zero_shot.metrics["top1"]
    assert list(found.metrics)[:3] == ["top1_zero_shot", "top1_1_shot", "top1_2_shot"]
    assert {outcomes.metric: float(outcomes.values.mean()) for outcomes in found.outcomes} == {
        name: pytest.approx(found.metrics[name].value) for name in ("top1_zero_shot", "top1_1_shot", "top1_2_shot")
    }
    assert "zero-shot, 4 classes" in found.protocol
    drawn = few_shot(Splits(name="c", classes=("blue", "green", "red", "yellow"), train=label_source(open_source(train))), 1)
    assert drawn.val is not None
    assert set(drawn.val.keys).isdisjoint(drawn.train.keys if drawn.train else ())


def test_validation_is_held_out_by_name() -> None:
    class Named:
        keys = tuple(f"picture {i}" for i in range(23))
        labels = ("a",) * 10 + ("b",) * 2 + ("c",) * 11

    rows = held_out(Named, 0.2)  # type: ignore[arg-type]
    assert [sum(Named.labels[row] == label for row in rows) for label in "abc"] == [2, 1, 2]
    shuffled = np.random.default_rng(0).permutation(23)

    class Shuffled:
        keys = tuple(Named.keys[i] for i in shuffled)
        labels = tuple(Named.labels[i] for i in shuffled)

    assert {Shuffled.keys[row] for row in held_out(Shuffled, 0.2)} == {Named.keys[row] for row in rows}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 0 and 1"):
        held_out(Named, 1.0)  # type: ignore[arg-type]


def test_hostile_pictures_are_named(model: Any, folders: tuple[Path, Path], colour_folder: Any) -> None:
    train, test = (str(folder) for folder in folders)
    with pytest.raises(ValueError, match="train and test hold the same pictures"):
        KNN(k=1, layer="projected").judge(model, train=train, test=train)
    with pytest.raises(ValueError, match="penultimate"):
        KNN(k=1).judge(model, train=embed_source(model, train), test=test)
    grey = colour_folder({"grey": 2}, name="grey")
    with pytest.raises(ValueError, match="test has 1 labels that train lacks: 'grey'"):
        Ridge(layer="projected").judge(model, train=train, test=str(grey))
    with pytest.raises(ValueError, match="at least 2 classes"):
        LinearProbe(layer="projected").judge(model, train=str(grey), test=test)
    single = colour_folder({"red": 1, "blue": 1}, name="single")
    with pytest.raises(ValueError, match="give val"):
        LinearProbe(layer="projected").judge(model, train=str(single), test=test)
    tuned = LinearProbe(layer="projected", lambdas=[1.0]).judge(model, train=str(folders[0]), test=test, val=str(single))
    assert "a validation split" in tuned.protocol
    embedded = embed_source(model, test)
    with pytest.raises(ValueError, match="no picture of test has a label"):
        labelled(replace(embedded, labels=(None,) * len(embedded)), "test")
    part = labelled(replace(embedded, labels=(None, *embedded.labels[1:])), "test")
    assert (part.num_unlabelled, len(part.labels), len(part.features_ND)) == (1, 11, 11)
    with pytest.raises(ValueError, match="vectors a picture"):
        labelled(replace(embedded, images_ND=embedded.images_ND[:, None]), "test")


def test_penultimate_features_are_the_default(folders: tuple[Path, Path]) -> None:
    model = wordsight.create("clip-tiny", seed=0)
    train, test = (embed_source(model, folder, layer="penultimate") for folder in folders)
    found = NearestMean().judge(model, train=str(folders[0]), test=str(folders[1]))
    expected = nearest_mean(train.images_ND, train.labels, test.images_ND, test.labels)
    assert found.metrics == expected.metrics
    assert "penultimate features" in found.protocol
    curve = FewShotCurve(shots=(1, 2), seeds=(1, 2), lambdas=[1.0]).judge(model, train=train, test=test)
    assert curve.metrics["top1_zero_shot"] == ZeroShot().judge(model, str(folders[1])).metrics["top1"]
