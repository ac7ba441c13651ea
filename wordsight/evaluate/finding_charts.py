"""What findings look like: the few-shot curve over the zero-shot line, accuracies under shift over those without it.

They are drawn from what is kept of a measurement, so that every run folder's report and every comparison can show them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from wordsight.data.shifts import SHIFTS, shift_title
from wordsight.evaluate.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, _axes, _open, _rule, _tick, short, ticks
from wordsight.evaluate.effective_robustness import LEAST_MODELS, Baseline, Measured, ModelPoint, fit_baseline, robustness_chart
from wordsight.evaluate.kept import Kept
from wordsight.types import Metric

Chart = dict[str, str]  # title, svg


def finding_charts(kept: Kept) -> list[Chart]:
    """The charts of one measurement; most have none."""
    if kept.task == "few_shot_curve":
        title = f"Labelled pictures a class against zero-shot, {kept.data} {kept.split}"
        return [{"title": title, "svg": shot_chart(kept.metrics, label=title, crossing=next(iter(kept.notes), ""))}]
    return shift_charts([("this model", kept)])


def shift_charts(measured: Sequence[tuple[str, Kept]]) -> list[Chart]:
    """For each shifted set all models that were measured on it, with the baseline's models where a table was given.

    Args:
        measured: (model, any measurement); those of `NaturalShifts` are drawn.
    """
    found = []
    for name in SHIFTS:
        title = shift_title(name)
        models: dict[str, Measured] = {}
        baseline: Baseline | None = None
        for model, kept in measured:
            inside, shifted = kept.metrics.get(f"{name}_in_top1"), kept.metrics.get(f"{name}_top1")
            if kept.task == "natural_shifts" and inside is not None and shifted is not None:
                models[model] = Measured(name=model, accuracy_in=inside, accuracy_shift=shifted)
                baseline = baseline or _baseline(name, kept)
        svg = robustness_chart(
            baseline, list(models.values()), shift=title, label=f"Accuracy on {title} over accuracy without shift"
        )
        if svg:
            found.append({"title": f"{title} against ImageNet's pictures of its classes", "svg": svg})
    return found


def _baseline(name: str, kept: Kept) -> Baseline | None:
    """The line that the measurement was held against."""
    rows = next((row.get("baseline") for row in kept.table if row.get("set") == shift_title(name)), None) or []
    points = [ModelPoint(model=model, shift=name, accuracy_in=inside, accuracy_shift=shifted) for model, inside, shifted in rows]
    return fit_baseline(points) if len(points) >= LEAST_MODELS else None


def shot_chart(metrics: Mapping[str, Metric], *, label: str, crossing: str = "") -> str:
    """The curve with its intervals, the zero-shot line across and where they cross, as an `<svg>` in the style of `charts`.

    Args:
        metrics: of a `FewShotCurve`: `top1_<K>_shot`, and where there are `top1_zero_shot` and `shots_to_pass_zero_shot`.
        label: what the chart shows, for readers who hear it.
        crossing: what is said of the crossing.
    """
    points = {int(found[1]): one for name, one in metrics.items() if (found := re.fullmatch(r"top1_(\d+)_shot", name))}
    zero_shot, passed = metrics.get("top1_zero_shot"), metrics.get("shots_to_pass_zero_shot")
    heights = [bound for one in (*points.values(), *([zero_shot] if zero_shot else [])) for bound in one.ci95]
    pad = (max(heights) - min(heights)) * 0.06 or 0.05
    y_low, y_high = min(heights) - pad, max(heights) + pad
    first, last = math.log2(min(points)), math.log2(max(points))

    def x_at(shots: float) -> float:
        place = (math.log2(shots) - first) / (last - first) if last > first else 0.5
        return LEFT + 14 + place * (WIDTH - LEFT - RIGHT - 28)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [_open(label)]
    for y in ticks(y_low, y_high, 4):
        parts += _rule(y_at(y), short(y))
    parts += [_tick(x_at(k), str(k)) for k in points]
    parts += _axes("labelled pictures a class", "accuracy")
    if zero_shot is not None:
        y = y_at(zero_shot.value)
        told = f"<title>zero-shot: {zero_shot.value:.1%}</title>"
        parts.append(f'<polyline class="s1" points="{LEFT},{y:.1f} {WIDTH - RIGHT},{y:.1f}">{told}</polyline>')
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT - 2}" y="{y - 4:.1f}" text-anchor="end">zero-shot</text>')
    line = " ".join(f"{x_at(k):.1f},{y_at(point.value):.1f}" for k, point in points.items())
    parts.append(f'<polyline class="s0" points="{line}"><title>linear probe</title></polyline>')
    for k, point in points.items():
        x, (low, high) = x_at(k), point.ci95
        told = escape(f"{k} shots: {point.value:.1%} ({low:.1%} to {high:.1%})")
        parts.append(f'<line class="s0" x1="{x:.1f}" x2="{x:.1f}" y1="{y_at(high):.1f}" y2="{y_at(low):.1f}"/>')
        parts.append(f'<circle class="s0" cx="{x:.1f}" cy="{y_at(point.value):.1f}" r="3"><title>{told}</title></circle>')
    if zero_shot is not None and passed is not None:
        x, y = x_at(passed.value), y_at(zero_shot.value)
        parts.append(f'<circle class="s2" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(crossing)}</title></circle>')
    return "".join([*parts, "</svg>"])
