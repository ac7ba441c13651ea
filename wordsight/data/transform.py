"""CLIP's preprocessing without torchvision (arXiv 2103.00020, section 2.5): any PIL image to RGB, resized, cropped, normalised.

Shape legend: B batch, H height, W width.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESIZE_MODES = ("shortest", "squash")
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

_ORIENTATION = 0x0112  # the EXIF tag
MAX_ASPECT = 50
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


def open_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as upright RGB: turned by its EXIF tag, transparency laid on white, 16 bits scaled to 8.

    Grey pictures of 16 bits are divided by 257; those of 32-bit integers too where a value is over 255 (PNG readers widen 16
    bits so); those of floats are multiplied by 255 where no value is over 1. The reference (open_clip) neither turns nor lays
    on white.

    Args:
        image: any PIL image; it is not changed.

    Returns:
        An RGB image, which may be `image` itself.

    Raises:
        OSError: the file behind it can't be decoded.
    """
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT_MODES or image.mode in ("I", "F"):
        image = _to_grey(image)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # PIL knows no other way out of premultiplied grey
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits as 8 bits."""
    values_HW = np.asarray(image, dtype=np.float64)
    highest = np.nanmax(values_HW, initial=0.0)
    if image.mode == "F":
        scale = 255.0 if highest <= 1.0 else 1.0
    else:
        scale = 1.0 if image.mode == "I" and highest <= 255 else 1.0 / 257
    scaled_HW = np.nan_to_num(values_HW * scale, nan=0.0)
    return Image.fromarray(np.clip(np.rint(scaled_HW), 0, 255).astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> uint8 [3, H, W]."""
    import torch

    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class Preprocess:
    """What a model does to a picture before it looks: RGB, resize, centre crop, normalise.

    Args:
        image_size_px: H = W of the output.
        resize: "shortest" makes the shorter side `image_size_px` and crops the middle (CLIP), "squash" resizes both sides.
        interpolation: "bicubic" or "bilinear", both with antialiasing.
        mean, std: of the three channels in [0, 1], subtracted and divided by.
        resize_px: with "squash", the side that both sides are resized to before the middle of `image_size_px` is cut out (ALIGN:
            346 and 289); None: image_size_px, and nothing is cut.

    Raises:
        ValueError: an option out of range.
    """

    image_size_px: int = 224
    resize: str = "shortest"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize_px: int | None = None

    def __post_init__(self) -> None:
        _check_size(self.image_size_px)
        _check_choice("resize", self.resize, RESIZE_MODES)
        if self.resize_px is not None and (self.resize != "squash" or self.resize_px < self.image_size_px):
            raise ValueError(
                f"resize_px goes with resize='squash' and is at least image_size_px={self.image_size_px}, got "
                f"{self.resize_px} with resize={self.resize!r}"
            )
        _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be three numbers (red, green, blue), got {getattr(self, name)}")
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ValueError(f"std must be over 0 in every channel, got {self.std}")

    def __call__(self, image: Image.Image) -> Tensor:
        """A PIL image of any size and mode -> float32 [3, H, W], normalised."""
        return self.normalize(self.to_uint8(image))

    def to_uint8(self, image: Image.Image) -> Tensor:
        """A PIL image of any size and mode -> uint8 [3, H, W], resized and cropped but not normalised."""
        rgb = open_rgb(image)
        size_px, filter_ = self.image_size_px, INTERPOLATIONS[self.interpolation]
        if self.resize == "squash":
            side = self.resize_px or size_px
            margin = round((side - size_px) / 2)
            squashed = rgb.resize((side, side), filter_)
            return to_tensor(squashed.crop((margin, margin, margin + size_px, margin + size_px)) if side > size_px else squashed)
        rgb = _cut_strip(rgb)
        new_width, new_height = shortest_side(rgb.width, rgb.height, size_px)
        if (new_width, new_height) != rgb.size:
            rgb = rgb.resize((new_width, new_height), filter_)
        left, top = round((new_width - size_px) / 2), round((new_height - size_px) / 2)  # ties to even, as the reference
        return to_tensor(rgb.crop((left, top, left + size_px, top + size_px)))

    def normalize(self, pixels: Tensor) -> Tensor:
        """(pixels - mean) / std, on the pixels' device.

        Args:
            pixels: [..., 3, H, W], uint8 in [0, 255] or float in [0, 1].

        Returns:
            float32 of the same shape.

        Raises:
            ValueError: integers other than uint8, whose range is not known.
        """
        import torch

        if not pixels.is_floating_point() and pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8 in [0, 255] or floats in [0, 1], got {pixels.dtype}")
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        if pixels.dtype == torch.uint8:  # in place: fresh memory for each operation takes longer than the operation
            return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
        return (pixels.to(torch.float32) - mean).div_(std)

    def to_config(self) -> dict[str, Any]:
        """Plain values for a checkpoint's JSON."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_config`.

        Raises:
            ValueError: an unknown key or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        for key in config:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"unknown preprocessing key {key!r} (known: {', '.join(known)}){hint}")
        return cls(**config)


@dataclass(frozen=True)
class TrainTransform:
    """CLIP's augmentation: a random crop of most of the picture, resized to a square, perhaps flipped.

    The crop is drawn as torchvision's RandomResizedCrop does: ten tries of an area and an aspect ratio (log-uniform), then the
    largest middle crop of an allowed ratio.

    Args:
        image_size_px: H = W of the output.
        scale: the least and the greatest share of the area that a crop keeps; CLIP's is (.9, 1).
        ratio: the least and the greatest width / height of a crop.
        flip: probability of a horizontal flip; CLIP has none, because texts speak of left and right.
        interpolation: "bicubic" or "bilinear", both with antialiasing.

    Raises:
        ValueError: an option out of range.
    """

    image_size_px: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check_size(self.image_size_px)
        _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares with 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be two ratios with 0 < low <= high, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability in [0, 1], got {self.flip}")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """A PIL image of any size and mode -> uint8 [3, H, W].

        Args:
            image: any PIL image.
            rng: where the crop and the flip are drawn from.
        """
        rgb = open_rgb(image)
        left, top, width, height = self.draw_crop(rgb.width, rgb.height, rng)
        if (width, height) != rgb.size:  # cropped first, as the reference: the resize must not look over the crop's edge
            rgb = rgb.crop((left, top, left + width, top + height))
        out = rgb.resize((self.image_size_px, self.image_size_px), INTERPOLATIONS[self.interpolation])
        if self.flip and rng.random() < self.flip:
            out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(out)

    def draw_crop(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """A crop of a picture of `width` x `height` px: left, top, width, height in pixels."""
        area = width * height
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            crop_area = area * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(log_low, log_high))
            crop_width, crop_height = round(math.sqrt(crop_area * aspect)), round(math.sqrt(crop_area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(rng.integers(height - crop_height + 1))
                left = int(rng.integers(width - crop_width + 1))
                return left, top, crop_width, crop_height
        crop_width, crop_height = width, height
        if width / height < self.ratio[0]:
            crop_height = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            crop_width = round(height * self.ratio[1])
        return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def shortest_side(width: int, height: int, size_px: int) -> tuple[int, int]:
    """The size of a picture whose shorter side becomes `size_px`; the longer one is cut to whole pixels, as torchvision does."""
    if width <= height:
        return size_px, int(size_px * height / width)
    return int(size_px * width / height), size_px


def _cut_strip(rgb: Image.Image) -> Image.Image:
    """The middle of a picture that is longer than 1 : 50: resized whole, 1 x 100,000 px would become 224 x 22,400,000."""
    width, height = rgb.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return rgb
    longest += (max(width, height) - longest) % 2  # the same parity, so that the middle stays the middle
    cut = (max(width, height) - longest) // 2
    return rgb.crop((cut, 0, cut + longest, height) if width > height else (0, cut, width, cut + longest))


def _check_size(image_size_px: int) -> None:
    if not isinstance(image_size_px, int) or image_size_px < 1:
        raise ValueError(f"image_size_px must be a whole number of pixels over 0, got {image_size_px!r}")


def _check_choice(name: str, value: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
