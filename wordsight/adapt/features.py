"""Features of pictures from a frozen image tower, computed once: of the fixed view, and of random views drawn beforehand.

How views are drawn is `wordsight.adapt.parts`, how features are kept in files `wordsight.evaluate.part_files`.

Shape legend: N pictures, n pictures of a part, V random views, D feature width, S image side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wordsight.adapt.parts import kept_views
from wordsight.evaluate.feature_cache import LAYERS, PART, Layer, encoder, feature_subject
from wordsight.evaluate.part_files import Subject

__all__ = ["LAYERS", "ImageFeatures", "Layer", "encoder", "image_features"]

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
        cache: a folder where features are kept by content: model, view and the pictures' bytes. What is there whole is not
            computed again, in whatever set and order; the evaluators (`wordsight.evaluate.embed_source`) share it. None keeps
            nothing.
        progress: show a bar.

    Returns:
        The features, on the CPU, in the pictures' order.

    Raises:
        OSError: a picture can't be read; the message names it.
        ValueError: an unknown layer, or a model without it.
    """
    encode = encoder(model, layer)
    folder = None if cache is None else Path(cache)
    subject = Subject(identity="", layer=layer) if folder is None else feature_subject(model, layer)
    plain, *drawn = kept_views(
        model,
        encode,
        pictures,
        subject=subject,
        pack=lambda features_nD: ((features_nD,), {}),
        num_views=num_views,
        seed=seed,
        batch_size=batch_size,
        part=PART,
        views_at_once=VIEWS_AT_ONCE,
        folder=folder,
        progress=progress,
    )
    return ImageFeatures(plain.gather(), torch.stack([own.gather() for own in drawn]) if drawn else None, layer)
