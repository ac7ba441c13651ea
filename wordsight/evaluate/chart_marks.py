"""Where the marks of a chart's points stand, so that none covers another one or a point.

Points that are near each other from left to right have their marks in two columns, left and right of all of them, each as near to
its point's height as its neighbours let it, with a line to its point. A point alone has its mark beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER, LINE = 6.4, 11.5  # width and height of a mark's text at 11 px, a little more than it is
BESIDE, COLUMN = 8.0, 14.0  # from a point to its mark, and from the outermost point to a column
CROWD = 56.0  # points nearer than this from left to right share their columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A mark that has its place.

    Attributes:
        text: as it is given, or its first word where the whole finds no room.
        left, middle: of the text, in pixels.
        leader: from where to where a line leads to the point, (x, y, x, y); None where the mark stands beside it.
    """

    text: str
    left: float
    middle: float
    leader: tuple[float, float, float, float] | None

    @property
    def width(self) -> float:
        """Of the text, a little more than it is."""
        return CHARACTER * len(self.text)


def place_marks(
    points: Sequence[tuple[float, float]], texts: Sequence[str], left: float, top: float, right: float, bottom: float
) -> list[Mark]:
    """A mark for each point.

    Args:
        points: (x, y) in pixels.
        texts: one each. One of several words gives way to its first word where only that finds room.
        left, top, right, bottom: of the chart; marks stay inside, as long as each column has room for its lines.

    Returns:
        In the order of the points.
    """
    found: dict[int, Mark] = {}
    crowds = _crowds(points)
    for place, crowd in enumerate(crowds):
        xs = [points[i][0] for i in crowd]
        # what lies between this crowd and the next belongs to both, half and half
        start = left if place == 0 else (points[crowds[place - 1][-1]][0] + xs[0]) / 2
        end = right if place == len(crowds) - 1 else (xs[-1] + points[crowds[place + 1][0]][0]) / 2
        if len(crowd) == 1:
            (i,), (x, y) = crowd, points[crowd[0]]
            to_right = xs[0] + BESIDE + CHARACTER * len(texts[i]) <= end or end - x >= x - start
            text = _fitting(texts[i], (end - x if to_right else x - start) - BESIDE)
            at = x + BESIDE if to_right else x - BESIDE - CHARACTER * len(text)
            found[i] = Mark(text=text, left=at, middle=min(max(y, top + LINE / 2), bottom - LINE / 2), leader=None)
            continue
        rooms = xs[0] - COLUMN - start, end - xs[-1] - COLUMN
        sides = _sides(crowd, texts, rooms)
        for members, sign, edge, room in zip(sides, (-1, 1), (xs[0] - COLUMN, xs[-1] + COLUMN), rooms, strict=True):
            ordered = sorted(members, key=lambda i: (points[i][1], i))
            heights = spread([points[i][1] for i in ordered], LINE, top + LINE / 2, bottom - LINE / 2)
            for i, middle in zip(ordered, heights, strict=True):
                text = _fitting(texts[i], room)
                at = edge if sign > 0 else edge - CHARACTER * len(text)
                found[i] = Mark(text=text, left=at, middle=middle, leader=(edge - 2 * sign, middle, *points[i]))
    return [found[i] for i in range(len(points))]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, in order and within low and high where there is room, as near as can be (least squares).

    Args:
        wanted: in rising order.
    """
    blocks: list[list[float]] = []  # sum and number of z = y - i gap of those that touch: pool adjacent violators
    for i, y in enumerate(wanted):
        blocks.append([y - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    last = max(low, high - (len(wanted) - 1) * gap)
    levels = [min(max(total / count, low), last) for total, count in blocks for _ in range(int(count))]
    return [level + i * gap for i, level in enumerate(levels)]


def _crowds(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """The points from left to right, together while the next is near."""
    ordered = sorted(range(len(points)), key=lambda i: (points[i][0], points[i][1], i))
    crowds: list[list[int]] = []
    for i in ordered:
        if crowds and points[i][0] - points[crowds[-1][-1]][0] < CROWD:
            crowds[-1].append(i)
        else:
            crowds.append([i])
    return crowds


def _sides(crowd: Sequence[int], texts: Sequence[str], rooms: tuple[float, float]) -> tuple[list[int], list[int]]:
    """Half of the marks for either column, but those that only the other one has room for go there."""
    half = len(crowd) // 2
    sides: tuple[list[int], list[int]] = ([], [])
    for place, i in enumerate(crowd):
        side, width = int(place >= half), CHARACTER * len(texts[i])
        sides[1 - side if rooms[side] < width <= rooms[1 - side] else side].append(i)
    return sides


def _fitting(text: str, room: float) -> str:
    return text if CHARACTER * len(text) <= room else text.split(" ")[0]
