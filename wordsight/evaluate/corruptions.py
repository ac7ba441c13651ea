"""Common corruptions of pictures (Hendrycks and Dietterich, arXiv 1903.12261): 15 kinds and 4 extra ones at five severities.

Kinds and severities are those of the published programs (github.com/hendrycks/robustness), which exist for pictures of 224 px
(ImageNet-C), 64 px (Tiny ImageNet-C) and 32 px (CIFAR-10-C). Other sizes take the set of the nearest one by ratio, lengths in
pixels as they are (`severity_size`). What differs from the published programs:

- *Motion blur and snow* used ImageMagick through wand. Here its formula is computed in float: a half Gaussian of 2 radius + 1
  taps along a line, offsets rounded to whole pixels, edges repeated; not its 8-bit rounding, nor its sense of direction.
- *Frost* lays five photographs over the picture. They are not part of this package: give their folder, or leave frost out.
- *Spatter* by water used OpenCV's chamfer distance; here it is the exact one, and edges are found without OpenCV's fixed point.
- *Elastic transform* and *frost at 32 and 64 px* interpolate exactly, OpenCV in steps of 1/32 px.
- Random numbers are NumPy's Generator, a function of (seed, picture, kind, severity) alone.
- The published data sets were stored as JPEG of quality 85 after corruption (CIFAR-10-C was not). Here nothing is stored.

Shape legend: H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wordsight.evaluate.corruption_kinds import KINDS, lay_frost

FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
COMMON = tuple(kind for family, kinds in FAMILIES.items() if family != "extra" for kind in kinds)  # the 15 of the published error
EXTRA = FAMILIES["extra"]
SEVERITIES = (1, 2, 3, 4, 5)
FROST_PICTURES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")  # a sixth is published and never drawn

# kind -> its published settings at severity 1 to 5, for each size in pixels
# fmt: off
_SETTINGS: dict[str, dict[int, tuple[Any, ...]]] = {
    "gaussian_noise": {224: (.08, .12, .18, .26, .38), 64: (.04, .08, .12, .15, .18), 32: (.04, .06, .08, .09, .10)},  # sigma
    "shot_noise": {224: (60, 25, 12, 5, 3), 64: (250, 100, 50, 30, 15), 32: (500, 250, 100, 75, 50)},  # photons of white
    "impulse_noise": {224: (.03, .06, .09, .17, .27), 64: (.01, .02, .05, .08, .14), 32: (.01, .02, .03, .05, .07)},  # share
    "speckle_noise": {224: (.15, .2, .35, .45, .6), 64: (.15, .2, .25, .3, .35), 32: (.06, .1, .12, .16, .2)},  # sigma
    "gaussian_blur": {224: (1, 2, 3, 4, 6), 64: (.5, .75, 1, 1.25, 1.5), 32: (.4, .6, .7, .8, 1)},  # sigma
    "glass_blur": {  # sigma, reach, passes
        224: ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        64: ((.1, 1, 1), (.5, 1, 1), (.6, 1, 2), (.7, 2, 1), (.9, 2, 2)),
        32: ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))},
    "defocus_blur": {  # radius, sigma of its edge
        224: ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
        64: ((.5, .6), (1, .1), (1.5, .1), (2.5, .01), (3, .1)),
        32: ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))},
    "motion_blur": {  # radius, sigma
        224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))},
    "zoom_blur": {  # end and step of the factors, which begin at 1
        224: ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),
        64: ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01)),
        32: ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01))},
    "fog": {  # strength, decay of the roughness
        224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        64: ((.4, 3), (.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        32: ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))},
    "frost": {  # weight of the picture, of the frost, scale of the photograph
        224: ((1, .4, 1), (.8, .6, 1), (.7, .7, 1), (.65, .7, 1), (.6, .75, 1)),
        64: ((1, .3, .3), (.9, .4, .3), (.8, .45, .3), (.75, .5, .3), (.7, .55, .3)),
        32: ((1, .2, .2), (1, .3, .2), (.9, .4, .2), (.85, .4, .2), (.75, .45, .2))},
    "snow": {  # mean and sigma of the flakes, their zoom, threshold, radius and sigma of the motion, weight of the picture
        224: ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
              (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)),
        64: ((.1, .2, 1, .6, 8, 3, .8), (.1, .2, 1, .5, 10, 4, .8), (.15, .3, 1.75, .55, 10, 4, .7),
             (.25, .3, 2.25, .6, 12, 6, .65), (.3, .3, 1.25, .65, 14, 12, .6)),
        32: ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
             (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8))},
    "spatter": {  # mean and sigma of the liquid, its smoothing, threshold, strength or smoothing of the mask, mud or water
        224: ((.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0), (.65, .3, 1, .65, 1.5, 1),
              (.67, .4, 1, .65, 1.5, 1)),
        64: ((.62, .1, .7, .7, .6, 0), (.65, .1, .8, .7, .6, 0), (.65, .3, 1, .69, .6, 0), (.65, .1, .7, .68, .6, 1),
             (.65, .1, .5, .67, .6, 1)),
        32: ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0), (.65, .1, .7, .69, .6, 1),
             (.65, .1, .5, .68, .6, 1))},
    "contrast": {224: (.4, .3, .2, .1, .05), 64: (.4, .3, .2, .1, .05), 32: (.75, .5, .4, .3, .15)},  # factor
    "brightness": {224: (.1, .2, .3, .4, .5), 64: (.1, .2, .3, .4, .5), 32: (.05, .1, .15, .2, .3)},  # added to HSV's value
    "saturate": {  # factor and addition of HSV's saturation
        224: ((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)),
        64: ((.3, 0), (.1, 0), (2, 0), (5, .1), (30, .2)),
        32: ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2))},
    "jpeg_compression": {224: (25, 18, 15, 10, 7), 64: (65, 58, 50, 40, 25), 32: (80, 65, 58, 50, 40)},  # quality
    "pixelate": {224: (.6, .5, .4, .3, .25), 64: (.9, .8, .7, .6, .5), 32: (.95, .9, .85, .75, .65)},  # scale
    "elastic_transform": {  # strength, smoothing and reach of the corners in px; 244 is the published program's own slip for 224
        224: ((244 * 2, 244 * .7, 244 * .1), (244 * 2, 244 * .08, 244 * .2), (244 * .05, 244 * .01, 244 * .02),
              (244 * .07, 244 * .01, 244 * .02), (244 * .12, 244 * .01, 244 * .02)),
        64: ((0, 0, 64 * .08), (64 * .05, 64 * .3, 64 * .06), (64 * .1, 64 * .08, 64 * .06), (64 * .1, 64 * .03, 64 * .03),
             (64 * .16, 64 * .03, 64 * .02)),
        32: ((0, 0, 32 * .08), (32 * .05, 32 * .2, 32 * .07), (32 * .08, 32 * .06, 32 * .06), (32 * .1, 32 * .04, 32 * .05),
             (32 * .1, 32 * .03, 32 * .03))},
}
# fmt: on


def severity_size(height: int, width: int) -> int:
    """Whose published settings a picture takes: those for 32, 64 or 224 px, the nearest to its shorter side by ratio."""
    side = min(height, width)
    return min((32, 64, 224), key=lambda size: max(size / side, side / size))


def corrupt(
    picture: np.ndarray, kind: str, severity: int, *, seed: int = 0, frost: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """A corrupted copy of a picture.

    Args:
        picture: uint8 [H, W, 3], or [H, W] in grey.
        kind: one of `COMMON` or `EXTRA`.
        severity: 1 to 5.
        seed: the random numbers are a function of it, the picture, the kind and the severity.
        frost: what `frost_pictures` gives; only for the kind "frost".

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: an unknown kind or severity, a picture that is not uint8 or is empty, frost without its photographs.
    """
    if kind not in _SETTINGS:
        raise ValueError(f"no corruption {kind!r}: use one of {', '.join((*COMMON, *EXTRA))}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is 1 to 5, got {severity!r}")
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)) or not picture.size:
        raise ValueError(f"a picture to corrupt is uint8 [H, W, 3] or [H, W], got {picture.dtype} {list(picture.shape)}")
    picture_HW3 = np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else np.ascontiguousarray(picture)
    settings = _SETTINGS[kind][severity_size(*picture_HW3.shape[:2])][severity - 1]
    name = f"{seed} {kind} {severity} {picture_HW3.shape}".encode()
    digest = hashlib.sha256(name + picture_HW3.tobytes()).digest()
    draw = np.random.default_rng(np.frombuffer(digest, np.uint32))
    if kind == "frost":
        if not frost:
            raise ValueError(
                "frost needs its photographs, which are not part of this package: see frost_pictures, or leave it out"
            )
        return lay_frost(picture_HW3, settings, draw, frost)
    return KINDS[kind](picture_HW3, settings, draw)


def frost_pictures(folder: str | Path) -> tuple[np.ndarray, ...]:
    """The photographs of frost, uint8 [H, W, 3] each, from `ImageNet-C/create_c` of github.com/hendrycks/robustness.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    if missing := [name for name in FROST_PICTURES if not (Path(folder) / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} has no {', no '.join(missing)}: frost needs {', '.join(FROST_PICTURES)} from ImageNet-C/create_c of "
            "github.com/hendrycks/robustness"
        )
    found = []
    for name in FROST_PICTURES:
        with Image.open(Path(folder) / name) as file:
            found.append(np.array(file.convert("RGB")))
    return tuple(found)
