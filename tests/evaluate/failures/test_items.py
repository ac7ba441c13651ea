"""Scores to figures: Winoground's definitions, ties, chance, intervals, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.evaluate.failures.conftest import RandomModel, Scorer
from wordsight.evaluate.failures import Item, judge_items
from wordsight.evaluate.failures.items import answers, figures, has_tie, score_items
from wordsight.evaluate.intervals import grouped_share


def white() -> Image.Image:
    return Image.new("RGB", (8, 8), "white")


def group(key: str = "g", rows: tuple[str, ...] = ("row",), together: str = "x") -> Item:
    return Item(key=key, rows=rows, group=together, pictures=(white, white), texts=("a", "b"), right=(0, 1))


def choice(right: int = 0, texts: int = 4, key: str = "c") -> Item:
    words = tuple("abcdefghij"[:texts])
    return Item(key=key, rows=("row",), group=key, pictures=(white,), texts=words, right=(right,))


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        # scores of picture 0 and 1 with text 0 and 1; accuracy of both pictures, text, image, group
        ([[2, 1], [1, 2]], ([1, 1], 1, 1, 1)),
        ([[1, 2], [2, 1]], ([0, 0], 0, 0, 0)),
        ([[2, 1], [4, 3]], ([1, 0], 0, 0, 0)),  # text 0 is preferred by both pictures; picture 1 by both texts
        ([[2, 1], [5, 6]], ([1, 1], 1, 0, 0)),  # each picture finds its text, text 0 finds the other picture
        ([[5, 6], [1, 7]], ([0, 1], 0, 1, 0)),  # each text finds its picture
        ([[1, 1], [1, 1]], ([0, 0], 0, 0, 0)),  # ties are wrong
        ([[2, 1], [2, 3]], ([1, 1], 1, 0, 0)),  # a tie for text 0 between pictures
        ([[2, 2], [1, 3]], ([0, 1], 0, 1, 0)),  # a tie for picture 0 between texts
    ],
)
def test_winoground_scores_are_strict(scores: list, right: tuple) -> None:
    found = answers(group(), np.array(scores, float))
    assert (found["accuracy"], found["text"], found["image"], found["group"]) == (
        right[0],
        [right[1]],
        [right[2]],
        [right[3]],
    )


def test_a_choice_is_right_where_one_score_is_above_all_others() -> None:
    assert answers(choice(2), np.array([[1, 2, 3, 2]]))["accuracy"] == [1]
    assert answers(choice(2), np.array([[1, 2, 3, 3]]))["accuracy"] == [0]
    assert answers(choice(1), np.array([[1, 2, 3, 2]]))["accuracy"] == [0]
    pictures = Item(key="p", rows=(), group="p", pictures=(white,) * 3, texts=("a",), right=(1,))
    assert answers(pictures, np.array([[1], [2], [0]]))["accuracy"] == [1]
    assert answers(pictures, np.array([[2], [2], [0]]))["accuracy"] == [0]
    assert has_tie(pictures, np.array([[2], [2], [0]]))
    assert not has_tie(pictures, np.array([[3], [2], [2]]))
    assert not has_tie(choice(0), np.array([[1, 2, 2, 0]]))
    assert has_tie(group(), np.array([[1, 0], [1, 5]]))


def test_independent_scores_are_at_the_chance_that_is_reported() -> None:
    """1/4, 1/4 and 1/6 by simulation, and 1/K; within four standard errors."""
    random, count = np.random.default_rng(0), 6_000
    groups = [group(str(i), together=str(i)) for i in range(count)]
    found = figures(groups, list(random.random((count, 2, 2)))).metrics
    choices = figures([choice(i % 4, key=str(i)) for i in range(count)], list(random.random((count, 1, 4)))).metrics
    assert {name: metric.chance for name, metric in found.items()} == {
        "accuracy": 0.5,
        "text": 0.25,
        "image": 0.25,
        "group": 1 / 6,
    }
    for metric in (*found.values(), *choices.values()):
        assert metric.chance is not None
        assert abs(metric.value - metric.chance) < 4 * (metric.chance * (1 - metric.chance) / count) ** 0.5
        assert metric.ci95[0] <= metric.value <= metric.ci95[1]


def test_items_of_one_group_make_a_wider_interval() -> None:
    values = [1.0, 0.0] * 50
    apart = grouped_share(values, [str(i) for i in range(100)], 0.5)
    together = grouped_share(sorted(values), [str(i // 10) for i in range(100)], 0.5)
    width, wide = (metric.ci95[1] - metric.ci95[0] for metric in (apart, together))
    assert width == pytest.approx(0.2, abs=0.02)
    assert wide > 2.5 * width  # ten groups that stand and fall together
    alone = grouped_share([1.0, 1.0, 1.0], ["x"] * 3, 0.5)
    assert alone.ci95 == pytest.approx((0.2065, 1.0), abs=1e-3)  # Wilson of one


def test_rows_outcomes_and_counts() -> None:
    items = [group("a", ("x", "all"), "1"), group("b", ("y", "all"), "1"), group("c", ("y", "all"), "2")]
    scores = [np.array([[2, 1], [1, 2.0]]), np.array([[2, 1], [4, 3.0]]), np.array([[1, 2], [2, 1.0]])]
    found = figures(items, scores)
    assert [(line["row"], line["items"], line["accuracy"], line["group"]) for line in found.table] == [
        ("x", 1, 1.0, 1.0),
        ("y", 2, 0.25, 0.0),
        ("all", 3, 0.5, pytest.approx(1 / 3)),
    ], "rows of one kind stand together"
    assert len({tuple(line) for line in found.table}) == 1
    by_name = {outcome.metric: outcome for outcome in found.outcomes}
    assert by_name["accuracy"].keys == ("a/0", "a/1", "b/0", "b/1", "c/0", "c/1")
    assert by_name["group"].keys == ("a", "b", "c")
    assert by_name["accuracy"].groups == ("1",) * 4 + ("2",) * 2
    for name, outcome in by_name.items():
        assert outcome.values.mean() == found.metrics[name].value
    assert found.metrics["accuracy"].count == 6


@pytest.mark.parametrize(
    ("pictures", "texts", "right"),
    [(1, 1, (0,)), (1, 3, (3,)), (1, 3, (-1,)), (1, 3, (0, 1)), (2, 2, (1, 0)), (2, 3, (0, 1)), (2, 2, (0,)), (0, 2, (0,))],
)
def test_impossible_items_are_refused(pictures: int, texts: int, right: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="item z:"):
        Item(key="z", rows=(), group="g", pictures=(white,) * pictures, texts=("t",) * texts, right=right)


def test_mixed_kinds_no_items_and_bad_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="items of one kind"):
        figures([group(), choice()], [np.zeros((2, 2)), np.zeros((1, 4))])
    with pytest.raises(ValueError, match="no items"):
        figures([], [])
    with pytest.raises(ValueError, match="scores of item g must be"):
        figures([group()], [np.zeros((2, 3))])
    with pytest.raises(ValueError, match="finite"):
        figures([group()], [np.full((2, 2), np.nan)])


def test_what_can_not_be_judged_is_named() -> None:
    with pytest.raises(ValueError, match="object has no encode_image"):
        judge_items(object(), [group()], task="t", protocol="p")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_items(RandomModel(0), [group()], batch_size=0)
    broken = RandomModel(0)
    broken.look[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="undefined embeddings, first for a picture of g"):
        judge_items(broken, [group()], task="t", protocol="p")


def test_ties_are_told_and_the_fingerprint_knows_pictures_and_protocol() -> None:
    same = Scorer(lambda picture, text: 1.0)
    found = judge_items(same, [group("a"), group("b")], task="t", protocol="p")
    assert found.metrics["accuracy"].value == 0
    assert found.notes == ("2 of 2 items have a tie at the top, which counts as wrong",)
    assert found.protocol == "p; a tie is wrong"
    model = RandomModel(0)
    black = Item(
        key="a", rows=("row",), group="x", pictures=(white, lambda: Image.new("RGB", (8, 8))), texts=("a", "b"), right=(0, 1)
    )
    prints = {
        judge_items(model, [item], task="t", protocol=protocol).fingerprint
        for item, protocol in ((group("a"), "p"), (group("a"), "q"), (black, "p"))
    }
    assert len(prints) == 3
