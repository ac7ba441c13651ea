"""Decoding: exactly PIL's pixels, a fast path that equals them, and refusal by header of what is too large."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.make import encoded, picture
from wordsight.data import BadSampleError
from wordsight.data.decode import decode, decode_array
from wordsight.data.transform import open_rgb


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_by_content(kind: str) -> None:
    data = encoded(picture(1, (67, 45)), kind)
    expected = np.asarray(open_rgb(Image.open(io.BytesIO(data))))
    assert np.array_equal(np.asarray(decode(data)), expected)
    assert np.array_equal(decode_array(data), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 40}, {"restart_marker_rows": 1}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_kind_equal_pil(options: dict, mode: str) -> None:
    image = picture(2, (131, 77)).convert(mode)
    data = encoded(image, **options)
    assert np.array_equal(decode_array(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(3, (48, 32)), exif=exif, quality=95)
    upright = np.asarray(decode(data))
    assert np.array_equal(decode_array(data, min_side_px=4), upright)
    turns = {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 1, 8: 1}[orientation]
    assert upright.shape == ((48, 32, 3) if turns else (32, 48, 3))


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 400), st.integers(16, 400), st.integers(1, 200))
def test_scaled_decoding_keeps_enough_pixels(width: int, height: int, min_side_px: int) -> None:
    data = encoded(picture(4, (width, height)), quality=95)
    array = decode_array(data, min_side_px=min_side_px)
    assert min(array.shape[:2]) >= min(min_side_px, width, height)
    factors = [f for f in (1, 2, 4, 8) if array.shape[:2] == (-(-height // f), -(-width // f))]
    assert factors, f"{array.shape[:2]} is no halving of {(height, width)}"
    factor = factors[0]
    if factor > 1 and min(array.shape[:2]) >= 8:  # over fewer places the mean says little
        reduced = np.asarray(picture(4, (width, height)).reduce(factor), dtype=int)
        assert np.abs(array[: reduced.shape[0], : reduced.shape[1]].astype(int) - reduced).mean() < 12
    if factor < 8:
        assert min(width, height) < 2 * factor * min_side_px, "could have been halved once more"


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\0" * 1_000_000)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    data = bytearray(encoded(picture()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [png_header(10_000, 10_000), png_header(2**31 - 1, 2**31 - 1), jpeg_of(10_000, 10_000), jpeg_of(65_000, 65_000)],
    ids=["png", "png-2G", "jpeg", "jpeg-4G"],
)
def test_a_bomb_is_refused_by_its_header(data: bytes) -> None:
    start = time.perf_counter()
    for function in (decode, decode_array):
        with pytest.raises(BadSampleError, match=r"too large|can't be decoded|no picture"):
            function(data)
    assert time.perf_counter() - start < 0.5


def test_the_limit_is_the_users() -> None:
    data = encoded(picture(0, (100, 100)))
    for function in (decode, decode_array):
        with pytest.raises(BadSampleError, match=r"100 x 100 px, 9,999 pixels are allowed"):
            function(data, max_pixels=9_999)
        function(data, max_pixels=10_000)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_a_bad_sample_or_a_picture(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
    content = bytearray(encoded(picture(5, (24, 20)), kind))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(content[: data.draw(st.integers(0, len(content)))])
    outcomes = []
    for function in (decode, decode_array):
        try:
            outcomes.append(np.asarray(function(damaged, key="name")))
        except BadSampleError as error:
            assert error.key == "name"  # noqa: PT017
            assert error.reason  # noqa: PT017
            outcomes.append(None)
    assert (outcomes[0] is None) == (outcomes[1] is None)
    if outcomes[0] is not None:
        assert np.array_equal(outcomes[0], outcomes[1])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"just words", "no picture"),
        (b"<html><body>404</body></html>", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no picture"),
        (encoded(picture(0, (200, 200)))[:-600], "truncated"),
        (encoded(picture(0, (200, 200)), "PNG")[:-600], "can't be decoded"),
    ],
)
def test_reasons_in_words(data: bytes, words: str) -> None:
    for function in (decode, decode_array):
        with pytest.raises(BadSampleError, match=words):
            function(data)
