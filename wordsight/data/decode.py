"""Encoded bytes -> picture, refusing what would be too large before a pixel is decoded; JPEGs at a reduced scale where one likes.

Shape legend: H height, W width.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from wordsight.data.errors import BadSampleError
from wordsight.data.transform import open_rgb

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from wordsight.data.transform import Preprocess

MAX_PIXELS = 64_000_000  # larger than the largest common camera, smaller than the 100-megapixel bombs
# A picture is halved in its DCT as long as what is resized stays this many times as large as the result. So the mean absolute
# difference from decoding in full stays below 2 of 255 on every photograph measured (docs/LOG.md): the worst had 1.96 at 1.6,
# 1.63 at 1.7 and 1.23 at 1.8, while from 1.0 to 1.1 the mean was 1.7 and the worst 4.1.
REDUCED_MARGIN = 1.75
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # by content, whatever the name says; none starts a program


def decode(data: bytes | Image.Image, *, key: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file's bytes to an RGB picture, exactly as PIL does (transparency on white, EXIF rotation applied).

    Args:
        data: the encoded file, recognised by its content; a PIL image is only converted.
        key: the sample's name, for the error.
        max_pixels: the size, by the file's header, above which nothing is decoded.

    Returns:
        A PIL image of mode RGB.

    Raises:
        BadSampleError: empty, truncated, damaged, no picture, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a picture is bad or it is not; and our own limit of size is stricter than PIL's
            return open_rgb(_open(data, key, max_pixels) if isinstance(data, bytes) else data)
    except BadSampleError:
        raise
    except Exception as error:  # PIL's decoders raise nearly every built-in exception on damaged files
        raise BadSampleError(key, f"can't be decoded: {_words(error)}") from error


def decode_array(
    data: bytes | Image.Image, *, key: str = "image", min_side_px: int | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode for training: uint8 [H, W, 3], a JPEG scaled down while it is decoded where it is far larger than needed.

    A JPEG is halved in its DCT (once, twice or thrice) as long as its shorter side keeps `min_side_px`; without halving the
    pixels equal `decode`'s. Everything that is not a plain JPEG goes through `decode`.

    Args:
        data: the encoded file, or a PIL image.
        key: the sample's name, for the error.
        min_side_px: the fewest pixels that the shorter side must keep; None decodes at full size.
        max_pixels: the size, by the file's header, above which nothing is decoded.

    Returns:
        uint8 [H, W, 3].

    Raises:
        BadSampleError: as `decode`.
    """
    return decode_divided(data, lambda width, height: divisor(min(width, height), min_side_px), key=key, max_pixels=max_pixels)[0]


def divisor(side_px: int, min_side_px: float | None) -> int:
    """By what a side may be divided (1, 2, 4 or 8) and keep `min_side_px`; None: 1."""
    if not min_side_px or side_px < min_side_px:
        return 1
    return int(2 ** min(3, math.floor(math.log2(side_px / min_side_px))))


def decode_divided(
    data: bytes | Image.Image, divide: Callable[[int, int], int], *, key: str = "image", max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int], int]:
    """`decode_array` with its own rule of reduction.

    Args:
        data: the encoded file, or a PIL image.
        divide: (width, height) of a plain JPEG, by its header -> 1, 2, 4 or 8. It is not asked for other pictures.
        key, max_pixels: as for `decode`.

    Returns:
        uint8 [H, W, 3]; the picture's width and height in full; by what it was divided, sides rounded up.

    Raises:
        BadSampleError: as `decode`.
    """
    import numpy as np

    if isinstance(data, bytes) and data[:3] == b"\xff\xd8\xff" and b"Exif\x00\x00" not in data[:65536]:
        found = _decode_plain_jpeg(data, key, divide, max_pixels)
        if found is not None:
            return found
    array = np.array(decode(data, key=key, max_pixels=max_pixels))  # a copy: PIL's own is read-only
    return array, (array.shape[1], array.shape[0]), 1


def reduced_uint8(
    data: bytes | Image.Image, preprocess: Preprocess, *, key: str = "image", max_pixels: int = MAX_PIXELS
) -> Tensor:
    """What `preprocess.to_uint8` gives, faster and a little different: a JPEG far larger than needed is scaled down by its DCT.

    A JPEG is halved while it is decoded as long as its shorter side keeps `REDUCED_MARGIN` times the size that it is resized to,
    and resized by torch's uint8 kernels: the mean absolute difference from `to_uint8` is below 2 of 255 on real photographs.

    Args:
        data: the encoded file, or a PIL image.
        preprocess: the model's.
        key, max_pixels: as for `decode`.

    Returns:
        uint8 [3, H, W].

    Raises:
        BadSampleError: as `decode`.
    """
    import torch
    from torch.nn.functional import interpolate

    from wordsight.data.transform import MAX_ASPECT, shortest_side

    size_px = preprocess.image_size_px
    squash = preprocess.resize == "squash"
    side_px = (preprocess.resize_px or size_px) if squash else size_px

    def divide(width: int, height: int) -> int:
        return divisor(min(width, height), REDUCED_MARGIN * side_px)

    array_HWC, (width, height), factor = decode_divided(data, divide, key=key, max_pixels=max_pixels)
    if max(height, width) > MAX_ASPECT * min(height, width):
        return preprocess.to_uint8(decode(data, key=key, max_pixels=max_pixels))
    new_width, new_height = (side_px, side_px) if squash else shortest_side(width, height, size_px)
    # the last row and column of a reduced picture may be a part of one: the scale is that of the whole picture; a little more, so
    # that rounding down gives the size
    scales = [(new + 1e-6) * factor / full for new, full in ((new_height, height), (new_width, width))]
    pixels_13HW = torch.from_numpy(array_HWC).permute(2, 0, 1)[None]
    pixels_3HW = interpolate(pixels_13HW, scale_factor=scales, mode=preprocess.interpolation, antialias=True)[0]
    left, top = round((new_width - size_px) / 2), round((new_height - size_px) / 2)
    return pixels_3HW[:, top : top + size_px, left : left + size_px].contiguous()


def _decode_plain_jpeg(
    data: bytes, key: str, divide: Callable[[int, int], int], max_pixels: int
) -> tuple[np.ndarray, tuple[int, int], int] | None:
    """The fast path; None where PIL has to judge (CMYK, a warning from the decoder, damage)."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace in ("CMYK", "YCCK"):
        return None
    _check_size(width, height, key, max_pixels)
    factor = divide(width, height)
    try:
        array: np.ndarray = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=-(-height // factor) if factor > 1 else 0,
            min_width=-(-width // factor) if factor > 1 else 0,
        )
    except ValueError:
        return None
    return array, (width, height), factor


def _open(data: bytes, key: str, max_pixels: int) -> Image.Image:
    from PIL import Image

    if not data:
        raise BadSampleError(key, "is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadSampleError(key, f"is no picture (its first bytes: {data[:12]!r})") from None
    except Image.DecompressionBombError as error:
        raise BadSampleError(key, f"is too large: {error}") from None
    _check_size(image.width, image.height, key, max_pixels)
    return image


def _check_size(width: int, height: int, key: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSampleError(key, f"is too large: {width} x {height} px, {max_pixels:,} pixels are allowed")


def _words(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if len(text) < 200 else text[:200] + "..."
