"""Decoding at a reduced scale: within 2 of 255 of decoding in full, on real photographs and on pictures with their spectrum.

The photographs are those that the test dependencies carry (scikit-learn's two, matplotlib's one; 427 to 512 px at their shorter
side), so that models of up to 120 px see them reduced; docs/LOG.md has the figures of 89 photographs at 224 px.
"""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.make import encoded, picture
from tests.data.test_loader import Memory, make
from wordsight.data import BadSampleError, iterate
from wordsight.data.decode import REDUCED_MARGIN, decode, decode_divided, divisor, reduced_uint8
from wordsight.data.loader import make_pixels
from wordsight.data.order import sample_rng
from wordsight.data.transform import Preprocess, TrainTransform
from wordsight.types import Sample

TOLERANCE = 2.0  # of 255, mean absolute difference


def photographs() -> dict[str, Image.Image]:
    found = [find_spec(name) for name in ("sklearn", "matplotlib")]  # not imported, which takes seconds
    sklearn, matplotlib = (Path(spec.origin).parent for spec in found if spec is not None and spec.origin is not None)
    paths = [sklearn / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    paths.append(matplotlib / "mpl-data" / "sample_data" / "grace_hopper.jpg")
    return {path.stem: Image.open(path).convert("RGB") for path in paths}


def like_a_photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Noise whose amplitude falls with frequency as 1/f, and with less colour than light, as in photographs."""
    width, height = size
    rng = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequencies[0, 0] = 1.0
    noise = rng.normal(size=(3, height, width // 2 + 1)) + 1j * rng.normal(size=(3, height, width // 2 + 1))
    values = np.fft.irfft2(noise / frequencies, s=(height, width))
    light, red, blue = (value / value.std() for value in values)
    values = 128 + 50 * light[None] + 12 * np.stack([red, -0.5 * (red + blue), blue])
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def difference(data: bytes, preprocess: Preprocess) -> float:
    return float((reduced_uint8(data, preprocess).int() - preprocess.to_uint8(decode(data)).int()).abs().float().mean())


@pytest.mark.parametrize("name", ["china", "flower", "grace_hopper"])
@pytest.mark.parametrize("quality", [75, 92])
def test_photographs_stay_within_the_tolerance(name: str, quality: int) -> None:
    image = photographs()[name]
    data = encoded(image, quality=quality)
    for size_px, resize, interpolation in itertools.product((32, 60, 112, 120), ("shortest", "squash"), ("bicubic", "bilinear")):
        assert divisor(min(image.size), REDUCED_MARGIN * size_px) > 1
        assert difference(data, Preprocess(size_px, resize=resize, interpolation=interpolation)) < TOLERANCE


@pytest.mark.parametrize(
    ("size", "factor"), [((1500, 1000), 2), ((900, 1200), 2), ((1023, 793), 2), ((1920, 1600), 4), ((640, 480), 1)]
)
def test_web_sizes_stay_within_the_tolerance(size: tuple[int, int], factor: int) -> None:
    data = encoded(like_a_photograph(1, size), quality=85)
    assert divisor(min(size), REDUCED_MARGIN * 224) == factor
    assert difference(data, Preprocess(224)) < (TOLERANCE if factor > 1 else 0.1)


@settings(max_examples=40, deadline=None)
@given(st.integers(30, 300), st.integers(30, 300), st.integers(4, 40), st.sampled_from(["shortest", "squash"]), st.integers(0, 3))
def test_odd_sizes_are_not_shifted(width: int, height: int, size_px: int, resize: str, seed: int) -> None:
    """A smooth picture whose sides don't divide: half a pixel's shift would be 3 levels and more."""
    ramp = np.add.outer(np.linspace(0, 127, height), np.linspace(0, 127, width))
    image = Image.fromarray(np.stack([ramp, 255 - ramp, ramp[::-1]], axis=-1).astype(np.uint8))
    reduced = reduced_uint8(encoded(image, quality=95, subsampling=0), Preprocess(size_px, resize=resize)).int()
    full = Preprocess(size_px, resize=resize).to_uint8(image).int()
    assert reduced.shape == full.shape == (3, size_px, size_px)
    assert (reduced - full).abs().float().mean() < 2.5


@pytest.mark.parametrize("size", [(300, 4), (4, 300), (1, 700)])
def test_strips_and_other_files_are_read_in_full(size: tuple[int, int]) -> None:
    preprocess = Preprocess(16)
    for data in (encoded(picture(1, size)), encoded(picture(1, size), "PNG")):
        assert difference(data, preprocess) <= 1
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(2, (320, 200)), exif=exif, quality=95)
    assert difference(turned, preprocess) <= 1
    with pytest.raises(BadSampleError, match="no picture"):
        reduced_uint8(b"nothing", preprocess)


def test_a_side_is_divided_as_far_as_it_may() -> None:
    for side, least, expected in (
        (100, None, 1),
        (100, 51, 1),
        (100, 50, 2),
        (100, 25.1, 2),
        (100, 25, 4),
        (1000, 1, 8),
        (10, 20, 1),
    ):
        assert divisor(side, least) == expected


def test_a_picture_is_divided_as_its_rule_says() -> None:
    data = encoded(picture(3, (101, 63)))
    for factor in (1, 2, 4, 8):
        array, full, found = decode_divided(data, lambda width, height, f=factor: f)
        assert (full, found) == ((101, 63), factor)
        assert array.shape == (-(-63 // factor), -(-101 // factor), 3)
    asked: list[Any] = []
    decode_divided(encoded(picture(3), "PNG"), lambda *size: asked.append(size) or 1)
    assert asked == []


# Where it is used


def test_evaluation_is_exact_unless_asked() -> None:
    source = Memory([Sample(f"s{i}", encoded(like_a_photograph(i, (700, 500)), quality=90), ("x",)) for i in range(3)])
    preprocess = Preprocess(64, mean=(0, 0, 0), std=(1, 1, 1))
    (exact,), (near,) = iterate(source, preprocess), iterate(source, preprocess, reduced_decode=True)
    for sample, pixels in zip(source.samples, exact.pixels, strict=True):
        assert torch.equal(pixels, preprocess(decode(sample.image)))
    apart = (near.pixels - exact.pixels).abs().mean().item() * 255
    assert 0 < apart < TOLERANCE
    with pytest.raises(ValueError, match="needs a Preprocess"):
        next(iterate(source, lambda image: torch.zeros(3, 2, 2), reduced_decode=True))
    options: dict[str, Any] = {"transform": Preprocess(64), "batch_size": 3, "shuffle": "none"}
    by_loader, reduced = (next(make(source, reduced_decode=value, **options).batches()).pixels for value in (None, True))
    assert torch.equal(by_loader, torch.stack([Preprocess(64).to_uint8(decode(sample.image)) for sample in source.samples]))
    assert 0 < (by_loader.int() - reduced.int()).abs().float().mean() < TOLERANCE
    cached = next(make(source, reduced_decode=True, cache_decoded=True, **options).batches()).pixels
    assert torch.equal(cached, reduced)


@pytest.mark.parametrize("name", ["china", "flower", "grace_hopper"])
def test_training_crops_stay_within_the_tolerance(name: str) -> None:
    """Against the crop that is drawn, cut out of the full picture and resized by PIL: at most a pixel beside it."""
    data = encoded(photographs()[name], quality=85)
    transform = TrainTransform(96, scale=(0.9, 1.0), flip=0.5)
    apart = []
    for position in range(6):
        sample = Sample("x", data)
        fast, full = (make_pixels(sample, transform, 3, position, reduced=reduced).int() for reduced in (None, False))
        assert (full - transform(decode(data), sample_rng(3, position)).int()).abs().float().mean() < 0.5
        apart.append(float((fast - full).abs().float().mean()))
    assert 0 < float(np.mean(apart)) < TOLERANCE * 1.5, "the crop's edges are whole pixels of the reduced picture"


def test_reduced_training_can_be_turned_off() -> None:
    source = Memory([Sample("s", encoded(like_a_photograph(5, (900, 700)), quality=90), ("x",))])
    options: dict[str, Any] = {"transform": TrainTransform(64), "batch_size": 1}
    by_default, on, off = (next(make(source, reduced_decode=value, **options).batches()).pixels for value in (None, True, False))
    assert torch.equal(by_default, on)
    assert not torch.equal(on, off)
