"""Reliability: bins, the error over them, and the diagram; `test_long_tail` checks the error's value and interval."""

from html.parser import HTMLParser

import numpy as np
import pytest

from wordsight.evaluate.calibration import calibration_error, diagram_of, expected_calibration_error, reliability


def test_bins_hold_what_the_definition_says() -> None:
    confidences = np.array([0.0, 0.1, 0.5, 0.51, 0.9, 1.0])
    correct = np.array([False, False, True, False, True, True])
    found = reliability(correct, confidences, num_bins=2)
    assert found.counts.tolist() == [3, 3]  # 0.5 closes the first bin
    assert found.confidences == pytest.approx([0.2, 2.41 / 3])
    assert found.accuracies == pytest.approx([1 / 3, 2 / 3])
    assert found.ece == pytest.approx(0.5 * abs(1 / 3 - 0.2) + 0.5 * abs(2 / 3 - 2.41 / 3))
    assert found.ece == expected_calibration_error(correct, confidences, 2) == calibration_error(correct, confidences, 2)[0].value


def test_a_calibrated_classifier_has_no_error_and_an_overconfident_one_has_its_gap() -> None:
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.2, 1, 200_000)
    assert reliability(generator.random(200_000) < confidences, confidences).ece < 0.01
    assert reliability(generator.random(200_000) < confidences - 0.2, confidences).ece == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("correct", "confidences", "said"),
    [
        ([], [], "each prediction"),
        ([True], [0.1, 0.2], "each prediction"),
        ([True], [1.5], "probability"),
        ([True], [np.nan], "prob"),
    ],
)
def test_what_is_no_probability_is_refused(correct: list[bool], confidences: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reliability(np.array(correct, dtype=bool), np.array(confidences))


def test_the_diagram_shows_each_bin_that_has_pictures_where_it_belongs() -> None:
    found = reliability(np.array([True, False, True, True]), np.array([0.55, 0.55, 0.95, 0.97]), num_bins=10)
    svg = diagram_of(found.to_json(), 'colours "<b>"')
    bars: list[dict[str, str]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "rect":
                bars.append({name: value or "" for name, value in attrs})

    Reader().feed(svg)
    right = [bar for bar in bars if bar["class"] == "right"]
    assert len(right) == 2
    whole = float(right[1]["height"])  # all right: the whole height
    assert float(right[0]["height"]) == pytest.approx(whole / 2, abs=0.1)
    assert float(right[1]["x"]) - float(right[0]["x"]) == pytest.approx(0.4 * whole, abs=0.2)
    gap = next(bar for bar in bars if bar["class"] == "gap")
    assert float(gap["height"]) == pytest.approx(0.05 * whole, abs=0.1)
    assert "&lt;b&gt;" in svg
    assert found.to_json()["bins"][0] == {"from": 0.0, "to": 0.1, "count": 0, "confidence": None, "accuracy": None}
