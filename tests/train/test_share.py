"""evaluate_max_share: evaluations keep within their share of the time, and training does not feel them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_loop import assert_same_run, stop_at
from wordsight.evaluate.results import Finding
from wordsight.train.loop import fit
from wordsight.train.recipe import Evaluation, Recipe
from wordsight.train.share import EvaluationTime
from wordsight.types import Metric


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    CLOCK.now = 0
    monkeypatch.setattr("wordsight.train.share.time", CLOCK)
    return CLOCK


@dataclass(frozen=True)
class Slow:
    """Takes 10 s of that clock."""

    def judge(self, model: Any, data: Any) -> Finding:
        CLOCK.now += 10
        metrics = {"share": Metric(0.5, 4, (0.1, 0.9))}
        return Finding(task="slow", metrics=metrics, protocol="slow", fingerprint="f")


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.7])
def test_the_share_is_kept_and_used(clock: Clock, share: float) -> None:
    """Training steps of 1 s, evaluations of 4 s, one due always: after the first, never above the share, and near it."""
    measured = EvaluationTime(share)
    spent = 0.0
    shares = []
    for _ in range(2000):
        clock.now += 1
        if measured.allows_one():
            with measured.spending():
                clock.now += 4
            spent += 4
            shares.append(spent / clock.now)
    assert max(shares[1:]) <= share
    assert shares[-1] > 0.95 * share


def test_without_a_share_none_waits(clock: Clock) -> None:
    measured = EvaluationTime(None)
    for _ in range(3):
        assert measured.allows_one()
        with measured.spending():
            clock.now += 100


def test_what_is_put_off_comes_later_and_the_last_always(
    recipe: Recipe, pairs: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 5 s, an evaluation 10: that of step 6 waits until two of them are a third of the time, at step 8."""
    allows = EvaluationTime.allows_one

    def after_a_step(self: EvaluationTime) -> bool:
        clock.now += 5
        return allows(self)

    monkeypatch.setattr(EvaluationTime, "allows_one", after_a_step)
    slow = Evaluation(evaluator=Slow(), data=str(pairs), name="slow")
    recipe = replace(recipe, evaluations=(slow,), evaluate_every_steps=3, best_metric="slow/share")
    fit(replace(recipe, evaluate_max_share=0.34), tmp_path / "some", device="cpu", progress=False)
    clock.now = 0
    fit(recipe, tmp_path / "all", device="cpu", progress=False)
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("some", "all")
    }
    steps = {name: [line["step"] for line in own if "slow/share" in line] for name, own in lines.items()}
    assert steps == {"some": [3, 8, 12], "all": [3, 6, 9, 12]}
    trained = {name: [line for line in own if "loss" in line] for name, own in lines.items()}
    assert trained["some"] == trained["all"], "training does not feel it"


def test_a_run_with_a_share_goes_on_bit_identically(recipe: Recipe, pairs: Path, tmp_path: Path, clock: Clock) -> None:
    """Time stands still but in evaluations: the first one runs, then none but the last; each start has a time of its own."""
    slow = Evaluation(evaluator=Slow(), data=str(pairs), name="slow")
    recipe = replace(recipe, evaluations=(slow,), evaluate_every_steps=6, evaluate_max_share=0.1, best_metric="slow/share")
    fit(recipe, tmp_path / "whole", device="cpu", progress=False)
    stop_at(recipe, tmp_path / "parts", 7)
    fit(recipe, tmp_path / "parts", device="cpu", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_lies_between_nothing_and_all(share: float) -> None:
    with pytest.raises(ValueError, match="evaluate_max_share must lie between 0 and 1"):
        Recipe(evaluate_max_share=share)
