"""Charts as small SVG texts that take their colours from the page, so that they suit light and dark; or from their own style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

from wordsight.evaluate.chart_marks import place_marks

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 36
POINTS_HEIGHT = 320  # of a chart of points, whose marks want room
KEY_CHARACTER, KEY_LINE = 5.2, 12  # of 9 px
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


# Points and classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A mark on a chart, with the interval of its height."""

    name: str
    mark: str
    x: float
    y: float
    low: float
    high: float
    strong: bool = False


def point_chart(points: Sequence[Point], *, x_name: str, y_name: str, label: str, key: Sequence[str] = ()) -> str:
    """Points with intervals over a logarithmic x axis, each with its mark where it covers no other one.

    Args:
        points: of finite heights; an x of 0 is drawn at the left end. A mark of several words is cut to the first where there is
            no room for all.
        x_name, y_name: what the axes count.
        label: what the chart shows, for readers who hear it.
        key: lines of text below the chart, in columns: what the marks stand for.

    Returns:
        An `<svg>` element, or "" where there is nothing to draw.
    """
    if not points:
        return ""
    x_at, y_at, marks_x, marks_y = _scales(points)
    columns = max(1, min(3, int((WIDTH - LEFT - RIGHT) / (KEY_CHARACTER * max(map(len, key), default=1) + 8))))
    num_lines = math.ceil(len(key) / columns)
    parts = [_open(label, POINTS_HEIGHT + (KEY_LINE * num_lines + 8 if key else 0))]
    for y in marks_y:
        parts += _rule(y_at(y), short(y))
    parts += [_tick(x_at(x), short(x), POINTS_HEIGHT) for x in marks_x]
    parts += _axes(x_name, y_name, POINTS_HEIGHT)
    places = [(x_at(point.x), y_at(point.y)) for point in points]
    marks = place_marks(places, [point.mark for point in points], LEFT, TOP, WIDTH - RIGHT, POINTS_HEIGHT - BOTTOM)
    for mark in marks:
        if mark.leader is not None:
            x1, y1, x2, y2 = mark.leader
            parts.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="var(--soft)" stroke-width="0.6"/>')
    ordered = sorted(zip(points, places, strict=True), key=lambda one: one[0].strong)  # strong ones over the others
    for point, (x, y) in ordered:
        style, faint = ("s2", "") if point.strong else ("s0", ' opacity="0.3"')
        ends = f'y1="{y_at(point.high):.1f}" y2="{y_at(point.low):.1f}"'
        parts.append(f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" {ends}{faint}/>')
        title = f"<title>{escape(point.name)}</title>"
        parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{4 if point.strong else 3}">{title}</circle>')
    for mark in marks:
        anchor = ' text-anchor="end"' if mark.leader is not None and mark.leader[0] < mark.leader[2] else ""
        x = mark.left + mark.width if anchor else mark.left
        parts.append(f'<text class="tick" x="{x:.1f}" y="{mark.middle + 4:.1f}"{anchor}>{escape(mark.text)}</text>')
    for i, line in enumerate(key):
        x = LEFT + i // num_lines * (WIDTH - LEFT - RIGHT) / columns
        y = POINTS_HEIGHT + 10 + KEY_LINE * (i % num_lines)
        parts.append(f'<text class="tick" style="font-size:9px" x="{x:.1f}" y="{y}">{escape(line)}</text>')
    return "".join([*parts, "</svg>"])


def _scales(points: Sequence[Point]) -> tuple[Callable[[float], float], Callable[[float], float], list[float], list[float]]:
    """Places of x and y, and where their axes are marked: x at 1, 2 and 5 of each power of ten, or at these alone."""
    positive = [point.x for point in points if point.x > 0] or [1.0]
    first, last = math.log10(min(positive)), math.log10(max(positive))
    first, last = (first, last) if last - first > 0.5 else ((first + last) / 2 - 0.25, (first + last) / 2 + 0.25)
    y_low, y_high = min(point.low for point in points), max(point.high for point in points)
    pad = (y_high - y_low) * 0.06 or 0.5
    y_low, y_high = y_low - pad, y_high + pad

    def x_at(x: float) -> float:
        place = 0.0 if x <= 0 else max(0.0, (math.log10(x) - first) / (last - first))
        return LEFT + 32 + place * (WIDTH - LEFT - RIGHT - 64)  # room for marks of two digits at both ends

    def y_at(y: float) -> float:
        return POINTS_HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (POINTS_HEIGHT - TOP - BOTTOM)

    steps = (1, 2, 5) if last - first < 3 else (1,)
    powers = range(math.floor(first), math.ceil(last) + 1)
    marked = [step * 10.0**power for power in powers for step in steps]
    return x_at, y_at, [x for x in marked if first <= math.log10(x) <= last], ticks(y_low, y_high, 5)


def count_chart(counts: Sequence[float], *, many_above: float, few_below: float, label: str) -> str:
    """Pictures of each class, the largest first, over a logarithmic axis; many, medium and few in colours of their own.

    Args:
        counts: of each class, in any order; a class of 0 has no bar.
        many_above, few_below: see `evaluate.long_tail.judge`.
        label: what the chart shows, for readers who hear it.

    Returns:
        An `<svg>` element, or "" where no class has a picture.
    """
    ordered = sorted(counts, reverse=True)
    if not ordered or ordered[0] <= 0:
        return ""
    top = math.log10(max(ordered[0], 10)) + 0.05
    bottom = math.log10(0.5)  # so that a class of one picture can be seen
    width = (WIDTH - LEFT - RIGHT) / len(ordered)

    def y_at(count: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(count) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [_open(label)]
    for power in range(math.floor(top) + 1):
        parts += _rule(y_at(10.0**power), short(10.0**power))
    parts += _axes(f"{len(ordered):,} classes, the largest first", "pictures")
    groups: dict[int, list[str]] = {}
    for i, count in enumerate(ordered):
        if count > 0:
            group = 0 if count > many_above else 2 if count < few_below else 1
            bar = f"M{LEFT + i * width:.2f} {HEIGHT - BOTTOM}V{y_at(max(count, 0.5)):.1f}h{width:.2f}V{HEIGHT - BOTTOM}Z"
            groups.setdefault(group, []).append(bar)
    for group, bars in groups.items():
        name = ("many", "medium", "few")[group]
        parts.append(f'<path d="{"".join(bars)}" fill="var(--c{group})"><title>{name}: {len(bars):,} classes</title></path>')
    return "".join([*parts, "</svg>"])


def _open(label: str, height: float = HEIGHT) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'


def _rule(y: float, text: str) -> list[str]:
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>',
    ]


def _tick(x: float, text: str, height: int = HEIGHT) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{height - 19}" text-anchor="middle">{escape(text)}</text>'


def _axes(x_name: str, y_name: str, height: int = HEIGHT) -> list[str]:
    return [
        f'<text class="tick axis" x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{escape(x_name)}</text>',
        f'<text class="tick axis" x="2" y="{TOP - 2}">{escape(y_name)}</text>',
    ]


def own_file(svg: str) -> str:
    """A chart as a file of its own: with the colours that a report's page would give it."""
    from importlib.resources import files

    style = (files("wordsight.evaluate") / "assets" / "report.css").read_text(encoding="utf-8")
    colours = [line.strip() for line in style.splitlines() if line.strip().startswith(("--", ".chart", ".s0", "circle.s0"))]
    light, dark = (" ".join(line for line in colours[start : start + 3]) for start in (0, 3))
    rules = " ".join(line for line in colours if not line.startswith("--"))
    whole = f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }} {rules}</style>"
    sheet = '<rect width="100%" height="100%" fill="var(--card)"/>'
    start, end = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{start} xmlns="http://www.w3.org/2000/svg">{whole}{sheet}{end}\n'
