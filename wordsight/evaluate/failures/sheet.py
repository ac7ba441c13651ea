"""Items on one sheet, for eyes: each picture with its text below."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from wordsight.evaluate.failures.items import FailureMode, Item

THUMB_PX = 132
GAP_PX = 10
LETTERS_PX = 12
LINE_PX = 15
GREY = (110, 114, 120)


def contact_sheet(
    modes: FailureMode | Sequence[FailureMode], path: str | os.PathLike[str], *, rows: int = 2, pictures_across: int = 8
) -> Path:
    """Draw the first items of modes, one band a mode, and write them as a PNG.

    Under each picture stands its right text; of a choice, that it is one of several.

    Args:
        modes: one or more.
        path: where the PNG goes; its folder must exist.
        rows: of pictures, of each mode; fewer where it has fewer items.
        pictures_across: pictures side by side; a group has two.

    Returns:
        `path`.

    Raises:
        ValueError: no mode, `rows` below 1, or `pictures_across` below 2.
    """
    modes = [modes] if isinstance(modes, FailureMode) else list(modes)
    if not modes or rows < 1 or pictures_across < 2:
        raise ValueError(
            f"a sheet needs a mode, a row and two pictures across, got {len(modes)} modes, rows={rows}, "
            f"pictures_across={pictures_across}"
        )
    width = pictures_across * (THUMB_PX + GAP_PX) + GAP_PX
    bands = [_band(mode.name.replace("_", " "), mode.items(), width, rows, pictures_across) for mode in modes]
    sheet = Image.new("RGB", (width, sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    # a palette is enough for drawings, and a third of the bytes
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
    return Path(path)


def _band(title: str, items: Sequence[Item], width: int, rows: int, across: int) -> Image.Image:
    """The title, and the items row by row."""
    in_row = across // len(items[0].pictures)
    drawn = [_row(items[start : start + in_row], width) for start in range(0, min(len(items), rows * in_row), in_row)]
    band = Image.new("RGB", (width, 30 + sum(row.height for row in drawn)), "white")
    ImageDraw.Draw(band).text((GAP_PX, 8), title, fill="black", font=ImageFont.load_default(16))
    top = 30
    for row in drawn:
        band.paste(row, (0, top))
        top += row.height
    return band


def _row(items: Sequence[Item], width: int) -> Image.Image:
    captions = [_captions(item) for item in items]
    height = THUMB_PX + 8 + max(len(lines) for item in captions for lines in item) * LINE_PX + GAP_PX
    row = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(row), ImageFont.load_default(LETTERS_PX)
    left = GAP_PX
    for item, item_captions in zip(items, captions, strict=True):
        for picture, lines in zip(item.pictures, item_captions, strict=True):
            row.paste(picture().convert("RGB").resize((THUMB_PX, THUMB_PX), Image.Resampling.LANCZOS), (left, 0))
            pen.rectangle((left, 0, left + THUMB_PX - 1, THUMB_PX - 1), outline=(215, 218, 222))
            for k, line in enumerate(lines):
                pen.text((left, THUMB_PX + 4 + k * LINE_PX), line, fill=GREY if line.startswith("(") else "black", font=font)
            left += THUMB_PX + GAP_PX
    return row


def _captions(item: Item) -> list[list[str]]:
    """Lines under each picture."""
    if item.is_group:
        return [_wrapped(text) for text in item.texts]
    if len(item.texts) == 1:
        return [_wrapped(item.texts[0] if k == item.right[0] else "(not this one)") for k in range(len(item.pictures))]
    return [[*_wrapped(item.texts[item.right[0]]), f"(one of {len(item.texts)} texts)"]]


def _wrapped(text: str) -> list[str]:
    """Lines that are no wider than a thumbnail; a longer word stands alone."""
    font, lines = ImageFont.load_default(LETTERS_PX), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getbbox(longer)[2] > THUMB_PX:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
