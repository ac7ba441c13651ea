"""Features of pictures from a frozen image tower, computed once: of the fixed view, and of random views drawn beforehand.

How views are drawn and features kept in files is `wordsight.adapt.parts`.

Shape legend: N pictures, n pictures of a part, V random views, D feature width, S image side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wordsight.adapt.parts import CROP_SCALE, DIGEST_BYTES, is_whole, kept_parts, say_damaged, write_part
from wordsight.evaluate.results import fingerprint

Layer = Literal["projected", "penultimate"]
LAYERS = ("projected", "penultimate")
PART = 256  # pictures of one file of the cache
VIEWS_AT_ONCE = 8  # views of a picture that are held as pixels


@dataclass(frozen=True)
class ImageFeatures:
    """Features of N pictures, as estimators take them in place of the pictures.

    Attributes:
        plain: float32 [N, D] of the model's own preprocessing, not normalised.
        views: float32 [V, N, D] of random views, or None.
        layer: "projected" (what the model's `encode_image` gives) or "penultimate" (what its projection reads).
    """

    plain: Tensor
    views: Tensor | None = None
    layer: Layer = "projected"

    def __len__(self) -> int:
        return len(self.plain)

    def take(self, rows: Sequence[int] | np.ndarray | Tensor) -> ImageFeatures:
        """The features of some of the pictures, in that order."""
        index = torch.as_tensor(np.asarray(rows), dtype=torch.int64)
        return ImageFeatures(self.plain[index], None if self.views is None else self.views[:, index], self.layer)


def image_features(
    model: Any,
    pictures: Sequence[Any],
    *,
    num_views: int = 0,
    seed: int = 0,
    layer: Layer = "projected",
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ImageFeatures:
    """Compute the features of pictures with a frozen model.

    Args:
        model: an Embedder with `preprocessor`.
        pictures: paths, PIL images or Samples; a Source is such a sequence.
        num_views: V; view v of a picture is a random crop of 8 to 100% of its area, flipped half of the time.
        seed: of the random views.
        layer: which features.
        batch_size: pictures that the model sees at once.
        cache: a folder where parts of 256 pictures are kept by their content: model, view and the pictures' bytes. What is there
            whole is not computed again; another model or another picture is another file. None keeps nothing.
        progress: show a bar.

    Returns:
        The features, on the CPU, in the pictures' order.

    Raises:
        OSError: a picture can't be read; the message names it.
        ValueError: an unknown layer, or a model without it.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    encode = encoder(model, layer)
    folder = None if cache is None else Path(cache)
    plain, *drawn = kept_parts(
        model,
        encode,
        pictures,
        num_views=num_views,
        seed=seed,
        batch_size=batch_size,
        part=PART,
        views_at_once=VIEWS_AT_ONCE,
        folder=folder,
        identity="" if folder is None else fingerprint(model, (), "", ["features", layer, CROP_SCALE]),
        load=_load,
        keep=_keep,
        progress=progress,
    )
    return ImageFeatures(torch.cat(plain), torch.stack([torch.cat(own) for own in drawn]) if drawn else None, layer)


def encoder(model: Any, layer: Layer) -> Callable[[Tensor], Tensor]:
    """Normalised pixels [B, 3, S, S] -> features [B, D] of that layer, not normalised."""
    if layer == "projected":
        return lambda pixels: model.encode_image(pixels, normalize=False)
    features: Callable[[Tensor], Tensor] | None = getattr(getattr(model, "image_tower", None), "features", None)
    if features is None:
        raise ValueError(f"{type(model).__name__}'s image tower has no penultimate features: use layer='projected'")
    return features


def _load(path: Path, num_rows: int) -> Tensor | None:
    """The features [n, D] in a file, None where it is absent or damaged (which is then made anew)."""
    if not is_whole(path):
        return None
    values = np.fromfile(path, np.float32, offset=DIGEST_BYTES)
    if len(values) == 0 or len(values) % num_rows:
        say_damaged(path, f"it does not hold {num_rows} rows")
        return None
    return torch.from_numpy(values).view(num_rows, -1)


def _keep(path: Path | None, features_nD: Tensor) -> Tensor:
    if path is not None:
        write_part(path, features_nD.contiguous().numpy().tobytes())
    return features_nD
