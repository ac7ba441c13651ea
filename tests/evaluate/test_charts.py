"""Marks of a chart's points: none covers another, none leaves the chart, each as near to its point as that lets it."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import numpy as np
import pytest

from wordsight.evaluate.chart_marks import LINE, Mark, place_marks, spread
from wordsight.evaluate.charts import Point, own_file, point_chart

BOUNDS = (52.0, 12.0, 508.0, 284.0)


def overlap(a: Mark, b: Mark) -> bool:
    across = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    return across > 1e-9 and abs(a.middle - b.middle) < LINE - 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_no_mark_covers_another_or_leaves_the_chart(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 31))
    xs = np.concatenate([draw.normal(draw.uniform(80, 480), 6, count // 2), draw.uniform(84, 476, count - count // 2)])
    points = [(float(x), float(y)) for x, y in zip(xs.clip(84, 476), draw.uniform(20, 280, count), strict=True)]
    texts = [f"{i} a_rather_long_name_of_a_method" if draw.random() < 0.2 else str(i) for i in range(count)]
    marks = place_marks(points, texts, *BOUNDS)
    for one, other in itertools.combinations(marks, 2):
        assert not overlap(one, other), (one, other)
    for mark, text, (x, y) in zip(marks, texts, points, strict=True):
        assert mark.text in (text, text.split(" ")[0])
        assert mark.left >= BOUNDS[0] - 1e-9
        assert mark.left + mark.width <= BOUNDS[2] + 1e-9
        assert BOUNDS[1] <= mark.middle - LINE / 2 + 1e-9
        assert mark.middle + LINE / 2 <= BOUNDS[3] + 1e-9
        assert (mark.leader is None) or mark.leader[2:] == (x, y)


def test_a_point_alone_has_its_whole_mark_beside_it_and_equal_points_have_columns() -> None:
    (mark,) = place_marks([(100.0, 50.0)], ["1 zero_shot"], *BOUNDS)
    assert (mark.text, mark.left, mark.middle, mark.leader) == ("1 zero_shot", 108.0, 50.0, None)
    (near_the_edge,) = place_marks([(495.0, 50.0)], ["1 zero_shot"], *BOUNDS)
    assert near_the_edge.left + near_the_edge.width == pytest.approx(487)
    marks = place_marks([(250.0, 150.0)] * 21, list(map(str, range(21))), *BOUNDS)
    assert sum(mark.left < 250 for mark in marks) == 10
    assert {mark.leader[2:] for mark in marks if mark.leader is not None} == {(250.0, 150.0)}


def test_spread_moves_as_little_as_it_can() -> None:
    assert spread([10, 30, 50], 10, 0, 100) == [10, 30, 50]
    assert spread([50, 50, 50], 10, 0, 100) == [40, 50, 60]
    assert spread([1, 2], 10, 0, 100) == [0, 10]
    assert spread([99, 100], 10, 0, 100) == [90, 100]
    assert spread([], 10, 0, 100) == []
    draw = np.random.default_rng(0)
    wanted = sorted(draw.uniform(0, 60, 5).tolist())
    found = np.array(spread(wanted, 10, -100, 200))
    assert np.diff(found).min() >= 10 - 1e-9
    for _ in range(500):  # no other places that are far enough apart are nearer
        other = np.sort(found + draw.normal(0, 3, 5))
        if np.diff(other).min() >= 10:
            assert ((other - wanted) ** 2).sum() >= ((found - wanted) ** 2).sum() - 1e-9


def test_a_key_lies_below_the_chart_and_the_sheet_is_as_high() -> None:
    points = [Point(name=f"m{i}", mark=str(i), x=10.0 + i, y=0.5, low=0.4, high=0.6, strong=i == 3) for i in range(8)]
    plain, keyed = (point_chart(points, x_name="s", y_name="%", label="x", key=key) for key in ((), ["<1> & a", "2 b", "3 c"]))
    heights = [float(ElementTree.fromstring(one).get("viewBox", "").split()[3]) for one in (plain, keyed)]
    assert heights[1] > heights[0]
    tree = ElementTree.fromstring(own_file(keyed))
    texts = [one for one in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert all(float(one.get("y", 0)) < heights[1] for one in texts)
    assert {"<1> & a", "2 b", "3 c"} <= {one.text for one in texts}
    sheet = next(tree.iter("{http://www.w3.org/2000/svg}rect"))
    assert (sheet.get("width"), sheet.get("height")) == ("100%", "100%")
