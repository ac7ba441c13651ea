"""Labelled pictures that a small frozen model can tell apart, for tests of whole runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "grey": (128, 128, 128),
    "yellow": (230, 220, 40),
}


def colour_folders(
    root: Path, counts: Mapping[str, int], colours: tuple[str, ...] = ("red", "green", "blue", "grey"), noise: int = 60
) -> Path:
    """Class folders `root/<split>/<colour>/<n>.png` with that many pictures a class; each is another picture."""
    for s, (split, count) in enumerate(counts.items()):
        for c, colour in enumerate(colours):
            (root / split / colour).mkdir(parents=True)
            for i in range(count):
                generator = np.random.default_rng([s, c, i])
                pixels = np.array(COLOURS[colour]) + generator.integers(-noise, noise + 1, (24, 20, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / colour / f"{i:02}.png")
    return root
