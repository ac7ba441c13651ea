"""Accuracy by groups: closed forms, what picking the extremes does, and the evaluator."""

from pathlib import Path

import numpy as np
import pytest

from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.data.geography import GroupedSet, read_grouped
from wordsight.evaluate.groups import GroupAccuracy, GroupTable, group_figures
from wordsight.evaluate.metrics import wilson_interval
from wordsight.evaluate.suite import Candidate, SuiteItem, run_suite


def answers(**shares: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """Right answers and groups of name=(right, count)."""
    right = np.concatenate([np.arange(count) < hits for hits, count in shares.values()])
    return right, [name for name, (_, count) in shares.items() for _ in range(count)]


def test_worst_group_and_gap() -> None:
    found = group_figures(*answers(a=(90, 100), b=(60, 120), c=(45, 60)))
    assert [row["group"] for row in found.table] == ["b", "c", "a"]
    assert (found.metrics["worst"].value, found.metrics["worst"].count) == (0.5, 120)
    assert found.metrics["worst"].ci95 == wilson_interval(60, 120)
    gap = found.metrics["gap"]
    assert gap.value == pytest.approx(0.4)
    assert 0.2 < gap.ci95[0] < 0.4 < gap.ci95[1] < 0.6
    assert gap.chance == pytest.approx(0.09, abs=0.03)
    assert found.metrics["gap_p_value"].value < 0.001
    assert found.table[2] == {
        "group": "a",
        "count": 100,
        "accuracy": 0.9,
        "ci95": list(wilson_interval(90, 100)),
        "compared": True,
    }


def test_equal_groups_show_the_gap_that_chance_makes() -> None:
    """100 measurements of five groups with one true accuracy: gaps are not 0, and nothing is claimed of them."""
    draw = np.random.default_rng(0)
    groups = [str(i % 5) for i in range(400)]
    found = [group_figures(draw.random(400) < 0.6, groups, draws=300).metrics for _ in range(100)]
    gaps = [one["gap"].value for one in found]
    assert np.mean(gaps) > 0.1
    assert np.mean([one["gap"].chance for one in found]) == pytest.approx(np.mean(gaps), abs=0.015)
    assert np.mean([one["gap"].ci95[0] == 0 for one in found]) >= 0.88
    assert np.mean([one["gap_p_value"].value < 0.05 for one in found]) <= 0.12


def test_interval_of_the_gap_holds_the_truth() -> None:
    draw, sizes, shares = np.random.default_rng(1), (100, 300, 80), (0.6, 0.5, 0.7)
    groups = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    held = 0
    for _ in range(100):
        right = np.concatenate([draw.random(size) < share for size, share in zip(sizes, shares, strict=True)])
        low, high = group_figures(right, groups, draws=300).metrics["gap"].ci95
        held += low <= 0.2 <= high
    assert held >= 92


def test_one_group_no_group_and_unknown_ones() -> None:
    right, groups = answers(a=(3, 4))
    alone = group_figures(right, groups)
    assert set(alone.metrics) == {"worst"}
    assert alone.notes[0] == "a is the only group to compare: there is no gap"
    with pytest.raises(ValueError, match="no picture is of a known group"):
        group_figures(right, [None] * 4)
    with pytest.raises(ValueError, match="no picture is of a known group"):
        group_figures(np.zeros(0, bool), [])
    with pytest.raises(ValueError, match=r"no group has 5 pictures; the largest is \('a', 4\)"):
        group_figures(right, groups, least_count=5)
    with pytest.raises(ValueError, match="4 answers and 1 groups"):
        group_figures(right, ["a"])
    some = group_figures(*[np.append(right, [True, False]), [*groups, None, "b"]])
    assert any("1 pictures are of no known group" in note for note in some.notes)
    assert some.metrics["gap"].count == 5


def test_small_groups_are_shown_and_not_compared() -> None:
    found = group_figures(*answers(a=(30, 40), b=(20, 40), tiny=(0, 2)), least_count=10)
    assert found.table[0]["group"] == "tiny"
    assert found.table[0]["compared"] is False
    assert found.metrics["worst"].value == 0.5
    assert any("1 groups of fewer than 10 pictures" in note for note in found.notes)


def test_all_right_leaves_room_for_what_was_not_seen() -> None:
    found = group_figures(*answers(a=(20, 20), b=(30, 30)))
    gap = found.metrics["gap"]
    assert (gap.value, gap.ci95[0]) == (0.0, 0.0)
    assert 0.05 < gap.ci95[1] < 0.5
    assert found.metrics["gap_p_value"].value == 1.0


@pytest.fixture
def table(tmp_path: Path) -> GroupedSet:
    """Six pictures; the north's are as labelled, half of the south's are not."""
    rows = ["path,label,side,colour"]
    drawn = [("red", "red", "north"), ("green", "green", "north"), ("blue", "blue", "north"),
             ("red", "red", "south"), ("green", "red", "south"), ("blue", "['green', 'blue']", "south")]  # fmt: skip
    for i, (colour, label, side) in enumerate(drawn):
        (tmp_path / f"{i}.png").write_bytes(picture(COLOURS[colour], (20 + i, 16)))
        rows.append(f'{i}.png,"{label}",{side},{colour}')
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    return read_grouped(tmp_path / "t.csv", group_columns=("side", "colour"))


def test_evaluator(model: ColourModel, table: GroupedSet, tmp_path: Path) -> None:
    found = GroupAccuracy(prompts="name", least_count=1).judge(model, table)
    assert found.metrics["top1"].value == 5 / 6
    assert found.metrics["top1"].chance == pytest.approx((5 / 3 + 2 / 3) / 6), "one picture has two right labels of three"
    assert found.metrics["side_worst"].value == 2 / 3
    assert found.metrics["side_gap"].value == pytest.approx(1 / 3)
    assert found.metrics["colour_worst"].value == 1 / 2
    assert [(row["by"], row["group"], row["count"]) for row in found.table] == [
        ("side", "south", 3), ("side", "north", 3), ("colour", "green", 2), ("colour", "blue", 2), ("colour", "red", 2),
    ]  # fmt: skip
    assert found.outcomes[0].values.tolist() == [1, 1, 1, 1, 0, 1]
    top3 = GroupAccuracy(k=3, prompts="name", by=("side",), least_count=1).run(model, table)
    accuracy = GroupAccuracy(prompts="name", least_count=1)
    asked = GroupTable(path=tmp_path / "t.csv", group_columns=("side",), accuracy=accuracy)
    in_suite = SuiteItem(name="sides", evaluator=asked, metric="side_worst")
    outcome = run_suite([in_suite], [Candidate(name="colours", load=lambda: model)], tmp_path / "run")
    assert outcome.failed == ()
    assert outcome.measured[0][1].metrics["side_worst"] == found.metrics["side_worst"]
    assert top3["top3"].value == 1.0
    assert top3["top3"].chance == 1.0
    assert "colour_worst" not in top3


def test_evaluator_refuses(model: ColourModel, table: GroupedSet) -> None:
    with pytest.raises(ValueError, match="has no groups by age; it has side, colour"):
        GroupAccuracy(by=("age",)).judge(model, table)
    with pytest.raises(ValueError, match=r"labels are not among the 2 classes, e\.g\. green"):
        GroupAccuracy(classes=("red", "blue")).judge(model, table)
    with pytest.raises(ValueError, match="k is 1 or more, got 0"):
        GroupAccuracy(k=0).judge(model, table)
    with pytest.raises(ValueError, match="no group has 10 pictures"):
        GroupAccuracy(prompts="name").judge(model, table)
