"""A run that changes its number of processes on the way: 2, then 1, then 3, with the losses of one process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.processes import in_processes
from tests.train.conftest import _quick_report, pairs, recipe, tokenizer_folder  # noqa: F401 - fixtures
from tests.train.test_loop import state_of, stop_at
from wordsight.train.loop import Outcome, fit
from wordsight.train.recipe import Recipe


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def until(recipe: Recipe, run: Path, step: int) -> Callable[[], Outcome]:  # noqa: F811
    """One life of the run in one of several processes: the main one asks to stop at `step`."""
    return lambda: stop_at(recipe, run, step if os.environ.get("RANK", "0") == "0" else 10**6)


@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_2_then_1_then_3_processes_train_what_one_does(recipe: Recipe, exchange: str, tmp_path: Path) -> None:  # noqa: F811
    """The rows of a global batch, their captions, crops and dropped patches do not depend on who draws them: what differs is
    rounding."""
    recipe = replace(
        recipe,
        steps=9,
        batch_size=12,
        micro_batch_size=4,
        exchange=exchange,
        optim=replace(recipe.optim, lr=1e-3, warmup_steps=2),
    )
    fit(recipe, tmp_path / "one", device="cpu", progress=False)
    run = tmp_path / "changing"
    assert [outcome.step for outcome in in_processes(2, until(recipe, run, 3), tmp_path)] == [3, 3]
    assert stop_at(recipe, run, 6).step == 6
    outcomes = in_processes(3, until(recipe, run, 10**6), tmp_path)
    assert all(outcome.complete for outcome in outcomes)
    one, changing = lines(tmp_path / "one"), lines(run)
    assert [line["step"] for line in changing] == list(range(1, 10))
    for a, b in zip(one, changing, strict=True):
        assert (a["rows"], a["lr"]) == (b["rows"], b["lr"])
        assert abs(a["loss"] - b["loss"]) < 1e-6 * max(1.0, abs(a["loss"]))
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [(start["step"], start["machine"]["processes"]) for start in starts] == [(0, 2), (3, 1), (6, 3)]
    a, b = state_of(tmp_path / "one"), state_of(run)
    assert a.keys() == b.keys()
    weights = [name for name in a if name.startswith("model")]
    assert max((a[name] - b[name]).abs().max().item() for name in weights) < 1e-4
