"""How each kind of common corruption changes a picture; `corruptions.py` says which there are, their settings and what differs.

Every function takes a uint8 picture [H, W, 3], the published settings of one severity, and a NumPy Generator.

Shape legend: H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

Kind = Callable[[np.ndarray, Any, Any], np.ndarray]


# shared


def _bytes(share: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] as uint8, cut off and not rounded, as the published programs do."""
    return (np.clip(share, 0, 1) * 255).astype(np.uint8)


def _smooth(image: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> np.ndarray:
    """A Gaussian over the first two axes."""
    from scipy.ndimage import gaussian_filter

    sigmas = (sigma, sigma, 0)[: image.ndim]
    return gaussian_filter(image, sigmas, mode=mode, truncate=truncate)


def _zoomed(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """The middle of a picture, enlarged to its size (bilinear)."""
    from scipy.ndimage import zoom

    height, width = image_HWC.shape[:2]
    part_height, part_width = int(np.ceil(height / factor)), int(np.ceil(width / factor))
    top, left = (height - part_height) // 2, (width - part_width) // 2
    part = image_HWC[top : top + part_height, left : left + part_width]
    large = zoom(part, (factor, factor, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]


def _moved(image: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """Motion blur along a line at `angle` degrees."""
    taps = 2 * int(np.ceil(radius)) + 1
    weights = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    height, width = image.shape[:2]
    down = -np.ceil(np.arange(taps) * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    right = -np.ceil(np.arange(taps) * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
    blurred = np.zeros(image.shape)
    for weight, dy, dx in zip(weights, down, right, strict=True):
        rows, columns = np.clip(np.arange(height) - dy, 0, height - 1), np.clip(np.arange(width) - dx, 0, width - 1)
        blurred += weight * image[rows[:, None], columns]
    return blurred


def _to_hsv(rgb: np.ndarray) -> np.ndarray:
    """Hue, saturation and value in [0, 1]."""
    value, low = rgb.max(-1), rgb.min(-1)
    span = value - low
    safe = np.where(span > 0, span, 1)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.select(  # where two channels are the largest, the later one says the hue
        [blue == value, green == value], [4 + (red - green) / safe, 2 + (blue - red) / safe], (green - blue) / safe
    )
    hue = np.where(span > 0, hue / 6 % 1, 0)
    return np.stack([hue, span / np.where(value > 0, value, 1), value], axis=-1)


def _from_hsv(hsv: np.ndarray) -> np.ndarray:
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    part = hue * 6 - np.floor(hue * 6)
    sector = np.floor(hue * 6).astype(int) % 6
    low, falling, rising = value * (1 - saturation), value * (1 - part * saturation), value * (1 - (1 - part) * saturation)
    red = np.choose(sector, [value, falling, low, low, rising, value])
    green = np.choose(sector, [rising, value, value, falling, low, low])
    blue = np.choose(sector, [low, low, rising, value, value, falling])
    return np.stack([red, green, blue], axis=-1)


# ------------------------------------------------------------------------------------------------------------------- kinds


def _gaussian_noise(picture: np.ndarray, sigma: float, draw: Any) -> np.ndarray:
    return _bytes(picture / 255 + draw.normal(size=picture.shape, scale=sigma))


def _shot_noise(picture: np.ndarray, photons: float, draw: Any) -> np.ndarray:
    return _bytes(draw.poisson(picture / 255 * photons) / photons)


def _impulse_noise(picture: np.ndarray, share: float, draw: Any) -> np.ndarray:
    hit, salt = draw.random(picture.shape) <= share, draw.random(picture.shape) <= 0.5
    return np.where(hit, np.where(salt, 255, 0), picture).astype(np.uint8)


def _speckle_noise(picture: np.ndarray, sigma: float, draw: Any) -> np.ndarray:
    share = picture / 255
    return _bytes(share + share * draw.normal(size=picture.shape, scale=sigma))


def _gaussian_blur(picture: np.ndarray, sigma: float, draw: Any) -> np.ndarray:
    return _bytes(_smooth(picture / 255, sigma))


def _glass_blur(picture: np.ndarray, settings: tuple[float, int, int], draw: Any) -> np.ndarray:
    """Pixels take a neighbour's place, between two smoothings.

    The published program goes backwards and means to swap two pixels, but copies one over the other; so a pixel takes what its
    neighbour is by then. Who that is follows from the chain of neighbours, which is walked for all pixels at once.
    """
    sigma, reach, passes = settings
    smoothed = (_smooth(picture / 255, sigma) * 255).astype(np.uint8)
    height, width = smoothed.shape[:2]
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    if len(rows) and len(columns):
        place = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
        own = place[:, 0] * width + place[:, 1]
        done = np.zeros((height, width), bool)
        done[rows[:, None], columns] = True
        for _ in range(passes):
            right, down = draw.integers(-reach, reach, size=(len(place), 2)).T
            other_row, other_column = place[:, 0] + down, place[:, 1] + right
            other = other_row * width + other_column
            before = done[other_row, other_column] & (other > own)  # it got its new colour before this one
            jump, source = np.arange(height * width), np.arange(height * width)
            jump[own], source[own] = np.where(before, other, own), np.where(before, own, other)
            while not np.array_equal(further := jump[jump], jump):
                jump = further
            smoothed = smoothed.reshape(-1, 3)[source[jump]].reshape(smoothed.shape)
    return _bytes(_smooth(smoothed / 255, sigma))


@lru_cache
def _disk(radius: float, sigma: float) -> np.ndarray:
    """A disk of sum 1, its edge then softened; one that reaches the border of its square gains a little there, as published."""
    from scipy.ndimage import correlate1d

    reach, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    steps = np.arange(-reach, reach + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(float)
    disk /= disk.sum()
    edge = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        disk = correlate1d(disk, edge / edge.sum(), axis=axis, mode="mirror")
    used = np.flatnonzero(disk.any(0))
    return disk[used[0] : used[-1] + 1, used[0] : used[-1] + 1]


def _defocus_blur(picture: np.ndarray, settings: tuple[float, float], draw: Any) -> np.ndarray:
    from scipy.signal import fftconvolve

    disk = _disk(*settings)
    reach = len(disk) // 2
    padded = np.pad(picture / 255, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    # rounded, or the transform's error would turn an exact 1 into 254
    return _bytes(np.round(fftconvolve(padded, disk[..., None], mode="valid", axes=(0, 1)), 9))


def _motion_blur(picture: np.ndarray, settings: tuple[float, float], draw: Any) -> np.ndarray:
    return _bytes(_moved(picture / 255, *settings, angle=draw.uniform(-45, 45)) + 1e-9)


def _zoom_blur(picture: np.ndarray, settings: tuple[float, float], draw: Any) -> np.ndarray:
    share = (picture / 255).astype(np.float32)
    factors = np.arange(1, *settings)
    return _bytes((share + sum(_zoomed(share, factor) for factor in factors)) / (len(factors) + 1))


def _snow(picture: np.ndarray, settings: tuple[float, ...], draw: Any) -> np.ndarray:
    mean, sigma, zoom, threshold, radius, motion, weight = settings
    share = picture / 255
    flakes = _zoomed(draw.normal(size=share.shape[:2], loc=mean, scale=sigma)[..., None], zoom)[..., 0]
    flakes[flakes < threshold] = 0
    moved = _moved(_bytes(flakes) / 255, radius, motion, draw.uniform(-135, -45))
    layer = (np.round(moved * 255) / 255)[..., None]
    grey = (share @ np.array([0.299, 0.587, 0.114]))[..., None]
    lit = weight * share + (1 - weight) * np.maximum(share, grey * 1.5 + 0.5)
    return _bytes(lit + layer + np.rot90(layer, 2))


def lay_frost(picture: np.ndarray, settings: tuple[float, ...], draw: Any, photographs: Sequence[np.ndarray]) -> np.ndarray:
    from scipy.ndimage import map_coordinates

    weight, of_frost, scale = settings
    height, width = picture.shape[:2]
    photograph = photographs[int(draw.integers(len(photographs)))]
    room = [round(size * scale) - side for size, side in zip(photograph.shape[:2], (height, width), strict=True)]
    if min(room) < 1:
        raise ValueError(
            f"a photograph of frost of {photograph.shape[1]} x {photograph.shape[0]} px is too small for {width} x {height}"
        )
    top, left = int(draw.integers(room[0])), int(draw.integers(room[1]))
    if scale == 1:
        frost = photograph[top : top + height, left : left + width].astype(float)
    else:  # bilinear, as OpenCV places pixels
        rows, columns = (np.arange(top, top + height) + 0.5) / scale - 0.5, (np.arange(left, left + width) + 0.5) / scale - 0.5
        grid = np.meshgrid(rows, columns, indexing="ij")
        frost = np.stack([map_coordinates(photograph[..., i].astype(float), grid, order=1, mode="nearest") for i in range(3)], -1)
    return np.clip(weight * picture + of_frost * frost, 0, 255).astype(np.uint8)


def _plasma(side: int, decay: float, draw: Any) -> np.ndarray:
    """A cloud of `side` x `side` px (a power of two) in [0, 1], by the diamond-square rule on a torus."""
    cloud, step, rough = np.zeros((side, side)), side, 100.0

    def mean(four: np.ndarray) -> np.ndarray:
        return four / 4 + rough * draw.uniform(-rough, rough, four.shape)

    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        across = corners + np.roll(corners, -1, axis=0)
        cloud[half::step, half::step] = mean(across + np.roll(across, -1, axis=1))
        middles, corners = cloud[half::step, half::step], cloud[::step, ::step]
        beside, above = middles + np.roll(middles, 1, axis=0), corners + np.roll(corners, -1, axis=1)
        cloud[::step, half::step] = mean(beside + above)
        beside, above = middles + np.roll(middles, 1, axis=1), corners + np.roll(corners, -1, axis=0)
        cloud[half::step, ::step] = mean(beside + above)
        step, rough = half, rough / decay
    cloud -= cloud.min()
    return cloud / (cloud.max() or 1)


def _fog(picture: np.ndarray, settings: tuple[float, float], draw: Any) -> np.ndarray:
    strength, decay = settings
    share = picture / 255
    height, width = share.shape[:2]
    side = max(2, 1 << (max(height, width) - 1).bit_length())
    lightest = share.max()
    fogged = share + strength * _plasma(side, decay, draw)[:height, :width, None]
    return _bytes(fogged * lightest / (lightest + strength))


def _brightness(picture: np.ndarray, added: float, draw: Any) -> np.ndarray:
    hsv = _to_hsv(picture / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
    return _bytes(_from_hsv(hsv))


def _saturate(picture: np.ndarray, settings: tuple[float, float], draw: Any) -> np.ndarray:
    factor, added = settings
    hsv = _to_hsv(picture / 255)
    hsv[..., 1] = np.clip(hsv[..., 1] * factor + added, 0, 1)
    return _bytes(_from_hsv(hsv))


def _contrast(picture: np.ndarray, factor: float, draw: Any) -> np.ndarray:
    share = picture / 255
    means = share.mean((0, 1), keepdims=True)
    return _bytes((share - means) * factor + means)


def _jpeg_compression(picture: np.ndarray, quality: int, draw: Any) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def _pixelate(picture: np.ndarray, scale: float, draw: Any) -> np.ndarray:
    height, width = picture.shape[:2]
    small = Image.fromarray(picture).resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BOX)
    return np.array(small.resize((width, height), Image.Resampling.BOX))


def _elastic_transform(picture: np.ndarray, settings: tuple[float, float, float], draw: Any) -> np.ndarray:
    """Three corners of the middle are moved, then each pixel a little."""
    from scipy.ndimage import map_coordinates

    strength, sigma, corners = settings
    height, width = picture.shape[:2]
    centre, reach = np.array([width // 2, height // 2]), max(1, min(height, width) // 3)
    before = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])  # x, y
    after = before + draw.uniform(-corners, corners, size=(3, 2))
    solid = np.column_stack([after, np.ones(3)])
    # where each pixel comes from; three corners that fell on a line would have no answer, and never do
    affine = np.linalg.solve(solid, before.astype(float)) if abs(np.linalg.det(solid)) > 1e-9 else np.eye(3, 2)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    from_x, from_y = np.moveaxis(np.stack([x, y, np.ones_like(x)], -1) @ affine, -1, 0)
    share = picture / 255
    turned = [map_coordinates(share[..., i], (from_y, from_x), order=1, mode="mirror") for i in range(3)]
    moves = [_smooth(draw.uniform(-1, 1, size=(height, width)), sigma, mode="reflect", truncate=3) * strength for _ in range(2)]
    places = (y + moves[1], x + moves[0])
    return _bytes(np.stack([map_coordinates(channel, places, order=1, mode="reflect") for channel in turned], -1))


def _edges(liquid: np.ndarray) -> np.ndarray:
    """Canny's edges of uint8 [H, W], thresholds 50 and 150 of |dx| + |dy|."""
    from scipy.ndimage import binary_propagation, sobel

    down, right = (sobel(liquid.astype(float), axis=axis, mode="nearest") for axis in (0, 1))
    size = np.abs(down) + np.abs(right)
    padded = np.pad(size, 1)

    def at(dy: int, dx: int) -> np.ndarray:
        return padded[1 + dy : 1 + dy + size.shape[0], 1 + dx : 1 + dx + size.shape[1]]

    steep, flat = np.abs(down) > np.abs(right) * np.tan(np.deg2rad(67.5)), np.abs(down) < np.abs(right) * np.tan(np.deg2rad(22.5))
    same_sign = (down < 0) == (right < 0)
    one = np.select([flat, steep, same_sign], [at(0, -1), at(-1, 0), at(-1, -1)], at(-1, 1))
    other = np.select([flat, steep, same_sign], [at(0, 1), at(1, 0), at(1, 1)], at(1, -1))
    ridge = (size > one) & np.where(flat | steep, size >= other, size > other)
    return binary_propagation(ridge & (size > 150), structure=np.ones((3, 3)), mask=ridge & (size > 50))


def _spread(values: np.ndarray) -> np.ndarray:
    """uint8 with its histogram made even, as OpenCV does it."""
    counts = np.bincount(values.ravel(), minlength=256)
    first = int(np.flatnonzero(counts)[0])
    rest = values.size - counts[first]
    if not rest:
        return values
    sums = np.cumsum(counts) - counts[: first + 1].sum()
    return np.clip(np.rint(sums * 255.0 / rest), 0, 255).astype(np.uint8)[values]


def _water(liquid: np.ndarray, strength: float) -> np.ndarray:
    """How much of the colour of water each pixel takes: drops with shaded rims, [H, W]."""
    from scipy.ndimage import correlate, distance_transform_edt, uniform_filter

    drops = (liquid * 255).astype(np.uint8)
    edges = _edges(drops)
    away = distance_transform_edt(~edges) if edges.any() else np.full(edges.shape, 20.0)
    away = _spread(np.floor(uniform_filter(np.minimum(away, 20), 3, mode="mirror") + 1e-6).astype(np.uint8))
    relief = correlate(away.astype(float), np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror")
    shade = np.rint(uniform_filter(np.clip(relief, 0, 255), 3, mode="mirror"))
    wet = drops * shade
    return wet / (wet.max() or 1) * strength


def _spatter(picture: np.ndarray, settings: tuple[float, ...], draw: Any) -> np.ndarray:
    mean, sigma, smoothing, threshold, strength, mud = settings
    share = picture / 255
    liquid = _smooth(draw.normal(size=share.shape[:2], loc=mean, scale=sigma), smoothing)
    liquid[liquid < threshold] = 0
    if not mud:
        water = np.array([175, 238, 238]) / 255
        return _bytes(share + np.clip(_water(liquid, strength)[..., None] * water, 0, 1))
    covered = _smooth((liquid > threshold).astype(float), strength)
    covered[covered < 0.8] = 0
    return _bytes(share * (1 - covered[..., None]) + covered[..., None] * np.array([63, 42, 20]) / 255)


KINDS: Mapping[str, Kind] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}
