"""Effective robustness: accuracy under a shift beyond what accuracy without it tells (Taori et al., arXiv 2007.00644, section 2).

    rho = acc_shift - beta(acc_in)        logit beta(x) = slope * logit x + intercept

The line is fitted by least squares to the pairs of other models (published: ImageNet models without robustness interventions).
Its 95% interval is of both doubts: which models make the baseline (drawn anew), and which pictures the model was measured on
(binomial draws of both accuracies).

Shape legend: M models of the baseline, R draws.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from wordsight.evaluate.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, _axes, _open, _rule, _tick
from wordsight.evaluate.metrics import BOOTSTRAP_SEED, RESAMPLES
from wordsight.evaluate.results import read_json
from wordsight.types import Metric

LEAST_MODELS = 3  # two always lie on a line
_TICKS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPoint:
    """A model's accuracies, each over 0 and below 1.

    Attributes:
        model: its name.
        shift: the shifted set, e.g. "imagenetv2".
        accuracy_in: without shift, on the classes of that set.
        accuracy_shift: under it.
    """

    model: str
    shift: str
    accuracy_in: float
    accuracy_shift: float

    def __post_init__(self) -> None:
        for name in ("accuracy_in", "accuracy_shift"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(
                    f"{name} of {self.model} on {self.shift} is a share over 0 and below 1 (no percent), got {value}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The line that accuracies of ordinary models follow.

    Attributes:
        slope, intercept: in logits.
        points: the M models that it was fitted to.
        explained: R^2 in logits, the share of variance that the line explains.
    """

    slope: float
    intercept: float
    points: tuple[ModelPoint, ...]
    explained: float

    def predict(self, accuracy_in: Any) -> Any:
        """The accuracy under shift that the line says, of numbers in [0, 1]."""
        return _share(self.slope * _logit(accuracy_in) + self.intercept)


def fit_baseline(points: Sequence[ModelPoint]) -> Baseline:
    """The line through models' accuracies, by least squares in logits.

    Raises:
        ValueError: fewer than three models, models of several shifts, or all with the same accuracy without shift.
    """
    if len(points) < LEAST_MODELS:
        raise ValueError(f"a baseline needs {LEAST_MODELS} models or more, got {len(points)}: add published ones to its table")
    if shifts := sorted({point.shift for point in points})[1:]:
        raise ValueError(
            f"a baseline is of one shift, got points of {', '.join(sorted({p.shift for p in points}))}: {shifts[0]} too"
        )
    x_M = _logit(np.array([point.accuracy_in for point in points]))
    y_M = _logit(np.array([point.accuracy_shift for point in points]))
    if np.ptp(x_M) < 1e-9:
        raise ValueError("all models of the baseline have the same accuracy without shift: no line can be told")
    slope, intercept = _line(x_M, y_M)
    rest = float(((y_M - slope * x_M - intercept) ** 2).sum())
    spread = float(((y_M - y_M.mean()) ** 2).sum())
    return Baseline(
        slope=float(slope),
        intercept=float(intercept),
        points=tuple(points),
        explained=1 - rest / spread if spread > 0 else 1.0,
    )


def effective_robustness(
    baseline: Baseline, *, accuracy_in: float, count_in: int, accuracy_shift: float, count_shift: int, seed: int = BOOTSTRAP_SEED
) -> Metric:
    """rho of a model, a difference of accuracies; 0 is what the baseline's models have on average.

    Args:
        baseline: of the same shift.
        accuracy_in, accuracy_shift: in [0, 1].
        count_in, count_shift: how many pictures each was measured on.
        seed: of the draws.
    """
    for name, share, count in (("accuracy_in", accuracy_in, count_in), ("accuracy_shift", accuracy_shift, count_shift)):
        if not 0 <= share <= 1 or count < 1:
            raise ValueError(f"{name} is a share of one picture or more, got {share} of {count}")
    value = accuracy_shift - float(baseline.predict(accuracy_in))
    draw = np.random.default_rng(seed)
    x_M = _logit(np.array([point.accuracy_in for point in baseline.points]))
    y_M = _logit(np.array([point.accuracy_shift for point in baseline.points]))
    chosen = draw.integers(0, len(x_M), (RESAMPLES, len(x_M)))
    told = np.ptp(x_M[chosen], axis=1) > 1e-9  # draws of one accuracy alone have no line
    slopes, intercepts = _line(x_M[chosen[told]], y_M[chosen[told]])
    # a half picture more of each kind, so that 0 and 1 of few pictures are not taken for sure
    ins, shifts = (
        draw.binomial(count, (share * count + 0.5) / (count + 1), told.sum()) / count
        for share, count in ((accuracy_in, count_in), (accuracy_shift, count_shift))
    )
    rho_R = shifts - _share(slopes * _logit(np.clip(ins, 0.25 / count_in, 1 - 0.25 / count_in)) + intercepts)
    low, high = np.percentile(rho_R, [2.5, 97.5])
    return Metric(value, count_shift, (min(float(low), value), max(float(high), value)), "fraction")


def _line(x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
    """Slope and intercept over the last axis."""
    across, up = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    slope = (across * up).sum(-1) / (across**2).sum(-1)
    return slope, y.mean(-1) - slope * x.mean(-1)


def _logit(share: Any) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(share) - np.log1p(-np.asarray(share, np.float64))


def _share(logit: Any) -> Any:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-np.asarray(logit)))


# ----------------------------------------------------------------------------------------------------------------- tables


def read_points(path: str | Path) -> list[ModelPoint]:
    """A baseline's table: columns `model, shift, accuracy_in, accuracy_shift` of a .csv, or a .json list of such objects.

    Raises:
        ValueError: another ending, other columns, or accuracies that are no shares over 0 and below 1.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows: Any = list(csv.DictReader(file))
    elif path.suffix.lower() == ".json":
        rows = read_json(path, None)
    else:
        raise ValueError(f"a baseline's table is .csv or .json, got {path}")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} has no rows: write one a model and shift, with model, shift, accuracy_in, accuracy_shift")
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(
                ModelPoint(
                    model=str(row["model"]),
                    shift=str(row["shift"]),
                    accuracy_in=float(row["accuracy_in"]),
                    accuracy_shift=float(row["accuracy_shift"]),
                )
            )
        except KeyError as error:
            raise ValueError(f"{path}, row {number} lacks {error}: it needs model, shift, accuracy_in, accuracy_shift") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return found


# ------------------------------------------------------------------------------------------------------------------- plot


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A model to show over the baseline.

    Attributes:
        name: of the model.
        accuracy_in, accuracy_shift: with their intervals.
    """

    name: str
    accuracy_in: Metric
    accuracy_shift: Metric


def robustness_chart(baseline: Baseline | None, models: Sequence[Measured], *, shift: str, label: str) -> str:
    """The paper's plot: accuracy under shift over accuracy without it, both in logits, with y = x and the baseline's line.

    Args:
        baseline: its models are drawn faint; None: only y = x.
        models: drawn strong, with intervals both ways; an accuracy of 0 or 1 lies on the chart's edge.
        shift: the name of the set.
        label: what the chart shows, for readers who hear it.

    Returns:
        An `<svg>` element, or "" where there is nothing to draw.
    """
    points = baseline.points if baseline is not None else ()
    shares = [value for point in points for value in (point.accuracy_in, point.accuracy_shift)]
    shares += [value for one in models for metric in (one.accuracy_in, one.accuracy_shift) for value in metric.ci95]
    inside = [share for share in shares if 0.0005 < share < 0.9995]
    if not inside:
        return ""
    low, high = float(_logit(min(inside))) - 0.25, float(_logit(max(inside))) + 0.25

    def place(share: float) -> float:
        return min(1.0, max(0.0, (float(_logit(share)) - low) / (high - low))) if 0 < share < 1 else float(share >= 1)

    def x_at(share: float) -> float:
        return LEFT + place(share) * (WIDTH - LEFT - RIGHT)

    def y_at(share: float) -> float:
        return HEIGHT - BOTTOM - place(share) * (HEIGHT - TOP - BOTTOM)

    parts = [_open(label)]
    for share in _TICKS:
        if low < _logit(share) < high:
            parts += [
                *_rule(y_at(share), f"{share:.1%}".replace(".0%", "%")),
                _tick(x_at(share), f"{share:.1%}".replace(".0%", "%")),
            ]
    parts += _axes("accuracy without shift", f"accuracy on {shift}")
    ends = [float(_share(low)), float(_share(high))]
    parts.append(_polyline("faint s0", [(x_at(share), y_at(share)) for share in ends], "y = x"))
    if baseline is not None:
        steps = _share(np.linspace(low, high, 41))
        seen = [(x_at(x), y_at(float(baseline.predict(x)))) for x in steps if low <= _logit(baseline.predict(x)) <= high]
        told = f"baseline of {len(points)} models: slope {baseline.slope:.3g}, R2 {baseline.explained:.2f}"
        parts.append(_polyline("s0", seen, told))
        for point in points:
            parts.append(_dot("s0", x_at(point.accuracy_in), y_at(point.accuracy_shift), 2.5, point.model))
    for i, one in enumerate(models):
        style, x, y = f"s{1 + i % 5}", x_at(one.accuracy_in.value), y_at(one.accuracy_shift.value)
        (left, right), (down, up) = one.accuracy_in.ci95, one.accuracy_shift.ci95
        parts.append(f'<line class="{style}" x1="{x_at(left):.1f}" x2="{x_at(right):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{y_at(up):.1f}" y2="{y_at(down):.1f}"/>')
        parts += [_dot(style, x, y, 4, one.name), f'<text class="tick" x="{x + 7:.1f}" y="{y - 5:.1f}">{escape(one.name)}</text>']
    return "".join([*parts, "</svg>"])


def _polyline(style: str, points: Sequence[tuple[float, float]], name: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points if math.isfinite(x + y))
    return f'<polyline class="{style}" points="{places}"><title>{escape(name)}</title></polyline>'


def _dot(style: str, x: float, y: float, radius: float, name: str) -> str:
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(name)}</title></circle>'
