"""Pictures of the embedded data: read onto white, stored as WebP, and a fingerprint that finds those that look alike."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE_PX = 64


def load_on_white(path: Path) -> Image.Image:
    """Read a picture, put it on white, and fit it into a SIZE_PX square without changing its shape."""
    with Image.open(path) as file:
        rgba = file.convert("RGBA")
    # Resized with premultiplied alpha (Pillow's mode RGBa), so that hidden colours do not bleed into the edge.
    scale = SIZE_PX / max(rgba.size)
    if scale != 1:
        size = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
        rgba = rgba.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE_PX, SIZE_PX), "white")
    canvas.alpha_composite(rgba, ((SIZE_PX - rgba.width) // 2, (SIZE_PX - rgba.height) // 2))
    return canvas.convert("RGB")


class Picture(NamedTuple):
    """A picture as it is stored: its file, and the pixels that the file decodes to."""

    image: Image.Image
    extension: str
    data: bytes


def store(image: Image.Image) -> Picture:
    """Encode as the smaller of lossless WebP and WebP at quality 90, and decode again."""
    choices = []
    for options in ({"lossless": True, "method": 4, "quality": 70}, {"method": 6, "quality": 90}):
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", **options)
        choices.append(buffer.getvalue())
    data = min(choices, key=len)
    return Picture(Image.open(io.BytesIO(data)).convert("RGB"), "webp", data)


def _dct_matrix(size: int, rows: int) -> np.ndarray:
    k, n = np.arange(rows)[:, None], np.arange(size)[None]
    return np.cos(np.pi * (2 * n + 1) * k / (2 * size))


def perceptual_hash(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprint of a picture: 63 signs of its DCT, and its colours on a coarse grid.

    Returns:
        signs: bool [63], the low 8 x 8 DCT coefficients of the 32 px luma against their median (the classic pHash).
        colours: float [4, 4, 3] in 0..255, mean colour of each cell. The signs alone cannot tell a red disc from a
            blue one, nor two simple shapes whose small coefficients are noise.
    """
    luma = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    dct = _dct_matrix(32, 8)
    coefficients = (dct @ luma @ dct.T).ravel()[1:]
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX), dtype=np.float64)
    return coefficients > np.median(coefficients), colours


MAX_SIGNS, MAX_COLOUR = 8, 20.0


def perceptual_matches(queries: list, references: list) -> np.ndarray:
    """bool [Q, R]: at most MAX_SIGNS of the 63 signs differ, and no cell's colour by more than MAX_COLOUR of 255.

    `queries` and `references` are lists of `perceptual_hash` results.
    """
    if not queries or not references:
        return np.zeros((len(queries), len(references)), dtype=bool)
    q = np.stack([signs for signs, _ in queries]).astype(np.int32)
    r = np.stack([signs for signs, _ in references]).astype(np.int32)
    matches = q @ (1 - r).T + (1 - q) @ r.T <= MAX_SIGNS
    for i, j in np.argwhere(matches):
        matches[i, j] = np.abs(queries[i][1] - references[j][1]).max() <= MAX_COLOUR
    return matches
