"""Line charts as small SVG texts that take their colours from the page, so that they suit light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 36
MAX_POINTS = 400  # more are averaged, a pixel shows no more


@dataclass(frozen=True, slots=True)
class Line:
    """A named curve; `faint` draws it thin in the background."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    faint: bool = False


def smooth(ys: Sequence[float], window: int) -> list[float]:
    """Centred moving average of up to `window` points, fewer at the ends."""
    totals = [0.0, *accumulate(ys)]
    half = max(0, window // 2)
    spans = [(max(0, i - half), min(len(ys), i + half + 1)) for i in range(len(ys))]
    return [(totals[b] - totals[a]) / (b - a) for a, b in spans]


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of consecutive points, at most MAX_POINTS."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    parts = list(pairwise(round(i * len(xs) / MAX_POINTS) for i in range(MAX_POINTS + 1)))
    return [sum(xs[a:b]) / (b - a) for a, b in parts], [sum(ys[a:b]) / (b - a) for a, b in parts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 2.5, 5, 10) if base * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 12k, 0.05, 5e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def line_chart(lines: Sequence[Line], *, x_name: str, label: str, from_zero: bool = False) -> str:
    """One chart of some curves over a shared x axis.

    Args:
        lines: curves of finite numbers; those without points are left out.
        x_name: what the x axis counts.
        label: what the chart shows, for readers who hear it.
        from_zero: begin the y axis at 0.

    Returns:
        An `<svg>` element, or "" where there is nothing to draw.
    """
    drawn = [line for line in lines if len(line.xs)]
    if not drawn:
        return ""
    x_low, x_high = min(min(line.xs) for line in drawn), max(max(line.xs) for line in drawn)
    y_low, y_high = min(min(line.ys) for line in drawn), max(max(line.ys) for line in drawn)
    if from_zero:
        y_low = min(0.0, y_low)
    if y_high <= y_low:
        y_low, y_high = y_low - abs(y_low) * 0.1 - 1e-12, y_high + abs(y_high) * 0.1 + 1e-12
    else:
        y_high += (y_high - y_low) * 0.05
    x_span = (x_high - x_low) or 1.0

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">']
    for y in ticks(y_low, y_high, 4):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y_at(y) + 3.5:.1f}" text-anchor="end">{escape(short(y))}</text>')
    for x in ticks(x_low, x_high, 5):
        parts.append(f'<text class="tick" x="{x_at(x):.1f}" y="{HEIGHT - 19}" text-anchor="middle">{escape(short(x))}</text>')
    parts.append(f'<text class="tick axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    colour = 0
    for line in drawn:
        xs, ys = _thin(line.xs, line.ys)
        points = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(xs, ys, strict=True))
        style = "faint s0" if line.faint else f"s{colour % 6}"
        parts.append(f'<polyline class="{style}" points="{points}"><title>{escape(line.name)}</title></polyline>')
        if len(line.xs) <= 30 and not line.faint:
            parts += [
                f'<circle class="{style}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2.5"/>' for x, y in zip(xs, ys, strict=True)
            ]
        colour += not line.faint
    parts.append("</svg>")
    return "".join(parts)
