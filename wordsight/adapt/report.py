"""`report.html` of an adaptation: one self-contained file, without scripts or links, of what the run folder holds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wordsight.adapt.costs import CARBON_G_PER_KWH, carbon
from wordsight.adapt.judge import read_csv
from wordsight.evaluate.calibration import diagram_of
from wordsight.evaluate.charts import Line, line_chart
from wordsight.evaluate.report import addresses, fill_page, machine_rows, metric_name
from wordsight.evaluate.results import read_json, write_atomically

TITLES = {
    "few_shot": "Few-shot classification",
    "base_to_new": "Base to new classes",
    "cross_dataset": "Transfer to other data sets",
    "domain": "Domain generalisation",
}
MATRIX_CLASSES = 20  # more are listed by their worst pairs alone
LISTED_CLASSES = 200
WORST_PAIRS = 15


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` of a complete run folder of `wordsight adapt`.

    Everything that comes from data is escaped; the page runs no script and asks for no address.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: no complete run there.
        ValueError: a file of the folder is damaged.
    """
    folder = Path(run_dir)
    summary = read_json(folder / "summary.json", None)
    if summary is None:
        raise FileNotFoundError(f"no complete run of `wordsight adapt` in {folder}: go on with it first")
    write_atomically(folder / "report.html", render_report(folder, summary))
    return folder / "report.html"


def render_report(folder: Path, summary: Mapping[str, Any]) -> str:
    """The HTML text of a run folder's report."""
    settings = read_json(folder / "settings.json", {})
    starts = read_json(folder / "environment.json", {}).get("starts", [])
    kept = folder / "seeds" / str(summary["kept"]["seed"])
    results = [read_json(folder / "seeds" / str(seed) / "result.json", None) for seed in settings["seeds"]]
    results = [one for one in results if one is not None]
    address = addresses(folder)
    galleries = [
        section | {name: [one | {"src": address(one["file"])} for one in section[name]] for name in ("hits", "misses")}
        for section in read_json(folder / "gallery.json", {"sections": []})["sections"]
    ]
    return fill_page(
        "wordsight.adapt",
        title=folder.resolve().name,
        what=_what(settings),
        headlines=_headlines(summary),
        tests=_tests(summary, results),
        summary=summary,
        tried=[one for one in results if one["tried"]],
        curve=_curve(folder, results),
        curve_names=[f"seed {one['seed']}" for one in results if _loss(folder, one)],
        details=[_details(kept, test) for test in summary["tests"]],
        words=_words(kept),
        galleries=galleries,
        costs=_costs(summary, results),
        carbon_g_per_kwh=CARBON_G_PER_KWH,
        machine=machine_rows(starts),
        command=_command(settings, folder),
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
        num_starts=len(starts),
    )


def _what(settings: Mapping[str, Any]) -> str:
    shots = {"all": "all pictures of train", 0: "no pictures"}.get(settings["shots"], f"{settings['shots']} pictures a class")
    words = settings["words"]
    of = f" of {words['data']}" if words.get("data") else ""
    on = f" on {words['model']}" if words.get("model") else ""
    num = len(settings["classes"])
    return f"{TITLES[settings['protocol']]}: {settings['method']}{on}, {num} classes{of}, learned from {shots}."


def _row(name: str, metric: Mapping[str, Any]) -> dict[str, Any]:
    """A figure with what its bar needs, in percent of its track."""
    low, high = metric["ci95"]
    chance = metric["chance"]
    bar = {
        "value": round(100 * metric["value"], 3),
        "low": round(100 * low, 3),
        "width": round(100 * (high - low), 3),
        "chance": None if chance is None else round(100 * chance, 3),
    }
    return {"name": name, "bar": bar, **metric}


def _headlines(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    cards = [
        _row("top-1 accuracy", test["metrics"]["top1"]) | {"where": f"{test['data']} · {test['name']}"}
        for test in summary["tests"]
    ]
    if summary["harmonic_mean"] is not None:
        cards.append(_row("harmonic mean", summary["harmonic_mean"]) | {"where": "base and new classes"})
    return cards[:8]


def _tests(summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each test its mean figures, and the accuracy of each seed."""
    found = []
    for place, test in enumerate(summary["tests"]):
        seeds = [_row(f"seed {one['seed']}", one["tests"][place]["metrics"]["top1"]) for one in results]
        rows = [_row(metric_name(name), metric) for name, metric in test["metrics"].items()]
        found.append({"name": test["name"], "data": test["data"], "classes": test["num_classes"], "rows": rows, "seeds": seeds})
    return found


def _curve(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """The training loss of each seed over epochs; "" where no method has one."""
    lines = []
    for one in results:
        loss = _loss(folder, one)
        lines.append(Line(f"seed {one['seed']}, {one['method']}", list(range(1, len(loss) + 1)), loss))
    return line_chart(lines, x_name="epoch", label="Training loss over epochs, a line a seed", from_zero=True)


def _loss(folder: Path, result: Mapping[str, Any]) -> list[float]:
    found: list[float] = read_json(folder / "seeds" / str(result["seed"]) / "curve.json", {}).get("loss", [])
    return found


def _details(kept: Path, test: Mapping[str, Any]) -> dict[str, Any]:
    """Of the kept seed on a test: reliability, classes from the worst, confusions."""
    name = test["name"]
    classes = read_csv(kept / f"per_class-{name}.csv")
    asked = sorted((row for row in classes if row["count"] != "0"), key=lambda row: (float(row["accuracy"]), -int(row["count"])))
    pairs = read_csv(kept / f"confusions-{name}.csv")
    wrong = sorted((row for row in pairs if row["label"] != row["predicted"]), key=lambda row: -int(row["count"]))
    names = [row["class"] for row in classes]
    matrix = None
    if len(names) <= MATRIX_CLASSES:
        counts = {(row["label"], row["predicted"]): int(row["count"]) for row in pairs}
        totals = {row["class"]: int(row["count"]) for row in classes}
        matrix = [
            {
                "label": label,
                "cells": [
                    {
                        "count": counts.get((label, guess), 0),
                        "share": round(100 * counts.get((label, guess), 0) / max(1, totals[label])),
                        "right": label == guess,
                    }
                    for guess in names
                ],
            }
            for label in names
        ]
    found = read_json(kept / f"reliability-{name}.json", {})
    return {
        "name": name,
        "data": test["data"],
        "ece": found["ece"],
        "diagram": diagram_of(found, f"Accuracy over confidence on {test['data']} {name}"),
        "classes": [row | {"accuracy": float(row["accuracy"])} for row in asked[:LISTED_CLASSES]],
        "num_more": max(0, len(asked) - LISTED_CLASSES),
        "pairs": wrong[:WORST_PAIRS],
        "names": names,
        "matrix": matrix,
    }


def _words(kept: Path) -> list[dict[str, Any]]:
    """The vocabulary words nearest to each learned context vector; of a context for each class, those of the first ones."""
    found = read_json(kept / "nearest_words.json", [])
    if not found:
        return []
    if isinstance(found[0][0][0], str):
        return [{"place": f"{place + 1}", "words": words} for place, words in enumerate(found)]
    return [
        {"place": f"class {c + 1}, {place + 1}", "words": words}
        for c, own in enumerate(found[:4])
        for place, words in enumerate(own)
    ]


def _costs(summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    costs = summary["costs"]
    rows = [{"name": f"features of {costs['features']['count']:,} pictures, once", **costs["features"]}]
    rows += [
        {"name": f"seed {one['seed']}: {one['method']}{' (all that was tried)' if one['tried'] else ''}", **one["cost"]}
        for one in results
    ]
    rows.append({"name": "in all", **costs["total"]})
    return [row | {"megabytes": round(row["peak_memory_bytes"] / 1e6), "carbon_g": carbon(row["energy_joules"])} for row in rows]


def _command(settings: Mapping[str, Any], folder: Path) -> str:
    """What makes this run again; "" where it was started from Python."""
    words = settings["words"]
    if not words.get("data"):
        return ""
    parts = ["wordsight adapt", f"--model {shlex.quote(words['model'])}", f"--data {shlex.quote(words['data'])}"]
    parts += [
        f"--{name} {shlex.quote(str(words[name]))}"
        for name in ("architecture", "root", "val", "weights", "classes")
        if words.get(name)
    ]
    parts += [f"--test {shlex.quote(test)}" for test in words.get("test") or []]
    parts += [
        f"--method {settings['method']}",
        f"--shots {settings['shots']}",
        f"--seeds {','.join(map(str, settings['seeds']))}",
    ]
    parts += ["--allow-fewer"] if settings["allow_fewer"] else []
    parts += [f"--protocol {settings['protocol']}"] if settings["protocol"] != "few_shot" else []
    parts += [f"--budget {settings['budget_s']:g}"] if settings["budget_s"] is not None else []
    given = settings["parameters"]
    if settings["method"] == "auto":
        given = {f"{method}.{key}": value for method, own in given.items() for key, value in own.items()}
    parts += [f"--set {shlex.quote(f'{key}={_plain(value)}')}" for key, value in given.items()]
    return " ".join([*parts, "--run NEW_FOLDER"])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
