"""The tables of findings in the report: all that an evaluator tells apart, as a reader wants it, whatever stands in it."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.test_report import HOSTILE, check_page
from wordsight.evaluate import write_report, write_results
from wordsight.evaluate.finding_tables import MAX_ROWS, shown_table
from wordsight.evaluate.kept import kept_of, write_kept
from wordsight.evaluate.results import Finding
from wordsight.types import Metric


def test_columns_are_told_by_name_and_bounds_stand_together() -> None:
    table = [
        {"row": "on", "items": 1200, "accuracy": 0.5, "low": 0.25, "high": 0.755, "chance": 0.5, "text": 0.004},
        {"row": "in", "items": 7, "accuracy": None, "low": None, "high": None, "chance": 0.5, "text": 0.0},
    ]
    shown = shown_table(table, "finding.json")
    assert shown is not None
    assert shown["columns"] == [
        ("Row", False),
        ("Items", True),
        ("Accuracy", True),
        ("95% interval", True),
        ("Chance", True),
        ("Text", True),
    ]
    assert shown["rows"] == [
        ["on", "1,200", "50.0%", "25.0% – 75.5%", "50.0%", "0.4%"],
        ["in", "7", "–", "–", "50.0%", "0.0%"],
    ]
    assert (shown["count"], shown["note"]) == (2, "")
    assert shown_table([], "finding.json") is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("severity 3", 0.31, "31.0%"),
        ("drop", -0.372, "-37.2%"),
        ("top1 in", 0.5, "50.0%"),
        ("lambda", 1e-06, "1e-06"),
        ("lambda", 0.5, "0.5"),
        ("mean squared error", 0.41598, "0.416"),
        ("p value", 0.00102761, "0.001028"),
        ("mean", 5.25, "5.25"),  # no share, whatever its name
        ("group", "Kenya", "Kenya"),
        ("compared", True, "yes"),
        ("ci95", [0.1, 0.2], "10.0% – 20.0%"),
        ("severity 3 ci95", [0.1, 0.2], "10.0% – 20.0%"),
        ("taken_for", [["ox", 3], ["cow", 1]], "ox ×3, cow ×1"),
        ("shots", 16, "16"),
    ],
)
def test_a_cell_is_what_its_column_says(name: str, value: Any, expected: str) -> None:
    shown = shown_table([{name: value}], "finding.json")
    assert shown is not None
    assert shown["rows"] == [[expected]]


def finding(table: list[dict[str, Any]]) -> Finding:
    return Finding(
        task="size_distance",
        metrics={
            "accuracy": Metric(0.5, 400, (0.4, 0.6), "fraction", 0.5),
            "group": Metric(0.1, 400, (0.05, 0.2), "fraction", 1 / 6),
            "shots_to_pass": Metric(1.5154, 3, (1.0, 2.52), "shots"),
        },
        protocol="all of it",
        fingerprint="0" * 32,
        table=table,
        notes=("what " + HOSTILE,),
    )


@pytest.mark.parametrize("place", ["findings/a-finding", "an-item"])
def test_the_report_unfolds_tables_and_says_what_it_leaves_out(tmp_path: Path, place: str) -> None:
    rows = [{"relation": f"{HOSTILE} {i:03}", "items": i, "accuracy": i / 1500} for i in range(MAX_ROWS + 1234)]
    kept = kept_of(finding(rows), data="toys " + HOSTILE, split="test", model={"name": "m"})
    write_kept(tmp_path / place, kept)
    write_results(tmp_path, kept.records())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = check_page(text)
    assert [tag for tag, _ in page.tags].count("details") == 1
    assert "Size and distance" in text
    assert "One by one: 1,334 rows" in text
    assert f"1,234 more rows are in {place}/finding.json." in text
    assert re.search(r"red 099</td>\s*<td class=\"n\">99</td>\s*<td class=\"n\">6\.6%</td>", text)
    assert "red 100" not in text
    assert "what &lt;script&gt;" in text, "notes are told"
    assert re.search(r"shots to pass</td><td class=\"n value\">1\.52</td><td class=\"n soft\">1 – 2\.52</td>", text), (
        "units are kept"
    )
    assert "<b>Text score</b>" in text


def test_a_finding_without_a_table_unfolds_nothing_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    kept = kept_of(finding([]), data="toys", split="test", model={"name": "m"})
    write_kept(tmp_path / "item", kept)
    write_results(tmp_path, kept.records())
    assert "<details>" not in write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "item" / "finding.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="item holds no measurement that can be read"):
        write_report(tmp_path)
