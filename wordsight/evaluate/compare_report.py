"""A comparison as one self-contained HTML page, a Markdown table, a LaTeX table and JSON.

The chart of all measurements has a dot and an interval for each model, on one axis. A spider chart would show the same figures in
a shape that depends on the order of its axes, with areas that grow as squares, and has no place for an interval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from wordsight.evaluate.charts import Point, point_chart
from wordsight.evaluate.compare import Comparison, Row, Test, bootstrap_draws
from wordsight.evaluate.finding_charts import shift_charts
from wordsight.evaluate.report import figure, fill_page, metric_name
from wordsight.evaluate.results import write_atomically
from wordsight.types import Metric

FILES = ("compare.html", "compare.md", "compare.tex", "compare.json")
GFLOPS = "GFLOPs of the image tower for one picture, a multiply-add counted as two, by torch.utils.flop_counter"
ROW_PX, NAME_PX, PLOT_PX, END_PX = 16, 210, 520, 30
LEVEL = 0.05


def write_comparison(folder: str | Path, comparison: Comparison) -> list[Path]:
    """Write `FILES` of a comparison, each whole or not at all.

    Everything that comes from data is escaped; the page runs no script and asks for no address.
    """
    place = Path(folder)
    for name, render in zip(FILES, (render_html, render_markdown, render_latex, render_json), strict=True):
        write_atomically(place / name, render(comparison))
    return [place / name for name in FILES]


def render_html(comparison: Comparison) -> str:
    """The page's text."""
    return fill_page(
        "wordsight.evaluate",
        "compare.html.j2",
        baseline=comparison.baseline.name,
        runs=[
            {
                "name": run.name,
                "source": run.model.get("source", ""),
                "weights": run.model.get("weights", "")[:12],
                "gflops": _number(run.model.get("gflops")),
                "parameters": _number((run.model.get("num_parameters") or 0) / 1e6 or None),
                "measured": len(run.measured),
                "mean": comparison.means.get(run.name),
            }
            for run in comparison.runs
        ],
        means=bool(comparison.means),
        rows=[_html_row(row, comparison) for row in comparison.rows],
        dots=dot_chart(comparison),
        scaling=scaling_chart(comparison),
        shifts=shift_charts([(run.name, kept) for run in comparison.runs for kept in run.measured]),
        gflops=GFLOPS,
        notes=comparison.notes,
        num_tests=num_tests(comparison),
    )


def num_tests(comparison: Comparison) -> int:
    """How many tests p values are adjusted for."""
    return sum(len(row.tests) for row in comparison.rows)


def _html_row(row: Row, comparison: Comparison) -> dict[str, Any]:
    tests = {test.model: test for test in row.tests}
    cells = []
    for run in comparison.runs:
        metric, test = row.figures.get(run.name), tests.get(run.name)
        cells.append(
            {
                "value": None if metric is None else figure(metric.value, metric.unit),
                "interval": None if metric is None else _interval(metric),
                "test": None if test is None else test_words(test, metric),
                "sure": test is not None and test.p_holm < LEVEL,
                "better": test is not None and test.difference > 0,
            }
        )
    first = next(iter(row.figures.values()))
    return {
        "title": row.title,
        "metric": metric_name(row.metric),
        "cells": cells,
        "chance": figure(first.chance, first.unit),
        "count": first.count,
        "protocol": "; ".join(dict.fromkeys(row.protocols.values())),
        "warnings": row.warnings,
    }


def _interval(metric: Metric) -> str:
    return " – ".join(figure(bound, metric.unit) for bound in metric.ci95)


def test_words(test: Test, metric: Metric | None) -> str:
    """A test in a line: the difference with its interval, p raw and adjusted, of how many samples by which method."""
    difference = _difference(test, metric, " points")
    groups = f" in {test.num_groups:,} groups" if test.num_groups < test.count else ""
    return f"{difference}; {_p(test.p_value)}, Holm {_p(test.p_holm, '')}; {test.method}, {test.count:,} samples{groups}"


def _difference(test: Test, metric: Metric | None, unit: str = "") -> str:
    """With its interval; of shares in points."""
    if metric is None or metric.unit == "fraction":
        low, high = (f"{100 * bound:+.1f}" for bound in test.ci95)
        return f"{100 * test.difference:+.1f}{unit} ({low} to {high})"
    return f"{test.difference:+.3g} ({test.ci95[0]:+.3g} to {test.ci95[1]:+.3g})"


def _p(value: float, name: str = "p ") -> str:
    if value < 1e-4:
        return f"{name}< 0.0001"
    sign = "= " if name else ""
    return f"{name}{sign}{value:.2g}" if value < 0.0995 else f"{name}{sign}{value:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# Charts


def dot_chart(comparison: Comparison) -> str:
    """Shares of all measurements, a dot and an interval for each model, the measurements below each other; "" without any."""
    rows = [row for row in comparison.rows if any(metric.unit == "fraction" for metric in row.figures.values())]
    if not rows:
        return ""
    each = max(ROW_PX, 9 * len(comparison.runs) + 6)
    height = each * len(rows) + 30
    width = NAME_PX + PLOT_PX + END_PX

    def x_at(share: float) -> float:
        return NAME_PX + PLOT_PX * min(1.0, max(0.0, share))

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="All measurements with their intervals">']
    for percent in range(0, 101, 20):
        x = x_at(percent / 100)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{percent}%</text>')
    for k, row in enumerate(rows):
        top = 6 + k * each
        title = row.title if len(row.title) <= 32 else row.title[:31] + "…"
        parts.append(f'<text class="tick" x="{NAME_PX - 10}" y="{top + each / 2 + 3:.1f}" text-anchor="end">{escape(title)}')
        parts.append(f"<title>{escape(row.title)}, {escape(metric_name(row.metric))}</title></text>")
        for place, run in enumerate(comparison.runs):
            metric = row.figures.get(run.name)
            if metric is None or metric.unit != "fraction":
                continue
            y = top + (place + 0.5) * (each - 6) / len(comparison.runs)
            low, high = (x_at(bound) for bound in metric.ci95)
            words = f"{run.name}: {figure(metric.value, metric.unit)} ({_interval(metric)})"
            parts.append(f'<line class="s{place % 6}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<circle class="s{place % 6}" cx="{x_at(metric.value):.1f}" cy="{y:.1f}" r="3">')
            parts.append(f"<title>{escape(words)}</title></circle>")
        chance = next((metric.chance for metric in row.figures.values() if metric.unit == "fraction"), None)
        if chance is not None:
            x = x_at(chance)
            parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{top + each - 5:.1f}"/>')
    return "".join([*parts, "</svg>"])


def scaling_chart(comparison: Comparison) -> str:
    """The mean of the shares over the operations of the image tower, a point a model; "" where fewer than two say both."""
    points = []
    for number, run in enumerate(comparison.runs, start=1):
        gflops, mean = run.model.get("gflops"), comparison.means.get(run.name)
        if gflops and mean is not None:
            low, high = (100 * bound for bound in mean.ci95)
            points.append(Point(name=run.name, mark=str(number), x=gflops, y=100 * mean.value, low=low, high=high))
    if len(points) < 2:
        return ""
    return point_chart(points, x_name="GFLOPs of the image tower", y_name="mean, %", label="Mean score over cost")


# Tables


def render_markdown(comparison: Comparison) -> str:
    """A table for a README: figures with intervals, and with differences where they could be tested."""
    names = [run.name for run in comparison.runs]
    head = ["measurement", "metric", *names, "chance"]
    count, baseline = num_tests(comparison), _md(comparison.baseline.name)
    lines = [
        f"95% intervals in brackets. After a semicolon: the difference from {baseline} in points, by paired tests on the same "
        f"samples; p is adjusted by Holm for all {count} of them, and a bootstrap's is no smaller than "
        f"{2 / bootstrap_draws(count):.2g} before.",
        "",
        _md_line(head),
        _md_line(["---", "---", *["--:" for _ in names], "--:"]),
    ]
    for row in comparison.rows:
        tests = {test.model: test for test in row.tests}
        cells = [_md_cell(row.figures.get(name), tests.get(name)) for name in names]
        first = next(iter(row.figures.values()))
        lines.append(_md_line([row.title, metric_name(row.metric), *cells, figure(first.chance, first.unit)]))
    if comparison.means:
        cells = [_md_cell(comparison.means[name], None) for name in names]
        chance = figure(next(iter(comparison.means.values())).chance, "fraction")
        lines.append(_md_line([mean_title(comparison), "", *cells, chance]))
    warnings = [f"- {_md(f'{row.title}: {text}')}" for row in comparison.rows for text in row.warnings]
    notes = [f"- {_md(text)}" for text in comparison.notes]
    return "\n".join([*lines, *([""] if warnings or notes else []), *warnings, *notes]) + "\n"


def mean_title(comparison: Comparison) -> str:
    """What the mean is of."""
    return f"mean of {next(iter(comparison.means.values())).count} measurements"


def _md_cell(metric: Metric | None, test: Test | None) -> str:
    if metric is None:
        return "–"
    found = f"{figure(metric.value, metric.unit)} ({_interval(metric)})"
    return found if test is None else f"{found}; {_difference(test, metric)}, {_p(test.p_holm)}"


def _md(text: str) -> str:
    for special in "\\`*_[]<>|":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def _md_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell if set(cell) <= set("-:") else _md(cell) for cell in cells) + " |"


def render_latex(comparison: Comparison) -> str:
    """A table for a paper, with booktabs; a star marks a difference from the baseline that is significant after adjustment."""
    names = [run.name for run in comparison.runs]
    lines = [
        "% needs \\usepackage{booktabs}; * differs from the first model (paired test, Holm-adjusted p < .05)",
        f"\\begin{{tabular}}{{ll{'r' * len(names)}r}}",
        "\\toprule",
        " & ".join(map(latex, ["Measurement", "Metric", *names, "Chance"])) + r" \\",
        "\\midrule",
    ]
    for row in comparison.rows:
        tests = {test.model: test for test in row.tests}
        first = next(iter(row.figures.values()))
        cells = [_latex_cell(row.figures.get(name), tests.get(name)) for name in names]
        words = [latex(row.title), latex(metric_name(row.metric)), *cells, latex(figure(first.chance, first.unit))]
        lines.append(" & ".join(words) + r" \\")
    if comparison.means:
        cells = [_latex_cell(comparison.means[name], None) for name in names]
        chance = figure(next(iter(comparison.means.values())).chance, "fraction")
        title = latex(mean_title(comparison)[:1].upper() + mean_title(comparison)[1:])
        lines += ["\\midrule", " & ".join([title, "", *cells, latex(chance)]) + r" \\"]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex_cell(metric: Metric | None, test: Test | None) -> str:
    if metric is None:
        return "--"
    star = "$^{*}$" if test is not None and test.p_holm < LEVEL else ""
    return f"{latex(figure(metric.value, metric.unit))}{star} {{\\small [{latex(_interval(metric))}]}}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    "–": "--",
    "·": r"$\cdot$",
    "<": r"$<$",
    ">": r"$>$",
}


def latex(text: str) -> str:
    """Text as LaTeX prints it: no character of it is a command."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def render_json(comparison: Comparison) -> str:
    """All figures and tests for programs."""
    content = {
        "baseline": comparison.baseline.name,
        "models": [{**run.model, "name": run.name, "folder": str(run.folder)} for run in comparison.runs],
        "rows": [
            {
                "item": row.item,
                "task": row.place[0],
                "data": row.place[1],
                "split": row.place[2],
                "metric": row.metric,
                "figures": {name: asdict(metric) for name, metric in row.figures.items()},
                "protocols": row.protocols,
                "tests": [asdict(test) for test in row.tests],
                "warnings": list(row.warnings),
            }
            for row in comparison.rows
        ],
        "means": {name: asdict(metric) for name, metric in comparison.means.items()},
        "notes": list(comparison.notes),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
