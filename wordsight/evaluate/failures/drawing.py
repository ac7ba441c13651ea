"""Scenes as plain data and their drawing: embedded pictures, shapes, lines, on white, at `SIZE_PX`.

A scene is a list of layers, the last one on top. Everything lies within the middle `SIZE_PX - 2 * MARGIN_PX` pixels, so that a
model that cuts the border off (ALIGN: 18 px) loses next to nothing. Shapes are drawn four times as large and averaged, by integer
arithmetic.

Shape legend: H, W pixels of an embedded picture (64 each).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

from wordsight.data import open_source

SIZE_PX = 224
MARGIN_PX = 16
OVERSAMPLED = 4
SOURCES = ("sample:test-twemoji-seen", "sample:test-twemoji-unseen")
WHITE_FROM = 248  # all three channels: background

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (60, 150, 60),
    "blue": (60, 110, 220),
    "purple": (140, 80, 190),
    "black": (45, 48, 52),
    "pink": (250, 150, 190),
}
SOLIDS = ("cube", "ball", "cone", "cylinder")
FLATS = ("circle", "square", "triangle", "star", "diamond", "hexagon")
PATTERNS = ("striped", "spotted")


class Layer(Protocol):
    """Something that can be put on a canvas."""

    def put(self, canvas: Image.Image) -> None: ...


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture as data: `scene()` draws it.

    Attributes:
        layers: from back to front.
    """

    layers: tuple[Layer, ...]

    def __call__(self) -> Image.Image:
        """An RGB image of `SIZE_PX` x `SIZE_PX`."""
        canvas = Image.new("RGB", (SIZE_PX, SIZE_PX), "white")
        for layer in self.layers:
            layer.put(canvas)
        return canvas


# ------------------------------------------------------------------------------------------------------ embedded pictures


@dataclass(frozen=True, slots=True)
class Thing:
    """An embedded picture, cut out of its white background.

    Attributes:
        name: its label in the sample data.
        x, y: its middle, in pixels.
        size: the longer side of what is drawn, in pixels.
    """

    name: str
    x: int
    y: int
    size: int

    def put(self, canvas: Image.Image) -> None:
        """Draw it."""
        cut = cut_out(self.name)
        width, height = fitted(self.name, self.size)
        small = cut.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(small, (self.x - width // 2, self.y - height // 2), small)


def fitted(name: str, size: int) -> tuple[int, int]:
    """Width and height in pixels of an embedded picture whose longer side is `size`."""
    width, height = cut_out(name).size
    longest = max(width, height)
    return max(1, (width * size + longest // 2) // longest), max(1, (height * size + longest // 2) // longest)


@lru_cache(maxsize=1)
def _pictures() -> dict[str, bytes]:
    """The encoded pictures of Twemoji, which no model of the house is trained on, by label."""
    found: dict[str, bytes] = {}
    for spec in SOURCES:
        source = open_source(spec)
        for sample in (source[i] for i in range(len(source))):
            if sample.label is not None and isinstance(sample.image, bytes):
                found.setdefault(sample.label, sample.image)
    return found


@lru_cache(maxsize=256)
def cut_out(name: str) -> Image.Image:
    """An embedded picture as RGBA: white that is connected to the border is transparent, and empty borders are cut.

    Raises:
        ValueError: no embedded picture has this label.
    """
    if name not in _pictures():
        raise ValueError(f"no embedded picture is called {name!r} ({', '.join(SOURCES)})")
    rgb_HWC = np.array(Image.open(io.BytesIO(_pictures()[name])).convert("RGB"))
    white_HW = (rgb_HWC >= WHITE_FROM).all(2)
    outside_HW = np.zeros_like(white_HW)
    outside_HW[0], outside_HW[-1], outside_HW[:, 0], outside_HW[:, -1] = True, True, True, True
    outside_HW &= white_HW
    while True:  # grow by one pixel up, down, left and right until nothing changes
        grown_HW = outside_HW.copy()
        grown_HW[1:] |= outside_HW[:-1]
        grown_HW[:-1] |= outside_HW[1:]
        grown_HW[:, 1:] |= outside_HW[:, :-1]
        grown_HW[:, :-1] |= outside_HW[:, 1:]
        grown_HW &= white_HW
        if (grown_HW == outside_HW).all():
            break
        outside_HW = grown_HW
    rows, columns = np.nonzero(~outside_HW.all(1))[0], np.nonzero(~outside_HW.all(0))[0]
    alpha_HW1 = np.where(outside_HW, 0, 255).astype(np.uint8)[:, :, None]
    rgba_HWC = np.concatenate([rgb_HWC, alpha_HW1], axis=2)
    return Image.fromarray(rgba_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy(), "RGBA")


# -------------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True, slots=True)
class Shape:
    """A coloured shape.

    Attributes:
        form: one of SOLIDS or FLATS.
        colour: one of COLOURS.
        x, y: its middle, in pixels.
        size: of its box, in pixels.
        pattern: None, or one of PATTERNS in white.
        hollow: the outline alone (flat forms).
    """

    form: str
    colour: str
    x: int
    y: int
    size: int
    pattern: str | None = None
    hollow: bool = False

    def put(self, canvas: Image.Image) -> None:
        """Draw it."""
        side = self.size * OVERSAMPLED
        ink = COLOURS[self.colour]
        if self.form in SOLIDS:
            face, mask = _SOLIDS[self.form](side, ink)
        else:
            mask = _filled(_outline(self.form, side), side)
            face = Image.new("RGB", (side, side), ink)
        if self.pattern is not None:
            _lay_pattern(face, self.pattern)
        if self.hollow:
            hole = side * 7 // 8  # scaled about the middle of the outline
            inner = _filled(_outline(self.form, side, hole), side)
            mask = Image.fromarray(np.where(np.array(inner) > 0, 0, np.array(mask)).astype(np.uint8))
        corner = (self.x - self.size // 2, self.y - self.size // 2)
        canvas.paste(face.reduce(OVERSAMPLED), corner, mask.reduce(OVERSAMPLED))


Points = Sequence[tuple[float, float]]


def _outline(form: str, side: int, size: int | None = None) -> Points:
    """Corners of a flat form of `size` about the middle of a box of `side`; a circle has 72 of them."""
    radius, middle = (size or side) / 2, side / 2
    if form == "square":
        radius *= 0.9
        return [(middle + dx * radius, middle + dy * radius) for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    corners = {"circle": 72, "triangle": 3, "star": 10, "diamond": 4, "hexagon": 6}[form]
    found = []
    for k in range(corners):
        angle = 2 * math.pi * k / corners - math.pi / 2
        reach = radius * (0.42 if form == "star" and k % 2 else 1.0)
        narrow = 0.72 if form == "diamond" else 1.0
        found.append((middle + narrow * reach * math.cos(angle), middle + reach * math.sin(angle)))
    return found


def _filled(points: Points, side: int) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).polygon([(round(x), round(y)) for x, y in points], fill=255)
    return mask


def _shade(ink: tuple[int, int, int], percent: int) -> tuple[int, int, int]:
    """The colour at a share of its brightness; over 100 it nears white."""
    if percent <= 100:
        return ink[0] * percent // 100, ink[1] * percent // 100, ink[2] * percent // 100
    share = percent - 100
    red, green, blue = (channel + (255 - channel) * share // 100 for channel in ink)
    return red, green, blue


_Made = tuple[Image.Image, Image.Image]


def _cube(side: int, ink: tuple[int, int, int]) -> _Made:
    """Three faces seen from a corner."""
    top, left, right = _corners(
        side, (50, 4, 92, 26, 50, 48, 8, 26), (8, 26, 50, 48, 50, 96, 8, 74), (92, 26, 50, 48, 50, 96, 92, 74)
    )
    return _faces(side, [(top, _shade(ink, 130)), (left, ink), (right, _shade(ink, 72))])


def _corners(side: int, *faces: tuple[int, ...]) -> list[Points]:
    """Corners in hundredths of the box -> in pixels."""
    return [[(face[k] * side / 100, face[k + 1] * side / 100) for k in range(0, len(face), 2)] for face in faces]


def _faces(side: int, faces: Sequence[tuple[Points, tuple[int, int, int]]]) -> _Made:
    face, mask = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side), 0)
    for points, ink in faces:
        whole = [(round(x), round(y)) for x, y in points]
        ImageDraw.Draw(face).polygon(whole, fill=ink)
        ImageDraw.Draw(mask).polygon(whole, fill=255)
    return face, mask


def _oval(side: int, x: int, y: int, width: int, height: int) -> Points:
    """An ellipse about (x, y), in hundredths of the box."""
    turn = [2 * math.pi * k / 72 for k in range(72)]
    return [(side * (x + width / 2 * math.cos(a)) / 100, side * (y + height / 2 * math.sin(a)) / 100) for a in turn]


def _ball(side: int, ink: tuple[int, int, int]) -> _Made:
    """A disc that brightens towards the upper left."""
    steps = 12
    discs = []
    for k in range(steps):
        size = 96 - 80 * k // steps
        shift = 18 * k // steps
        discs.append((_oval(side, 50 - shift, 50 - shift, size, size), _shade(ink, 72 + 60 * k // steps)))
    return _faces(side, discs)


def _cone(side: int, ink: tuple[int, int, int]) -> _Made:
    (body,), (lit,) = _corners(side, (50, 3, 90, 82, 10, 82)), _corners(side, (50, 3, 50, 94, 10, 82))
    return _faces(side, [(_oval(side, 50, 82, 80, 26), _shade(ink, 76)), (body, _shade(ink, 76)), (lit, _shade(ink, 110))])


def _cylinder(side: int, ink: tuple[int, int, int]) -> _Made:
    (body,), (lit,) = _corners(side, (16, 17, 84, 17, 84, 83, 16, 83)), _corners(side, (16, 17, 50, 17, 50, 94, 16, 83))
    base, top = _oval(side, 50, 83, 68, 26), _oval(side, 50, 17, 68, 26)
    return _faces(side, [(base, _shade(ink, 76)), (body, _shade(ink, 76)), (lit, _shade(ink, 104)), (top, _shade(ink, 135))])


_SOLIDS: dict[str, Callable[[int, tuple[int, int, int]], _Made]] = {
    "cube": _cube,
    "ball": _ball,
    "cone": _cone,
    "cylinder": _cylinder,
}


def _lay_pattern(face: Image.Image, pattern: str) -> None:
    """White stripes or spots over a whole face."""
    pen, step = ImageDraw.Draw(face), face.width // 6
    for k in range(0, 7):
        if pattern == "striped":
            pen.rectangle((k * step, 0, k * step + step // 2, face.height), fill="white")
        else:
            for row in range(0, 7):
                x, y = k * step + (row % 2) * step // 2, row * step
                pen.ellipse((x, y, x + step // 2, y + step // 2), fill="white")


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines and outlines in grey, over each other: frames, bubbles, a road.

    Attributes:
        ovals: (left, top, right, bottom) of white ellipses with an outline.
        boxes: the same of white rectangles.
        paths: corners of lines, (x, y) each.
    """

    ovals: tuple[tuple[int, int, int, int], ...] = ()
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    paths: tuple[tuple[tuple[int, int], ...], ...] = ()

    def put(self, canvas: Image.Image) -> None:
        """Draw them."""
        side = SIZE_PX * OVERSAMPLED
        face, mask = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side), 0)
        grey, width = (110, 114, 120), 2 * OVERSAMPLED
        for pen, fill, outline in ((ImageDraw.Draw(face), "white", grey), (ImageDraw.Draw(mask), 255, 255)):
            for box in self.ovals:
                pen.ellipse([edge * OVERSAMPLED for edge in box], fill=fill, outline=outline, width=width)
            for box in self.boxes:
                pen.rectangle([edge * OVERSAMPLED for edge in box], fill=fill, outline=outline, width=2 * width)
            for path in self.paths:
                pen.line([(x * OVERSAMPLED, y * OVERSAMPLED) for x, y in path], fill=outline, width=width)
        canvas.paste(face.reduce(OVERSAMPLED), (0, 0), mask.reduce(OVERSAMPLED))
