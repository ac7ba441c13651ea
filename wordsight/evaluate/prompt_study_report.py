"""A prompt study drawn: how far each wording reaches, and what each added template gains; for the report and as SVG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wordsight.evaluate.charts import Line, line_chart, own_file
from wordsight.evaluate.finding_tables import read_findings
from wordsight.evaluate.kept import Kept
from wordsight.evaluate.results import write_atomically

TASK = "prompt_study"


def study_charts(table: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The two charts of a study's table: {name, title, svg}; those that have something to draw.

    Args:
        table: `Finding.table` of a `PromptStudy`.
    """
    single = sorted((row for row in table if row["kind"] == "template"), key=lambda row: -row["value"])
    growing = sorted((row for row in table if row["kind"] == "templates"), key=lambda row: row["templates"])
    charts = [
        ("wordings", "Top-1 accuracy (%) of each template, best first", "template", list(range(1, len(single) + 1)), single),
        ("templates", "Top-1 accuracy (%) by number of templates", "templates", [row["templates"] for row in growing], growing),
    ]
    found = []
    for name, title, x_name, xs, rows in charts:
        lines = [
            Line("upper end of the 95% interval", xs, [100 * row["high"] for row in rows], faint=True),
            Line("top-1 accuracy", xs, [100 * row["value"] for row in rows]),
            Line("lower end of the 95% interval", xs, [100 * row["low"] for row in rows], faint=True),
        ]
        svg = line_chart(lines, x_name=x_name, label=title, from_zero=True) if len(rows) > 1 else ""
        if svg:
            found.append({"name": name, "title": title, "svg": svg})
    return found


def write_study_plots(folder: Path, kept: Kept) -> list[Path]:
    """The charts of a study as files of their own in a run folder: `prompt-study-DATA-SPLIT-wordings.svg`, `-templates.svg`."""
    place = re.sub(r"[^A-Za-z0-9]+", "-", f"{kept.data} {kept.split}").strip("-")[-60:]
    paths = []
    for chart in study_charts(kept.table):
        paths.append(folder / f"prompt-study-{place}-{chart['name']}.svg")
        write_atomically(paths[-1], own_file(chart["svg"]))
    return paths


def study_sections(folder: Path) -> list[dict[str, Any]]:
    """What the report of a run folder shows of its prompt studies; nothing where there are none.

    Raises:
        ValueError: a finding of the folder is damaged.
    """
    found = []
    for _, kept in read_findings(folder):
        if kept.task == TASK:
            found.append(
                {
                    "data": kept.data,
                    "split": kept.split,
                    "protocol": kept.protocol,
                    "notes": kept.notes,
                    "charts": study_charts(kept.table),
                    "rows": [row for row in kept.table if row["kind"] != "template"],
                    "singles": [row for row in kept.table if row["kind"] == "template"],
                }
            )
    return found
