"""The logit-linear baseline by closed form, the interval by simulation, the table and the plot."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from wordsight.evaluate.charts import own_file
from wordsight.evaluate.effective_robustness import (
    Measured,
    ModelPoint,
    effective_robustness,
    fit_baseline,
    read_points,
    robustness_chart,
)
from wordsight.types import Metric


def share(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def on_a_line(
    slope: float = 1.2, intercept: float = -0.7, logits: tuple[float, ...] = (-1.0, 0.0, 0.4, 1.1, 2.0)
) -> list[ModelPoint]:
    return [
        ModelPoint(model=f"m{i}", shift="imagenetv2", accuracy_in=share(x), accuracy_shift=share(slope * x + intercept))
        for i, x in enumerate(logits)
    ]


def test_a_line_is_found_again() -> None:
    baseline = fit_baseline(on_a_line())
    assert baseline.slope == pytest.approx(1.2)
    assert baseline.intercept == pytest.approx(-0.7)
    assert baseline.explained == pytest.approx(1)
    assert baseline.predict(share(0.5)) == pytest.approx(share(-0.1))
    assert (baseline.predict(0.0), baseline.predict(1.0)) == (0.0, 1.0)


def test_fit_is_least_squares_in_logits() -> None:
    draw = np.random.default_rng(0)
    points = [
        ModelPoint(model=str(i), shift="a", accuracy_in=share(x), accuracy_shift=share(0.8 * x - 1 + e))
        for i, (x, e) in enumerate(zip(draw.normal(size=30), draw.normal(size=30) / 5, strict=True))
    ]
    x, y = (np.log(v / (1 - v)) for v in np.array([(p.accuracy_in, p.accuracy_shift) for p in points]).T)
    slope, intercept = np.polyfit(x, y, 1)
    baseline = fit_baseline(points)
    assert (baseline.slope, baseline.intercept) == pytest.approx((slope, intercept))
    assert baseline.explained == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_rho_is_what_lies_above_the_line() -> None:
    baseline = fit_baseline(on_a_line())
    asked = {"accuracy_in": share(0.5), "count_in": 5000, "count_shift": 5000}
    on_it = effective_robustness(baseline, accuracy_shift=share(-0.1), **asked)
    above = effective_robustness(baseline, accuracy_shift=share(-0.1) + 0.1, **asked)
    assert on_it.value == pytest.approx(0)
    assert on_it.ci95[0] < 0 < on_it.ci95[1]
    assert above.value == pytest.approx(0.1)
    assert above.ci95[0] > 0.07
    assert above == effective_robustness(baseline, accuracy_shift=share(-0.1) + 0.1, **asked)
    assert effective_robustness(baseline, accuracy_shift=1.0, **asked | {"accuracy_in": 1.0}).value == 0.0
    fewer = effective_robustness(baseline, accuracy_shift=share(-0.1), **asked | {"count_in": 100, "count_shift": 100})
    assert fewer.ci95[1] - fewer.ci95[0] > 4 * (on_it.ci95[1] - on_it.ci95[0])


def test_interval_holds_the_truth() -> None:
    """20 models scatter around a line, a model of known rho is measured on 400 pictures of each kind."""
    draw, held, trials = np.random.default_rng(1), 0, 150
    for _ in range(trials):
        x, e = draw.uniform(-1, 2, 20), draw.normal(size=20) * 0.15
        baseline = fit_baseline(
            [
                ModelPoint(model="m", shift="a", accuracy_in=share(a), accuracy_shift=share(a - 0.5 + b))
                for a, b in zip(x, e, strict=True)
            ]
        )
        found = effective_robustness(
            baseline,
            accuracy_in=draw.binomial(400, share(0.6)) / 400,
            count_in=400,
            accuracy_shift=draw.binomial(400, share(0.1) + 0.08) / 400,
            count_shift=400,
        )
        held += found.ci95[0] <= 0.08 <= found.ci95[1]
    assert 0.89 <= held / trials <= 0.995


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 3 models or more, got 2"):
        fit_baseline(on_a_line()[:2])
    with pytest.raises(ValueError, match="of one shift, got points of imagenet_a, imagenetv2"):
        fit_baseline([*on_a_line(), ModelPoint(model="m", shift="imagenet_a", accuracy_in=0.5, accuracy_shift=0.5)])
    with pytest.raises(ValueError, match="the same accuracy without shift"):
        fit_baseline(on_a_line(logits=(1.0, 1.0, 1.0)))
    for value in (0.0, 1.0, 76.1, float("nan")):
        with pytest.raises(ValueError, match="no percent"):
            ModelPoint(model="m", shift="a", accuracy_in=value, accuracy_shift=0.5)
    with pytest.raises(ValueError, match="accuracy_shift is a share"):
        effective_robustness(fit_baseline(on_a_line()), accuracy_in=0.5, count_in=9, accuracy_shift=55.0, count_shift=9)


def test_tables(tmp_path: Path) -> None:
    rows = [{"model": "RN50, old", "shift": "imagenetv2", "accuracy_in": 0.76, "accuracy_shift": 0.63}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('\ufeffmodel,shift,accuracy_in,accuracy_shift\n"RN50, old",imagenetv2,0.76,0.63\n')
    expected = [ModelPoint(model="RN50, old", shift="imagenetv2", accuracy_in=0.76, accuracy_shift=0.63)]
    assert read_points(tmp_path / "a.json") == read_points(tmp_path / "a.csv") == expected
    for name, content, told in (
        ("b.csv", "model,shift,accuracy_in\nm,a,0.5\n", r"row 1 lacks 'accuracy_shift'"),
        ("c.csv", "model,shift,accuracy_in,accuracy_shift\nm,a,0.5,76\n", r"row 1: accuracy_shift of m on a is a share"),
        ("d.csv", "model,shift,accuracy_in,accuracy_shift\nm,a,0.5,\n", r"row 1: could not convert"),
        ("e.json", "[]", "has no rows"),
        ("f.json", "{", "is not JSON"),
        ("g.txt", "", r"is \.csv or \.json"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=told):
            read_points(tmp_path / name)


def test_plot_shows_line_models_and_intervals() -> None:
    baseline = fit_baseline(on_a_line())
    own = [
        Measured(name="<ours>", accuracy_in=Metric(0.6, 100, (0.5, 0.7)), accuracy_shift=Metric(0.5, 100, (0.4, 0.6))),
        Measured(name="perfect", accuracy_in=Metric(1.0, 9, (0.7, 1.0)), accuracy_shift=Metric(0.0, 9, (0.0, 0.3))),
    ]
    svg = robustness_chart(baseline, own, shift="ImageNet-V2", label="effective & robust")
    tree = ElementTree.fromstring(svg)
    circles = tree.findall("circle")
    assert len(circles) == 5 + 2
    assert tree.get("aria-label") == "effective & robust"
    assert tree.findtext("polyline/title") == "y = x"
    for circle in circles:
        assert 0 <= float(circle.get("cx", "nan")) <= 520
        assert 0 <= float(circle.get("cy", "nan")) <= 230
    texts = [text.text for text in tree.findall("text")]
    assert {"50%", "accuracy on ImageNet-V2", "<ours>"} <= set(texts)
    assert len(ElementTree.fromstring(robustness_chart(None, own, shift="x", label="y")).findall("polyline")) == 1
    assert robustness_chart(None, [], shift="x", label="y") == ""
    ElementTree.fromstring(own_file(svg))


def test_plot_places_equal_shares_on_the_diagonal() -> None:
    """y = x and a model with equal accuracies: as far right as it is up."""
    even = Measured(name="m", accuracy_in=Metric(0.8, 99, (0.7, 0.9)), accuracy_shift=Metric(0.8, 99, (0.7, 0.9)))
    tree = ElementTree.fromstring(robustness_chart(None, [even], shift="x", label="y"))
    (dot,) = tree.findall("circle")
    (line,) = tree.findall("polyline")
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split())
    along = (float(str(dot.get("cx"))) - x0) / (x1 - x0)
    assert float(str(dot.get("cy"))) == pytest.approx(y0 + along * (y1 - y0), abs=0.2)
