"""Pictures as pixels when a tower that learns asks for them: decoded once where memory allows, fixed view, random views or crops.

Shape legend: B pictures of a batch, K crops, S image side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wordsight.adapt.parts import CROP_SCALE, read_picture
from wordsight.data.decode import decode
from wordsight.data.errors import BadSampleError
from wordsight.data.transform import INTERPOLATIONS, TrainTransform, _cut_strip, shortest_side, to_tensor

FRESH_VIEWS = 1 << 31  # a view drawn among so many is as good as new each time
CROPS = (1, 5, 10)


@dataclass(frozen=True)
class _Decoded:
    """A picture: RGB, its bytes in memory, and the number that stands for its content."""

    image: Image.Image
    number: int


class PictureReader:
    """Pictures, decoded in threads; what is decoded stays in memory up to a limit, the rest is decoded each time.

    View v of a picture is a function of (seed, v, the picture's content), whatever else is read, as in `wordsight.adapt.parts`.

    Args:
        preprocessor: of the model.
        pictures: paths, PIL images or Samples.
        seed: of the random views.
        min_crop: the least share of the area that a random view keeps; half of the views are flipped.
        keep_mb: megabytes of decoded pictures that may stay in memory.
    """

    def __init__(
        self, preprocessor: Any, pictures: Sequence[Any], *, seed: int = 0, min_crop: float = CROP_SCALE[0], keep_mb: float = 0
    ) -> None:
        self._preprocessor, self._pictures, self._seed = preprocessor, pictures, seed
        self._draw = TrainTransform(
            preprocessor.image_size_px, (min_crop, CROP_SCALE[1]), flip=0.5, interpolation=preprocessor.interpolation
        )
        self._kept: dict[int, _Decoded | Tensor] = {}  # decoded, or the pixels of the fixed view
        self._left_bytes = keep_mb * 1e6
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "wordsight-decode")

    def __len__(self) -> int:
        return len(self._pictures)

    def __call__(self, rows_B: np.ndarray, views_B: np.ndarray | None) -> Tensor:
        """Pixels of a view of each picture (None: the fixed one): uint8 [B, 3, S, S].

        Raises:
            OSError: a picture can't be read; the message names it.
        """
        rows = rows_B.tolist()
        if views_B is None:
            pixels = list(self._pool.map(self._fixed, rows))
            self._keep(rows, pixels)
            return torch.stack(pixels)
        decoded = list(self._pool.map(self._decode, rows))
        self._keep(rows, decoded)
        return torch.stack(list(self._pool.map(self._random, decoded, views_B.tolist())))

    def crops(self, rows_B: np.ndarray, num_crops: int, expand_px: int) -> Tensor:
        """Crops of pictures that are resized to expand_px more than S: the middle, the four corners, and with 10 these mirrored.

        Returns:
            uint8 [B, K, 3, S, S].
        """
        rows = rows_B.tolist()
        decoded = list(self._pool.map(self._decode, rows))
        self._keep(rows, decoded)
        return torch.stack(list(self._pool.map(lambda one: self._crops(one, num_crops, expand_px), decoded)))

    def _fixed(self, row: int) -> Tensor:
        kept = self._kept.get(row)
        if isinstance(kept, Tensor):
            return kept
        pixels: Tensor = self._preprocessor.to_uint8(self._decode(row).image)
        return pixels

    def _random(self, decoded: _Decoded, view: int) -> Tensor:
        return self._draw(decoded.image, np.random.default_rng([self._seed, view, decoded.number]))

    def _crops(self, decoded: _Decoded, num_crops: int, expand_px: int) -> Tensor:
        own, image = self._preprocessor, _cut_strip(decoded.image)
        side = own.image_size_px
        if own.resize == "squash":
            size = ((own.resize_px or side) + expand_px,) * 2
        else:
            size = shortest_side(image.width, image.height, side + expand_px)
        wide = image.resize(size, INTERPOLATIONS[own.interpolation])
        right, bottom = (length - side for length in size)
        places = [(round(right / 2), round(bottom / 2)), (0, 0), (right, 0), (0, bottom), (right, bottom)]
        cut = [to_tensor(wide.crop((x, y, x + side, y + side))) for x, y in places]
        return torch.stack([*cut, *(crop.flip(2) for crop in cut)][:num_crops])

    def _decode(self, row: int) -> _Decoded:
        kept = self._kept.get(row)
        if isinstance(kept, _Decoded):
            return kept
        picture = read_picture(row, self._pictures[row])
        try:
            image = decode(picture.content, key=picture.name)
        except BadSampleError as error:
            raise OSError(f"{picture.name} {error.reason}") from error
        return _Decoded(image, int.from_bytes(picture.digest[:8], "little"))

    def _keep(self, rows: Sequence[int], values: Sequence[Any]) -> None:
        for row, value in zip(rows, values, strict=True):
            size = value.numel() if isinstance(value, Tensor) else 3 * value.image.width * value.image.height
            if row not in self._kept and size <= self._left_bytes:
                self._kept[row] = value
                self._left_bytes -= size


def batches_ahead(reader: PictureReader, batch_size: int, *, num_crops: int = 1, expand_px: int = 0) -> Iterator[Tensor]:
    """Pixels of all pictures in order, uint8 [B, K, 3, S, S]; the next batch is read while this one is used.

    One crop is the model's own preprocessing.
    """

    def read(start: int) -> Tensor:
        rows_B = np.arange(start, min(start + batch_size, len(reader)))
        return reader(rows_B, None)[:, None] if num_crops == 1 else reader.crops(rows_B, num_crops, expand_px)

    starts = range(0, len(reader), batch_size)
    with ThreadPoolExecutor(1, "wordsight-read") as pool:
        coming = [pool.submit(read, start) for start in starts[:1]]
        for place in range(len(starts)):
            pixels = coming.pop().result()
            coming += [pool.submit(read, start) for start in starts[place + 1 : place + 2]]
            yield pixels
