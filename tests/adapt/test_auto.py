"""`auto`: zero-shot and the linear probe always, the rest within the budget, the best on validation kept, each with its why."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wordsight
from tests.adapt.make import colour_folders
from wordsight.adapt import METHODS, auto
from wordsight.adapt.auto import ALWAYS, ORDER, OutOfTimeError, choose
from wordsight.adapt.costs import Meter
from wordsight.adapt.learn import Learned, Validation, split_settings
from wordsight.adapt.pictures import open_data
from wordsight.adapt.protocol import Trial, trials
from wordsight.adapt.run import Request, adapt


@pytest.fixture(scope="module")
def model() -> Any:
    return wordsight.create("clip-tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("colours"), {"train": 6, "val": 4, "test": 5}, noise=120)


@pytest.fixture
def trial(data: Path) -> Trial:
    return trials("few_shot", open_data(str(data)), 2, (1,))[0]


def fake(accuracies: dict[str, Any], asked: list[str]) -> Callable[..., Learned]:
    """In the place of `learn`: a method has (accuracy, loss), raises what is an error, or sleeps for that many seconds."""

    def learn(model: Any, method: str, parameters: dict[str, Any], trial: Trial, features: Any) -> Learned:
        asked.append(method)
        value = accuracies[method]
        if isinstance(value, Exception):
            raise value
        if isinstance(value, float):
            time.sleep(value)
        accuracy, loss = value if isinstance(value, tuple) else (1.0, 0.0)
        with Meter(torch.device("cpu")) as meter:
            pass
        found = Validation(accuracy=accuracy, loss=loss, count=16)
        return Learned(method=method, classifier=method, validation=found, cost=meter.cost)

    return learn


def tell(
    monkeypatch: pytest.MonkeyPatch, model: Any, trial: Trial, budget_s: float, accuracies: dict[str, Any], **more: Any
) -> tuple[str, dict[str, Any], list[str]]:
    asked: list[str] = []
    monkeypatch.setattr(auto, "learn", fake({name: (0.25, 1.0) for name in ORDER} | accuracies, asked))
    best, tried = choose(model, trial, None, budget_s, {}, **more)  # type: ignore[arg-type]
    return best.method, {one.method: one for one in tried}, asked


def test_it_knows_every_method_and_begins_with_those_that_are_always_tried() -> None:
    assert set(METHODS) - set(ORDER) == {"decoder", "projection", "fine_tune", "lift"}, "which are for many labels"
    assert ORDER[:2] == ALWAYS == ("zero_shot", "linear_probe")


def test_the_most_accurate_is_kept_and_equals_go_by_loss_then_by_order(
    monkeypatch: pytest.MonkeyPatch, model: Any, trial: Trial
) -> None:
    kept, tried, asked = tell(monkeypatch, model, trial, 60, {"coop": (0.75, 0.9), "clap": (0.75, 0.8), "cocoop": (0.75, 0.8)})
    assert asked == list(ORDER)
    assert kept == "clap"
    assert tried["clap"].outcome == "kept"
    assert "as many validation pictures right as clap" in tried["coop"].why
    assert "8 fewer of 16 validation pictures right than clap" in tried["zero_shot"].why


@pytest.mark.parametrize("good", ALWAYS)
def test_what_is_kept_is_never_worse_on_validation_than_zero_shot_and_the_probe(
    monkeypatch: pytest.MonkeyPatch, model: Any, trial: Trial, good: str
) -> None:
    kept, tried, asked = tell(monkeypatch, model, trial, 1e-9, {good: (0.5, 0.5)})
    assert asked == list(ALWAYS), "they are tried though the budget is over; nothing else is"
    assert kept == good
    assert {tried[name].outcome for name in ORDER[2:]} == {"not begun"}
    assert "left for this seed were over" in tried["coop"].why


def test_a_method_that_takes_too_long_is_stopped_and_the_rest_not_begun(
    monkeypatch: pytest.MonkeyPatch, model: Any, trial: Trial
) -> None:
    start = time.monotonic()
    kept, tried, _ = tell(monkeypatch, model, trial, 0.3, {"tip_adapter": 30.0, "zero_shot": (0.5, 1.0)})
    assert time.monotonic() - start < 10
    assert kept == "zero_shot"
    assert tried["tip_adapter"].outcome == "stopped"
    assert tried["tip_adapter"].validation is None
    assert tried["tip_adapter"].cost.seconds == pytest.approx(0.3, abs=0.2)
    assert tried["coop"].outcome == "not begun"


def test_a_timer_never_strikes_late() -> None:
    with pytest.raises(OutOfTimeError), auto._at_most(0.05):
        time.sleep(5)
    with auto._at_most(0.05):
        pass
    time.sleep(0.1)
    with auto._at_most(None):
        time.sleep(0.01)


def test_a_method_that_is_impossible_says_why_but_the_first_two_must_work(
    monkeypatch: pytest.MonkeyPatch, model: Any, trial: Trial
) -> None:
    kept, tried, _ = tell(monkeypatch, model, trial, 60, {"coop": ValueError("no token-level tower"), "clap": (0.9, 1.0)})
    assert kept == "clap"
    assert (tried["coop"].outcome, tried["coop"].why) == ("impossible", "no token-level tower")
    with pytest.raises(ValueError, match="NaN"):
        tell(monkeypatch, model, trial, 60, {"linear_probe": ValueError("NaN")})


def test_new_classes_are_asked_of_those_alone_that_can_name_them(
    monkeypatch: pytest.MonkeyPatch, model: Any, trial: Trial
) -> None:
    able = ("zero_shot", "coop", "cocoop")
    kept, tried, asked = tell(monkeypatch, model, trial, 60, {"clap": (1.0, 0.0)}, suits=lambda method: method in able)
    assert asked == list(able)
    assert kept == "zero_shot"
    assert "can't name new classes" in tried["clap"].why


def test_without_validation_pictures_there_is_nothing_to_choose_by(model: Any, data: Path) -> None:
    (nothing,) = trials("few_shot", open_data(str(data)), 0, (1,))
    with pytest.raises(ValueError, match="auto chooses by validation pictures"):
        choose(model, nothing, None, 5, {})  # type: ignore[arg-type]


def test_settings_name_the_method_that_they_are_of() -> None:
    assert split_settings(["coop.epochs=5", "linear_probe.C=2", "coop.init=a photo"]) == {
        "coop": {"epochs": 5, "init": "a photo"},
        "linear_probe": {"C": 2.0},
    }
    for wrong in ("epochs=5", "nope.epochs=5", "coop.epoch=5"):
        with pytest.raises(ValueError, match=r"METHOD\.KEY=VALUE|did you mean epochs"):
            split_settings([wrong])


def test_a_whole_run_keeps_tells_and_costs_what_was_tried(
    tmp_path: Path, model: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real methods that are quick."""
    monkeypatch.setattr(auto, "ORDER", ("zero_shot", "linear_probe", "coop"))
    counted, encode = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels, **more: (counted.append(len(pixels)), encode(pixels, **more))[1])
    request = Request(
        method="auto", shots=2, seeds=(1, 2), parameters=split_settings(["coop.epochs=2", "coop.num_context_tokens=2"])
    )
    told: list[str] = []
    summary = adapt(model, open_data(str(data)), tmp_path, request, say=told.append)
    used = [trial for trial in trials("few_shot", open_data(str(data)), 2, (1, 2))]
    different = {key for trial in used for part in (trial.train, trial.val) for key in part.keys}
    assert sum(counted) == len(different) + 20, "each picture's features are computed once for all methods and seeds"
    for seed in (1, 2):
        result = json.loads((tmp_path / f"seeds/{seed}/result.json").read_text())
        by_method = {one["method"]: one for one in result["tried"]}
        assert list(by_method) == ["zero_shot", "linear_probe", "coop"]
        best = result["validation"]["accuracy"]
        assert result["method"] == next(one["method"] for one in result["tried"] if one["outcome"] == "kept")
        assert best == max(one["validation"]["accuracy"] for one in result["tried"])
        assert result["cost"]["seconds"] == pytest.approx(sum(one["cost"]["seconds"] for one in result["tried"]), abs=1e-3)
    assert summary["kept"]["method"] in by_method
    assert summary["chosen_by"].startswith("The method, its settings and the seed")
    assert any("linear_probe" in line for line in told)
    report = (tmp_path / "report.html").read_text()
    assert report.count("Methods tried") == 2
    assert "fewer of 8 validation pictures right" in report or "as many validation pictures right" in report
    assert wordsight.load_classifier(tmp_path).classes_.tolist() == ["blue", "green", "grey", "red"]
