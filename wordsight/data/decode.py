"""Encoded bytes -> picture, refusing what would be too large before a pixel is decoded; JPEGs at a reduced scale where one likes.

Shape legend: H height, W width.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import TYPE_CHECKING

from wordsight.data.errors import BadSampleError
from wordsight.data.transform import open_rgb

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from wordsight.data.transform import Preprocess

MAX_PIXELS = 64_000_000  # larger than the largest common camera, smaller than the 100-megapixel bombs
REDUCED_MARGIN = 1.0  # of the size that the resize needs; below it the halved picture would have to be enlarged
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
    import numpy as np

    if isinstance(data, bytes) and data[:3] == b"\xff\xd8\xff" and b"Exif\x00\x00" not in data[:65536]:
        array = _decode_plain_jpeg(data, key, min_side_px, max_pixels)
        if array is not None:
            return array
    return np.array(decode(data, key=key, max_pixels=max_pixels))  # a copy: PIL's own is read-only


def reduced_uint8(
    data: bytes | Image.Image, preprocess: Preprocess, *, key: str = "image", max_pixels: int = MAX_PIXELS
) -> Tensor:
    """What `preprocess.to_uint8` gives, faster and a little different: a JPEG far larger than needed is scaled down by its DCT.

    A JPEG is halved while it is decoded as long as its shorter side keeps `REDUCED_MARGIN` times the model's size, and resized by
    torch's uint8 kernels. On real photographs the mean absolute difference from `to_uint8` is below 2 of 255 in each (docs/LOG.md
    has the figures).

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
    array_HWC = decode_array(data, key=key, min_side_px=math.ceil(REDUCED_MARGIN * size_px), max_pixels=max_pixels)
    height, width = array_HWC.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        return preprocess.to_uint8(decode(data, key=key, max_pixels=max_pixels))
    squash = preprocess.resize == "squash"
    new_width, new_height = (size_px, size_px) if squash else shortest_side(width, height, size_px)
    pixels_13HW = torch.from_numpy(array_HWC).permute(2, 0, 1)[None]
    pixels_3HW = interpolate(pixels_13HW, size=(new_height, new_width), mode=preprocess.interpolation, antialias=True)[0]
    left, top = round((new_width - size_px) / 2), round((new_height - size_px) / 2)
    return pixels_3HW[:, top : top + size_px, left : left + size_px].contiguous()


def _decode_plain_jpeg(data: bytes, key: str, min_side_px: int | None, max_pixels: int) -> np.ndarray | None:
    """The fast path; None where PIL has to judge (CMYK, a warning from the decoder, damage)."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace in ("CMYK", "YCCK"):
        return None
    _check_size(width, height, key, max_pixels)
    halvings = 0
    if min_side_px:
        halvings = min(3, max(0, int(math.log2(min(width, height) / min_side_px))))
    factor = 2**halvings
    try:
        array: np.ndarray = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=-(-height // factor) if halvings else 0,
            min_width=-(-width // factor) if halvings else 0,
        )
    except ValueError:
        return None
    return array


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
