"""`report.html`: one self-contained file, without scripts or links, that shows what a run folder holds and says what it lacks."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from wordsight.evaluate.charts import Line, line_chart, smooth
from wordsight.evaluate.finding_charts import finding_charts
from wordsight.evaluate.finding_tables import read_findings, shown_table
from wordsight.evaluate.kept import Kept
from wordsight.evaluate.prompt_study_report import TASK as PROMPT_STUDY
from wordsight.evaluate.prompt_study_report import study_sections
from wordsight.evaluate.results import check_record, read_json, write_atomically

TASK_NAMES = {  # others: the words that they are made of
    "zero_shot": "Zero-shot classification",
    "knn": "Nearest neighbours",
    "few_shot_curve": "Few-shot curve",
    "size_distance": "Size and distance",
}
METRIC_NAMES = {
    "text": "text score",
    "image": "image score",
    "group": "group score",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean per class",
    "top1_any": "best class is one of the picture's",
    "mean_top1_top5": "mean of top-1 and top-5",
    "mean_recall@1": "mean R@1 of both directions",
    "map": "mAP",
    "map_11_point": "mAP, 11-point",
    "roc_auc": "area under ROC",
    "macro_f1": "macro F1",
    "ece": "calibration error (ECE)",
    "top1_zero_shot": "top-1, zero-shot",
    "shots_to_pass_zero_shot": "shots to pass zero-shot",
    "image_to_text_median_rank": "picture → text, median rank",
    "text_to_image_median_rank": "text → picture, median rank",
}
NAME_BEGINNINGS = {  # the first that fits
    "trained_": "trained concepts, ",
    "heldout_": "held-out concepts, ",
    "imagenetv2_": "ImageNet V2, ",
    "imagenet_sketch_": "ImageNet Sketch, ",
    "imagenet_a_": "ImageNet-A, ",
    "imagenet_o_": "ImageNet-O, ",
    "imagenet_r_": "ImageNet-R, ",
    "objectnet_": "ObjectNet, ",
    "average_": "average of the sets, ",
}
LOWER_IS_BETTER = ("median_rank",)
HEADLINES = ("top1", "text_to_image_R@1", "image_to_text_R@1")
MAX_GALLERY_BYTES = 40_000_000  # pictures beyond this are named instead of shown, so that the file stays openable


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` of a run folder from recipe.json, environment.json, metrics.jsonl, speed.jsonl, results.json,
    gallery.json and the finding.json of each measurement.

    What is missing is said in its place. Everything that comes from data is escaped; the page runs no script and asks for no
    address.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file of the folder is damaged.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}: give the folder that `wordsight train` or `wordsight evaluate` wrote")
    write_atomically(folder / "report.html", render_report(folder))
    return folder / "report.html"


def render_report(folder: Path) -> str:
    """The HTML text of a run folder's report."""
    records = [check_record(record) for record in read_json(folder / "results.json", [])]
    lines = _json_lines(folder / "metrics.jsonl")
    sections = read_json(folder / "gallery.json", {}).get("sections", [])
    environment = read_json(folder / "environment.json", {}).get("starts", [])
    recipe = read_json(folder / "recipe.json", {})
    return fill_page(
        "wordsight.evaluate",
        title=folder.resolve().name,
        headlines=_headlines(records),
        groups=_groups(records, _details(folder, sections)),
        comparisons=_comparisons(records),
        charts=_charts(lines, _json_lines(folder / "speed.jsonl")),
        studies=study_sections(folder),
        galleries=_inline(folder, sections),
        machine=machine_rows(environment),
        commands=_commands(environment, recipe, sections),
        recipe_text=json.dumps(recipe.get("resolved", recipe), indent=2, ensure_ascii=False) if recipe else "",
        model=_model_name(recipe),
        num_starts=len(environment),
    )


def fill_page(package: str, template: str = "report.html.j2", **values: Any) -> str:
    """A template of a package's `assets` with values in it, all escaped, and the style that reports share."""
    import jinja2

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"percent": percent, "figure": figure, "thousands": lambda number: f"{number:,}"}
    source = (files(package) / "assets" / template).read_text(encoding="utf-8")
    style = (files("wordsight.evaluate") / "assets" / "report.css").read_text(encoding="utf-8")
    return page.from_string(source).render(style=style, **values)


# Numbers


def percent(share: float) -> str:
    """A share as a percentage: one decimal, two digits that count where it is below 1%."""
    value = 100 * share
    return f"{value:.1f}%" if value == 0 or abs(value) >= 0.95 else f"{value:.2g}%"


def figure(value: float | None, unit: str) -> str:
    """A metric's value for a reader."""
    if value is None:
        return "–"
    if unit == "fraction":
        return percent(value)
    return f"{value:,.0f}" if unit == "rank" else f"{value:.3g}"


def unit_of(metric: str) -> str:
    """The unit of a record of `results.json`, which does not say it."""
    return "rank" if metric.endswith(LOWER_IS_BETTER) else "fraction"


def metric_name(metric: str) -> str:
    """`image_to_text_R@5` -> `picture → text, R@5`."""
    if metric in METRIC_NAMES:
        return METRIC_NAMES[metric]
    named = metric.replace("image_to_text_", "picture → text, ").replace("text_to_image_", "text → picture, ")
    if shots := re.fullmatch(r"top1_(\d+)_shot", named):
        return f"top-1, {shots[1]} shot{'s' if shots[1] != '1' else ''} a class"
    for beginning, words in NAME_BEGINNINGS.items():
        if named.startswith(beginning):
            named = words + re.sub("^in_top1", "top1 on ImageNet's pictures of its classes", named.removeprefix(beginning))
            break
    return re.sub(r"\btop(\d+)\b", r"top-\1", named.replace("_", " "))


def task_name(task: str) -> str:
    """`size_distance` -> `Size distance`."""
    words = task.replace("_", " ")
    return TASK_NAMES.get(task, words[:1].upper() + words[1:])


def _row(record: dict[str, Any], unit: str | None = None) -> dict[str, Any]:
    """A record with what the page needs to draw it; a share's bar is in percent of its track."""
    unit = unit or unit_of(record["metric"])
    row = record | {"name": metric_name(record["metric"]), "unit": unit, "lift": None, "bar": None}
    low, high = record["ci95"]
    if unit == "fraction" and low >= 0:  # a difference may lie below, and has no bar
        chance = record["chance"]
        row["bar"] = {
            "value": round(100 * record["value"], 3),
            "low": round(100 * low, 3),
            "width": round(100 * (high - low), 3),
            "chance": None if chance is None else round(100 * chance, 3),
        }
        if chance and record["value"] / chance >= 1.05 and chance < 1:
            lift = record["value"] / chance
            row["lift"] = f"{lift:,.0f}×" if lift >= 10 else f"{lift:.1f}×"
    return row


def _headlines(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One figure for each of up to four data sets: the first of HEADLINES that was measured there, without training if it was."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for metric in HEADLINES:
        for record in sorted(records, key=lambda record: record["task"] not in ("zero_shot", "retrieval")):
            if record["metric"] == metric:
                found.setdefault((record["data"], record["split"]), record)
    order = list(dict.fromkeys((record["data"], record["split"]) for record in records))
    rows = [_row(found[place]) for place in order if place in found][:4]
    return [row | {"task_name": task_name(row["task"])} for row in rows]


def _details(folder: Path, sections: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Place of a measurement -> its units, notes, table and charts; what other sections of the page show is not shown twice."""
    pictured = {(section["task"], section["data"], section["split"]) for section in sections}
    found = {}
    for path, kept in read_findings(folder):
        elsewhere = kept.task == PROMPT_STUDY or (kept.task, kept.data, kept.split) in pictured
        found[_place(kept)] = {
            "units": {name: metric.unit for name, metric in kept.metrics.items()},
            "notes": () if elsewhere else kept.notes,
            "table": None if elsewhere else shown_table(kept.table, path.relative_to(folder).as_posix()),
            "charts": finding_charts(kept),
        }
    return found


def _place(kept: Kept) -> tuple[str, ...]:
    return kept.task, kept.data, kept.split, kept.protocol


def _groups(records: Sequence[dict[str, Any]], details: dict[tuple[str, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    grouped: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["task"] == PROMPT_STUDY and "template" in record["metric"]:
            continue  # the study's own section has them
        place = record["task"], record["data"], record["split"], record["protocol"]
        grouped[place].append(_row(record, details.get(place, {}).get("units", {}).get(record["metric"])))
    return [
        {
            "task": task_name(place[0]),
            "data": place[1],
            "split": place[2],
            "protocol": place[3],
            "rows": rows,
            "fingerprint": rows[0]["fingerprint"],
            "notes": details.get(place, {}).get("notes", ()),
            "table": details.get(place, {}).get("table"),
            "charts": details.get(place, {}).get("charts", ()),
        }
        for place, rows in grouped.items()
    ]


def _comparisons(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of splits of one data set whose names differ by `seen` and `unseen`, metric by metric."""
    by_place: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        by_place[record["task"], record["data"], record["metric"]][record["split"]] = record
    pairs: dict[tuple[str, str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for (task, data, metric), splits in by_place.items():
        for split, unseen in splits.items():
            seen = splits.get(re.sub("unseen", "seen", split)) if "unseen" in split else None
            if seen is not None and unit_of(metric) == "fraction":
                row = {"name": metric_name(metric), "seen": _row(seen), "unseen": _row(unseen)}
                pairs[task, data, seen["split"], split].append(row)
    return [
        {"task": task_name(task), "data": data, "seen": seen, "unseen": unseen, "rows": rows}
        for (task, data, seen, unseen), rows in pairs.items()
    ]


# Curves


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a line that is cut off or is no object with a step is passed over."""
    found = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int | float):
                found.append(line)
    return found


def _points(lines: Iterable[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    xs, ys = [], []
    for line in lines:
        value = line.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            xs.append(float(line["step"]))
            ys.append(float(value))
    return xs, ys


def _charts(lines: list[dict[str, Any]], speed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss, evaluations, speed, learning rate and the like over steps: {title, svg, legend, last}."""
    charts: list[dict[str, Any]] = []
    measured: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in dict.fromkeys(key for line in lines for key in line if key.count("/") and not key.startswith("loss/")):
        prefix, _, metric = name.rpartition("/")
        measured[prefix, unit_of(metric)].append(name)

    def add(title: str, curves: list[Line], *, from_zero: bool = False, shown: str = "") -> None:
        svg = line_chart(curves, x_name="step", label=f"{title} over training steps", from_zero=from_zero)
        if svg:
            named = [line.name for line in curves if not line.faint and len(line.xs)]
            charts.append({"title": title, "svg": svg, "legend": named if len(named) > 1 else [], "last": shown})

    xs, ys = _points(lines, "loss")
    if xs:
        smoothed = smooth(ys, len(ys) // 40)
        add("Training loss", [Line("loss", xs, ys, faint=True), Line("smoothed", xs, smoothed)], shown=f"{smoothed[-1]:.3f}")
    for (prefix, unit), names in measured.items():
        curves = [Line(metric_name(name.rpartition("/")[2]), *_points(lines, name)) for name in names[:6]]
        if unit == "fraction":
            curves = [Line(curve.name, curve.xs, [100 * y for y in curve.ys]) for curve in curves]
        task, _, split = prefix.partition("/")
        title = f"{task_name(task)}, {split}" if split else task
        add(f"{title} ({'%' if unit == 'fraction' else unit})", curves, from_zero=True)
    for name, title, from_zero in (
        ("samples_per_s", "Samples per second", True),
        ("lr", "Learning rate", True),
        ("grad_norm", "Gradient norm", True),
        ("log_scale", "Log-scale of the logits", False),
    ):
        xs, ys = _points(lines, name)
        if not xs:
            xs, ys = _points(speed, name)
        if xs:
            shown = f"median {sorted(ys)[len(ys) // 2]:,.0f}" if name == "samples_per_s" else ""
            add(title, [Line(name, xs, ys)], from_zero=from_zero, shown=shown)
    return charts


# Pictures


def addresses(folder: Path) -> Callable[[Any], str | None]:
    """A function from a thumbnail's name to its data address; None for what is missing, or would make the page too large."""
    seen: dict[str, str | None] = {}
    total = 0

    def address(name: Any) -> str | None:
        nonlocal total
        name = str(name)
        if name not in seen:
            path = folder / "gallery" / name
            # nothing but our own thumbnails gets into the page
            inside = path.name == name and path.suffix == ".webp" and path.is_file()
            content = path.read_bytes() if inside else b""
            total += len(content)
            small = bool(content) and total <= MAX_GALLERY_BYTES
            seen[name] = f"data:image/webp;base64,{base64.b64encode(content).decode()}" if small else None
        return seen[name]

    return address


def _inline(folder: Path, sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gallery with its thumbnails as data addresses; a missing one is None and its name is shown instead."""
    address = addresses(folder)

    def picture(one: dict[str, Any]) -> dict[str, Any]:
        return one | {"src": address(one.get("file"))}

    return [
        section
        | {"title": task_name(section["task"])}
        | {"words": [word | {"pictures": [picture(one) for one in word["pictures"]]} for word in section["words"]]}
        | {name: [picture(one) for one in section[name]] for name in ("pictures", "hits", "misses")}
        for section in sections
    ]


# How it was made


def machine_rows(starts: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Machine, versions and git state of the last start, as pairs to list."""
    if not starts:
        return []
    last = starts[-1]
    machine, versions, git = last.get("machine") or {}, last.get("versions") or {}, last.get("git") or {}
    rows = [(name, machine.get(name)) for name in ("system", "processor", "cores", "device", "gpu", "processes", "threads")]
    rows += [("time", last.get("time")), ("seed", last.get("seed")), ("python", last.get("python"))]
    rows += sorted(versions.items())
    if git:
        changed = git.get("num_changed") or 0
        rows.append(
            ("git", f"{str(git.get('commit'))[:12]} on {git.get('branch')}" + (f", {changed} files changed" if changed else ""))
        )
    return [(name, str(value)) for name, value in rows if value is not None]


def _commands(starts: Sequence[dict[str, Any]], recipe: dict[str, Any], sections: Sequence[dict[str, Any]]) -> list[str]:
    """What to type to make the run and its measurements again."""
    found = []
    if recipe.get("recipe"):
        changes = [f"--set {shlex.quote(str(one))}" for one in recipe.get("set") or []]
        found.append(" ".join(["wordsight train", shlex.quote(str(recipe["recipe"])), "--run NEW_FOLDER", *changes]))
    elif starts and starts[0].get("command"):
        words = [str(word) for word in starts[0]["command"]]
        program = "wordsight" if Path(words[0]).name in ("wordsight", "main.py", "__main__.py") else f"python {words[0]}"
        found.append(" ".join([program, *map(shlex.quote, words[1:])]))
    found += [section["command"] for section in sections if section.get("command")]
    return list(dict.fromkeys(found))


def _model_name(recipe: dict[str, Any]) -> str:
    model = (recipe.get("resolved") or {}).get("model")
    return model if isinstance(model, str) else ""
