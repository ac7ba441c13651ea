"""From the cells of a grid to figures: means over seeds, costs, which method is kept on validation and by how much, tables.

Methods are compared by their mean accuracy over the classes of the validation split, averaged over the seeds that all of them
have done. The lead of the best over another one is sum_i w_i d_i over pictures i, with w_i = 1 / (C n_c) of the picture's class
and d_i the difference of the shares of seeds that name it rightly; its 95% interval is the normal one of N pictures drawn anew,
paired.

Shape legend: N pictures, C classes, S seeds.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wordsight.adapt.costs import CARBON_G_PER_KWH, Cost, carbon, total, with_carbon
from wordsight.adapt.judge import read_csv
from wordsight.adapt.protocol import mean_over_seeds
from wordsight.adapt.records import _of_test
from wordsight.evaluate.charts import Point, count_chart, own_file, point_chart
from wordsight.evaluate.metrics import Z95
from wordsight.evaluate.results import check_record, write_atomically

if TYPE_CHECKING:
    from wordsight.adapt.grid import GridFolder
    from wordsight.adapt.tail_data import TailData

COLUMNS = {  # of the table
    "top1": "all",
    "top1_many": "many",
    "top1_medium": "medium",
    "top1_few": "few",
    "mean_per_class": "mean per class",
    "macro_f1": "macro F1",
}
Cell = tuple[str, int]
Results = Mapping[Cell, Mapping[str, Any]]


def summarise(
    folder: GridFolder,
    settings: Mapping[str, Any],
    data: TailData,
    cells: Sequence[Cell],
    results: Results,
    failed: Mapping[Cell, str],
) -> dict[str, Any]:
    """summary.json: a row for each method, which one is kept and why, costs, what is not there."""
    rows = [_row(method, results) for method in dict.fromkeys(method for method, _ in results)]
    kept = keep(folder, data, results)
    for row in rows:
        row["kept"] = row["method"] == kept["method"]
    shared = folder.shared_cost() or {}
    own = [Cost(**found["own_cost"]) for found in results.values()]
    spent = [Cost(**{name: value for name, value in shared.items() if name != "count"})] if shared else []
    first = next(iter(results.values()))
    return {
        "data": data.name,
        "seeds": list(dict.fromkeys(seed for _, seed in cells)),
        "cells": len(cells),
        "done": len(results),
        "left": [list(cell) for cell in cells if cell not in results and cell not in failed],
        "failed": [{"method": method, "seed": seed, "why": why} for (method, seed), why in failed.items()],
        "kept": kept,
        "methods": rows,
        "groups": first["groups"],
        "pictures": len(data.train),
        "weighed": data.train.weights is not None,
        "counts": dict(zip(data.classes, data.counts, strict=True)),
        "costs": {
            "features": shared,
            "cells": with_carbon(total(own)),
            "total": with_carbon(total([*spent, *own])),
            "carbon_g_per_kwh": CARBON_G_PER_KWH,
        },
        "notes": [*data.notes, *dict.fromkeys(note for found in results.values() for note in found["notes"])],
    }


def _row(method: str, results: Results) -> dict[str, Any]:
    """A method over its seeds."""
    own = [found for (name, _), found in results.items() if name == method]
    costs = [Cost(**found["cost"]) for found in own]
    mean: dict[str, Any] = {
        "seconds": math.fsum(cost.seconds for cost in costs) / len(costs),
        "cpu_seconds": math.fsum(cost.cpu_seconds for cost in costs) / len(costs),
        "peak_memory_bytes": max(cost.peak_memory_bytes for cost in costs),
        "energy_joules": math.fsum(cost.energy_joules for cost in costs) / len(costs),
        "energy_source": total(costs).energy_source,
    }
    return {
        "method": method,
        "seeds": [found["seed"] for found in own],
        "metrics": {name: over_seeds([found["metrics"][name] for found in own]) for name in own[0]["metrics"]},
        "validation": over_seeds([found["validation"] | {"value": found["validation"]["mean_per_class"]} for found in own]),
        "chosen": [found["chosen"] for found in own],
        "cost": mean | {"carbon_g": carbon(mean["energy_joules"])},
    }


def over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A figure over seeds: the mean, and `over`: whose 95% interval it has.

    "seeds": Student's t over seeds, what other seeds would give. Of one seed, or where all seeds agree to the last digit because
    nothing is random, it is the figure's own over "pictures", what other test pictures would give.
    """
    values = [one["value"] for one in found]
    plain = {name: found[0].get(name) for name in ("value", "count", "ci95", "chance")}
    if len(set(values)) == 1:
        return {**plain, "over": "pictures"}
    mean, ci95 = mean_over_seeds(values)
    return {**plain, "value": mean, "ci95": list(ci95), "over": "seeds"}


# Which method is kept


def keep(folder: GridFolder, data: TailData, results: Results) -> dict[str, Any]:
    """The method of the best mean per class on validation, the first of equals; of its seeds the best one; the lead in words."""
    methods = list(dict.fromkeys(method for method, _ in results))
    seeds = [seed for seed in dict.fromkeys(seed for _, seed in results) if all((method, seed) in results for method in methods)]
    if not seeds:  # a cell failed in each seed: those that have done most are compared
        per_method = {method: {seed for name, seed in results if name == method} for method in methods}
        most = max(per_method.values(), key=len)
        methods = [method for method in methods if per_method[method] >= most]
        seeds = sorted(most)

    def value(method: str, seed: int) -> float:
        return float(results[method, seed]["validation"]["mean_per_class"])

    means = {method: math.fsum(value(method, seed) for seed in seeds) / len(seeds) for method in methods}
    ranked = sorted(methods, key=lambda method: -means[method])  # stable: the first of equals
    best = ranked[0]
    found: dict[str, Any] = {
        "method": best,
        "seed": max(seeds, key=lambda seed: value(best, seed)),
        "seeds": seeds,
        "validation": means[best],
        "count": len(data.val),
        "next": None,
        "lead": None,
        "ci95": None,
    }
    if len(ranked) > 1:
        lead, ci95 = paired_lead(data.targets("val"), *(_right(folder, method, seeds) for method in ranked[:2]))
        found |= {"next": ranked[1], "lead": lead, "ci95": list(ci95)}
    return {**found, "sentence": _sentence(found, data, set(results) - {(m, s) for m in methods for s in seeds})}


def _right(folder: GridFolder, method: str, seeds: Sequence[int]) -> np.ndarray:
    """The share of seeds that name each validation picture rightly: [N]."""
    rows = [read_csv(folder.cell_dir((method, seed)) / "predictions-val.csv") for seed in seeds]
    return np.mean([[row["label"] == row["predicted"] for row in one] for one in rows], axis=0)


def paired_lead(targets: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """How much better one is than the other in the mean over classes, and its 95% interval over pictures.

    Args:
        targets: [N] classes.
        ours, theirs: [N], the share of seeds that name each picture rightly.

    Returns:
        (sum_i w_i d_i, interval); one picture alone says nothing, its interval is -1 to 1.
    """
    _, places, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    parts_N = (ours - theirs) / (len(sizes) * sizes[places])
    lead = float(parts_N.sum())
    if len(parts_N) < 2:
        return lead, (-1.0, 1.0)
    half = Z95 * math.sqrt(len(parts_N)) * float(parts_N.std(ddof=1))
    return lead, (max(-1.0, lead - half), min(1.0, lead + half))


def _sentence(kept: Mapping[str, Any], data: TailData, others: set[Cell]) -> str:
    num_classes = len(set(data.val.labels))
    seeds = f"seed {kept['seeds'][0]}" if len(kept["seeds"]) == 1 else f"seeds {', '.join(map(str, kept['seeds']))}"
    text = (
        f"On {kept['count']:,} validation pictures of {num_classes:,} classes it would keep {kept['method']}: "
        f"{kept['validation']:.1%} in the mean over classes ({seeds})"
    )
    if kept["next"] is None:
        text += "; there is no other method to compare it with."
    elif kept["lead"] == 0 and kept["ci95"][0] == 0 == kept["ci95"][1]:
        text += f"; {kept['next']} gets the same pictures right."
    else:
        low, high = (f"{100 * bound:+.1f}" for bound in kept["ci95"])
        text += f", {100 * kept['lead']:.1f} points above the next, {kept['next']} (95% interval {low} to {high}, paired)"
        text += ": another draw of pictures may turn the order." if kept["ci95"][0] <= 0 else "."
    return text + (f" {len(others)} cells of seeds that not all methods have done are not in this." if others else "")


# Files


def write_figures(
    folder: GridFolder, settings: Mapping[str, Any], data: TailData, results: Results, summary: Mapping[str, Any]
) -> None:
    """results.json, table.csv and the two charts."""
    folder.write("results.json", [check_record(one) for one in records(settings, data, results, summary)])
    write_atomically(folder.path / "table.csv", table(summary))
    write_atomically(folder.path / "accuracy_cost.svg", own_file(accuracy_cost(summary, alone=True)))
    write_atomically(folder.path / "class_counts.svg", own_file(class_counts(settings, summary)))


def records(settings: Mapping[str, Any], data: TailData, results: Results, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures as records: of each cell with its intervals over pictures, then of each method over its seeds."""
    counts = [count for count in data.counts if count]
    shown = f"all {len(data.train):,} training pictures, {_count(min(counts))} to {_count(max(counts))} a class"
    shown += " by their weights" if data.train.weights is not None else ""
    found = []
    for (method, seed), result in results.items():
        test = {"name": "test", "data": data.name, "metrics": result["metrics"]}
        found += _of_test(settings, test, f"{method}, {shown}, seed {seed}")
    for row in summary["methods"]:
        if len(row["seeds"]) > 1:
            seeds = ", ".join(map(str, row["seeds"]))
            for over, words in (("seeds", "Student's t over seeds"), ("pictures", "over pictures, seeds agree")):
                metrics = {name: one for name, one in row["metrics"].items() if one["over"] == over}
                test = {"name": "test", "data": data.name, "metrics": metrics}
                found += _of_test(settings, test, f"{method_words(row)}, {shown}, mean of seeds {seeds}, interval {words}")
    return found


def _count(count: float) -> str:
    return f"{count:,}" if isinstance(count, int) else f"{count:,.4g}"


def method_words(row: Mapping[str, Any]) -> str:
    """A method's name with what it chose on validation."""
    chosen = [", ".join(f"{name} = {value:g}" for name, value in one.items()) for one in row["chosen"]]
    return row["method"] + (f" ({'; '.join(dict.fromkeys(chosen))})" if any(chosen) else "")


def table(summary: Mapping[str, Any]) -> str:
    """The table as CSV: a row for each method, figures as shares with their intervals, costs of one seed in the mean."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{name}{part}" for name in (*COLUMNS, "validation") for part in ("", "_low95", "_high95")]
    writer.writerow(["method", "kept", "seeds", *names, "seconds", "peak_memory_bytes", "energy_joules", "carbon_g"])
    for row in summary["methods"]:
        figures: list[str] = []
        for one in (*(row["metrics"].get(name) for name in COLUMNS), row["validation"]):
            figures += ["", "", ""] if one is None else [f"{value:.4f}" for value in (one["value"], *one["ci95"])]
        cost = row["cost"]
        costs = [f"{cost['seconds']:.3f}", cost["peak_memory_bytes"], f"{cost['energy_joules']:.1f}", f"{cost['carbon_g']:.4f}"]
        writer.writerow([row["method"], int(row["kept"]), " ".join(map(str, row["seeds"])), *figures, *costs])
    return text.getvalue()


def accuracy_cost(summary: Mapping[str, Any], *, alone: bool = False) -> str:
    """Mean per class on test over seconds of learning; a method's mark is its number in the table.

    Methods that none beats at the same or a smaller cost have their names too.

    Args:
        summary: summary.json.
        alone: whether what the numbers stand for is written below, because no table is beside.
    """
    best = cheapest(summary)
    points = [
        Point(
            name=row["method"],
            mark=f"{number} {row['method']}" if number - 1 in best else str(number),
            x=row["cost"]["seconds"],
            y=100 * row["metrics"]["mean_per_class"]["value"],
            low=100 * row["metrics"]["mean_per_class"]["ci95"][0],
            high=100 * row["metrics"]["mean_per_class"]["ci95"][1],
            strong=row["kept"],
        )
        for number, row in enumerate(summary["methods"], start=1)
    ]
    label = "Mean accuracy over the classes of the test split, by the seconds that learning took"
    key = [f"{number} {row['method']}" for number, row in enumerate(summary["methods"], start=1)] if alone else ()
    return point_chart(points, x_name="seconds to learn, one seed", y_name="%", label=label, key=key)


def cheapest(summary: Mapping[str, Any]) -> set[int]:
    """Places of the methods that are more accurate on test than all that cost as much (within a tenth) or less."""
    figures = [(row["cost"]["seconds"], row["metrics"]["mean_per_class"]["value"]) for row in summary["methods"]]
    return {
        place
        for place, (seconds, value) in enumerate(figures)
        if not any(
            other_value > value or (other_value == value and other < place)
            for other, (other_seconds, other_value) in enumerate(figures)
            if other_seconds <= 1.1 * seconds
        )
    }


def class_counts(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Training pictures of each class."""
    return count_chart(
        list(summary["counts"].values()),
        many_above=settings["many_above"],
        few_below=settings["few_below"],
        label=f"Training pictures of each class of {summary['data']}",
    )
