"""Protocols: what is learned from and judged by, among which classes, and the figures over them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wordsight
from tests.adapt.make import colour_folders
from wordsight.adapt import ZeroShot, image_features
from wordsight.adapt.judge import read_csv
from wordsight.adapt.pictures import open_data
from wordsight.adapt.protocol import for_classes, harmonic_mean, logits_among, trials
from wordsight.adapt.records import harmonic
from wordsight.adapt.run import Request, adapt

COOP = {"epochs": 2, "num_context_tokens": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return wordsight.create("clip-tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("colours"), {"train": 8, "val": 4, "test": 5})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another data set, with two of the first one's classes, in a plain folder."""
    root = tmp_path_factory.mktemp("others")
    return colour_folders(root, {"sketch": 6}, ("grey", "red"), noise=100) / "sketch"


def test_few_shots_learn_choose_and_are_judged_by_pictures_of_their_own(data: Path) -> None:
    splits = open_data(str(data))
    first, second = trials("few_shot", splits, 3, (1, 2))
    assert len(first.train) == 12
    assert len(first.val) == 12
    assert first.train.keys != second.train.keys
    assert [test.name for test in first.tests] == ["test"]
    assert first.tests[0].pictures is splits.test is second.tests[0].pictures
    assert len(trials("few_shot", splits, 6, (1,))[0].val) == 16, "min(K, 4) validation pictures a class"
    everything = trials("few_shot", splits, "all", (1,))[0]
    assert (len(everything.train), len(everything.val)) == (32, 16)
    nothing = trials("few_shot", splits, 0, (1,))[0]
    assert (nothing.train, nothing.val) == (None, None)


def test_data_without_splits_give_some_pictures_for_each(tmp_path: Path) -> None:
    root = colour_folders(tmp_path, {"plain": 20}) / "plain"
    trial, again = trials("few_shot", open_data(str(root)), "all", (1, 2))
    sets = [set(trial.train.keys), set(trial.val.keys), set(trial.tests[0].pictures.keys)]
    assert [len(one) for one in sets] == [4 * 13, 4 * 1, 4 * 6]
    assert len(set.union(*sets)) == 80, "no picture is in two of them"
    assert set(again.tests[0].pictures.keys) == sets[2], "all seeds are judged by the same pictures"
    assert set(again.val.keys) != sets[1]
    assert any("held out" in note for note in trial.notes)
    assert any("no validation split: 4 of 56" in note for note in trial.notes)


def test_base_to_new_judges_each_half_among_its_own_names(tmp_path: Path, model: Any, data: Path) -> None:
    splits = open_data(str(data))
    summary = adapt(model, splits, tmp_path, Request(method="zero_shot", shots=2, seeds=(1, 2), protocol="base_to_new"))
    for name, classes in (("base", ["blue", "green"]), ("new", ["grey", "red"])):
        rows = read_csv(tmp_path / f"seeds/1/predictions-{name}.csv")
        assert {row["label"] for row in rows} == set(classes) >= {row["predicted"] for row in rows}
        paths = [str(data / "test" / row["picture"].removeprefix("test/")) for row in rows]
        assert [row["predicted"] for row in rows] == ZeroShot(model, classes).fit().predict(paths).tolist()
    base, new = (one["metrics"]["top1"]["value"] for one in summary["tests"])
    assert summary["harmonic_mean"]["value"] == pytest.approx(2 * base * new / (base + new))
    records = json.loads((tmp_path / "results.json").read_text())
    (found,) = [one for one in records if one["metric"] == "harmonic_mean"]
    assert (found["task"], found["split"], found["chance"]) == ("base_to_new", "base and new", 0.5)
    assert found["ci95"][0] <= found["value"] <= found["ci95"][1]
    assert "mean of seeds 1, 2" in found["protocol"]
    assert wordsight.load_classifier(tmp_path).classes_.tolist() == ["blue", "green"]


def test_what_was_learned_of_base_classes_names_new_ones(tmp_path: Path, model: Any, data: Path) -> None:
    adapt(
        model,
        open_data(str(data)),
        tmp_path,
        Request(method="coop", shots=1, seeds=(1,), protocol="base_to_new", parameters=COOP),
    )
    classifier = wordsight.load_classifier(tmp_path)
    rows = read_csv(tmp_path / "seeds/1/predictions-new.csv")
    paths = [str(data / "test" / row["picture"].removeprefix("test/")) for row in rows]
    assert [row["predicted"] for row in rows] == classifier.with_classes(["grey", "red"]).predict(paths).tolist()


def test_methods_that_can_not_name_new_classes_are_refused_before_anything_is_done(
    tmp_path: Path, model: Any, data: Path
) -> None:
    request = Request(method="linear_probe", shots=1, seeds=(1,), protocol="base_to_new")
    with pytest.raises(ValueError, match="weights belong to those that it learned: choose one of zero_shot, coop"):
        adapt(model, open_data(str(data)), tmp_path / "run", request)
    assert not (tmp_path / "run").exists()
    own = Request(method="coop", shots=1, seeds=(1,), protocol="base_to_new", parameters=COOP | {"class_specific": True})
    with pytest.raises(ValueError, match="a class-specific context belongs to those"):
        adapt(model, open_data(str(data)), tmp_path / "run", own)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="object can't name new classes"):
        for_classes(object(), ["a", "b"])


def test_other_data_sets_are_judged_among_their_own_or_some_of_the_learned_names(
    tmp_path: Path, model: Any, data: Path, other: Path
) -> None:
    splits, elsewhere = open_data(str(data)), open_data(str(other))
    for protocol in ("cross_dataset", "domain"):
        request = Request(method="coop", shots=1, seeds=(1,), protocol=protocol, parameters=COOP)
        summary = adapt(model, splits, tmp_path / protocol, request, others=[elsewhere])
        assert [(one["name"], one["data"], one["num_classes"]) for one in summary["tests"]] == [
            ("test", splits.name, 4),
            ("sketch", "sketch", 2),
        ]
        assert summary["tests"][1]["metrics"]["top1"]["chance"] == 0.5
        rows = read_csv(tmp_path / protocol / "seeds/1/predictions-sketch.csv")
        assert {row["predicted"] for row in rows} <= {"grey", "red"}
        assert len(rows) == 12
    (trial,) = trials("domain", splits, 1, (1,), [elsewhere])
    test = trial.tests[1]
    pictures = [test.pictures.source[i] for i in range(len(test.pictures))]
    features = image_features(model, pictures)
    names, logits_NC = logits_among(ZeroShot(model, splits.classes).fit(), test, features)
    assert names == ("grey", "red")
    torch.testing.assert_close(logits_NC, ZeroShot(model, ["grey", "red"]).fit().logits(features).double(), rtol=1e-4, atol=1e-5)


def test_several_other_data_sets_of_one_name_keep_files_apart(data: Path, other: Path) -> None:
    (trial,) = trials("cross_dataset", open_data(str(data)), 1, (1,), [open_data(str(other))] * 2)
    names = [test.name for test in trial.tests]
    assert len(set(names)) == 3, names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"protocol": "nope"}, "protocol must be one of few_shot"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": ()}, "at least one"),
        ({"protocol": "domain"}, "needs other data sets"),
        ({"protocol": "base_to_new", "others": "some"}, "own test split alone"),
    ],
)
def test_what_makes_no_sense_is_refused(data: Path, other: Path, words: dict[str, Any], said: str) -> None:
    asked = {"protocol": "few_shot", "seeds": (1,), "others": ()} | words
    others = [open_data(str(other))] if asked["others"] else []
    with pytest.raises(ValueError, match=said):
        trials(asked["protocol"], open_data(str(data)), 1, asked["seeds"], others)


def test_a_domain_with_a_class_that_was_not_learned_is_named(tmp_path: Path, data: Path) -> None:
    strange = colour_folders(tmp_path, {"art": 2}, ("red", "yellow")) / "art"
    with pytest.raises(ValueError, match=r"1 of 2 classes are not among the 4 known ones: 'yellow'"):
        trials("domain", open_data(str(data)), 1, (1,), [open_data(str(strange))])


def test_the_harmonic_mean_is_that_of_the_averages() -> None:
    assert harmonic_mean(0.8, 0.4) == pytest.approx(0.8 * 0.4 * 2 / 1.2)
    assert harmonic_mean(0.0, 0.0) == 0.0
    tests = [
        {"metrics": {"top1": {"value": value, "count": 100, "ci95": [value - 0.1, value + 0.1], "chance": 0.1}}}
        for value in (0.8, 0.4)
    ]
    found = harmonic(tests)
    assert found["value"] == pytest.approx(8 / 15)
    assert found["ci95"] == pytest.approx([2 * 0.7 * 0.3 / 1.0, 2 * 0.9 * 0.5 / 1.4])
    assert found["count"] == 200
    # CoOp on eleven data sets, as published
    assert round(harmonic_mean(82.69, 63.22), 2) == 71.66
    assert np.isclose(harmonic_mean(0.5, 0.5), 0.5)
