"""The pages of the long tail and of the judge: their tables are those of the figures beside them, and say what they should."""

import json
import re

import pytest

from studies import judge, long_tail, pages
from wordsight.evaluate.report import figure


def test_the_long_tails_tables_are_those_of_its_figures() -> None:
    cells = json.loads(long_tail.PAGE.with_suffix(".json").read_text())
    between = re.search(f"{pages.BEGIN}\n(.*)\n{pages.END}", long_tail.PAGE.read_text(), re.DOTALL)
    assert between is not None
    assert between[1].endswith(long_tail.tables(cells))
    for where, best, mean, _ in long_tail.gains(cells):
        assert f"| {where} | {best} | {100 * mean:+.1f} |" in between[1]


def test_an_interval_needs_three_seeds_that_differ() -> None:
    assert long_tail.with_interval([0.1, 0.2, 0.3]) == "20.0 ± 24.8"  # 4.303 x 10 / sqrt 3
    assert long_tail.with_interval([0.1, 0.1, 0.1]) == "10.0"
    assert long_tail.with_interval([0.1, 0.2]) == "15.0"
    assert long_tail.with_interval([]) == "-"


def test_the_judges_page_shows_the_figures_beside_it() -> None:
    records = json.loads(judge.PAGE.with_suffix(".json").read_text())
    line = next(one for one in judge.PAGE.read_text().splitlines() if one.startswith("| zero-shot-seen |"))
    for cell, model in zip(line.split("|")[3:6], ("quickstart", "lit", "random"), strict=True):
        found = [r for r in records[model] if r["split"] == "test-twemoji-seen" and r["metric"] == "top1"]
        assert len(found) == 1
        assert cell.strip().startswith(f"{figure(found[0]['value'], 'fraction')} (")


@pytest.mark.parametrize("task", ["counting", "spatial", "negation", "reading"])
def test_the_random_model_of_the_judges_page_is_at_chance(task: str) -> None:
    records = json.loads(judge.PAGE.with_suffix(".json").read_text())["random"]
    record = next(r for r in records if r["task"] == task and r["metric"] == "accuracy")
    assert record["ci95"][0] <= record["chance"] <= record["ci95"][1]
