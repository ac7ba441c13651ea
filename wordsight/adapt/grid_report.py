"""`report.html` of a grid of `wordsight long-tail`: one self-contained file, without scripts or links."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wordsight.adapt.grid_figures import COLUMNS, accuracy_cost, class_counts, method_words
from wordsight.adapt.judge import read_csv
from wordsight.adapt.tail_recipes import find_recipe
from wordsight.evaluate.report import fill_page, machine_rows
from wordsight.evaluate.results import read_json, write_atomically

LISTED_CLASSES = 200


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` of a run folder of `wordsight long-tail`.

    Everything that comes from data is escaped; the page runs no script and asks for no address.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: no such run there.
        ValueError: a file of the folder is damaged.
    """
    folder = Path(run_dir)
    summary = read_json(folder / "summary.json", None)
    if summary is None:
        raise FileNotFoundError(f"no run of `wordsight long-tail` in {folder} that has come to figures: go on with it first")
    write_atomically(folder / "report.html", render_report(folder, summary))
    return folder / "report.html"


def render_report(folder: Path, summary: Mapping[str, Any]) -> str:
    """The HTML text of a run folder's report."""
    settings = read_json(folder / "settings.json", {})
    starts = read_json(folder / "environment.json", {}).get("starts", [])
    kept = summary["kept"]
    cell = folder / "cells" / kept["method"] / str(kept["seed"])
    classes = sorted(read_csv(cell / "per_class-test.csv"), key=lambda row: -float(row["train_count"]))
    result = read_json(cell / "result.json", {})
    return fill_page(
        "wordsight.adapt",
        "long_tail.html.j2",
        title=folder.resolve().name,
        what=_what(settings, summary),
        summary=summary,
        columns=COLUMNS,
        rows=[
            row | {"words": method_words(row), "cells": _cells(row), "megabytes": round(row["cost"]["peak_memory_bytes"] / 1e6)}
            for row in summary["methods"]
        ],
        plot=accuracy_cost(summary),
        counts=class_counts(settings, summary),
        limits={"many": settings["many_above"], "few": settings["few_below"]},
        confusion=_confusion(result),
        classes=classes[:LISTED_CLASSES],
        num_more=max(0, len(classes) - LISTED_CLASSES),
        costs=_costs(summary),
        machine=machine_rows(starts),
        command=command_line(settings, summary),
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
        num_starts=len(starts),
    )


def _what(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    on = f" on {settings['words']['model']}" if settings["words"].get("model") else ""
    pictures = f"{summary['pictures']:,}{' weighed' if summary['weighed'] else ''}"
    return (
        f"{len(summary['methods'])} methods{on}, learned from {pictures} pictures of {len(summary['counts']):,} classes of "
        f"{summary['data']}: {summary['done']} of {summary['cells']} cells."
    )


def _cells(row: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """The figures of the table's columns; None where no test picture is of such a class."""
    return [row["metrics"].get(name) for name in COLUMNS]


def _confusion(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each group, the shares of its pictures that were taken for classes of each group, and the calibration error."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in result["confusion"]:
        rows.setdefault(one["right"], []).append(one)
    ece = result["metrics"]
    return [{"name": name, "cells": own, "ece": ece[f"ece_{name}"], "count": own[0]["count"]} for name, own in rows.items()]


def _costs(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    costs = summary["costs"]
    shared = costs["features"]
    rows = []
    if shared:
        grams = shared["energy_joules"] / 3.6e6 * costs["carbon_g_per_kwh"]
        rows.append({"name": f"features and tokens of {shared['count']:,} pictures, once", **shared, "carbon_g": grams})
    rows += [{"name": f"{summary['done']} cells", **costs["cells"]}, {"name": "in all", **costs["total"]}]
    return [row | {"megabytes": round(row["peak_memory_bytes"] / 1e6)} for row in rows]


def command_line(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What makes this run again; "" where it was started from Python."""
    words = settings["words"]
    if not words.get("data"):
        return ""
    parts = ["wordsight long-tail", f"--model {shlex.quote(words['model'])}", f"--data {shlex.quote(words['data'])}"]
    names = ("architecture", "root", "val", "test", "weights", "classes")
    parts += [f"--{name} {shlex.quote(str(words[name]))}" for name in names if words.get(name)]
    parts += [f"--recipe {words['recipe']}"] if words.get("recipe") else []
    methods = [row["method"] for row in summary["methods"]] + [one["method"] for one in summary["failed"]]
    parts += [f"--methods {','.join(dict.fromkeys(methods))}", f"--seeds {','.join(map(str, summary['seeds']))}"]
    for option, name, usual in (("many-above", "many_above", 100), ("few-below", "few_below", 20)):
        parts += [f"--{option} {settings[name]:g}"] if settings[name] != usual else []
    given = _flat(settings["parameters"])
    if words.get("recipe"):
        known = json.loads(json.dumps(_flat(find_recipe(words["recipe"]).request.parameters)))
        given = [one for one in given if list(one) not in known]
    parts += [f"--set {shlex.quote(f'{key}={_plain(value)}')}" for key, value in given]
    return " ".join([*parts, "--run NEW_FOLDER"])


def _flat(parameters: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, Any]]:
    return [(f"{estimator}.{key}", value) for estimator, own in parameters.items() for key, value in own.items()]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
