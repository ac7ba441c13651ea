"""Features of pictures by a frozen image tower, kept by content: which layer, what they depend on, and those of a data set.

The files are those of `part_files`; `wordsight.adapt` and the evaluators share them.

Shape legend: B pictures of a batch, D feature width, K vectors of one picture, S image side in pixels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from wordsight.evaluate.part_files import Shelf, Subject
from wordsight.evaluate.results import fingerprint
from wordsight.system import PairScorer

Layer = Literal["projected", "penultimate"]
LAYERS = ("projected", "penultimate")
PART = 256  # pictures of one file


def encoder(model: Any, layer: Layer) -> Callable[[Tensor], Tensor]:
    """Normalised pixels [B, 3, S, S] -> features [B, D] of that layer, not normalised.

    Raises:
        ValueError: an unknown layer, or a model without it.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    if layer == "projected":
        return lambda pixels: model.encode_image(pixels, normalize=False)
    features: Callable[[Tensor], Tensor] | None = getattr(getattr(model, "image_tower", None), "features", None)
    if features is None:
        raise ValueError(f"{type(model).__name__}'s image tower has no penultimate features: use layer='projected'")
    return features


def feature_subject(model: Any, layer: str, *, reduced_decode: bool = False) -> Subject:
    """What a model's features depend on beside pictures: weights, their precision, form and pooling, preprocessing, layer.

    Args:
        model: an nn.Module with `preprocessor`.
        layer: one of `LAYERS`, or "pairs" for what a PairScorer keeps of a picture.
        reduced_decode: whether large JPEGs are decoded at a reduced scale.

    Raises:
        ValueError: a model of which that can't be told.
    """
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "preprocessor", None), "to_config"):
        raise ValueError(
            f"features of {type(model).__name__} can't be kept: it needs to be an nn.Module with a `preprocessor` that has "
            "to_config(), so that features are never taken for those of other weights or other preprocessing; leave the cache out"
        )
    form = re.sub(r" at 0x[0-9a-f]+", "", f"{type(model).__qualname__} {getattr(model, 'config', None)!r} {model!r}")
    identity = fingerprint(model, (), "", ["features", form, "reduced decoding" if reduced_decode else "exact"])
    return Subject(identity=identity, layer=layer, model=model_name(model))


def model_name(model: Any) -> str:
    """A model's name for people: its class, and where it is from as far as it knows."""
    source = (getattr(model, "provenance", None) or {}).get("source")
    return type(model).__name__ + (f", {source}" if source else "")


class KeptFeatures:
    """The features of a data set's pictures in a folder: those that are there, and those that are made now.

    Args:
        model: see `feature_subject`.
        folder: of the files.
        layer: which features; a PairScorer's projected ones are what its `encode_image` gives.
        reduced_decode: how large JPEGs are decoded.
    """

    def __init__(self, model: Any, folder: str | os.PathLike[str], layer: Layer, *, reduced_decode: bool = False) -> None:
        kept = "pairs" if layer == "projected" and isinstance(model, PairScorer) else layer
        self._shelf = Shelf(Path(folder), feature_subject(model, kept, reduced_decode=reduced_decode))
        self._made: dict[bytes, Tensor] = {}  # not yet in a file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """What was made is written, whatever stopped the rest."""
        self.write()

    @property
    def known(self) -> frozenset[bytes]:
        """The digests of pictures that need no decoding."""
        return self._shelf.known

    def get(self, digest: bytes) -> Tensor | None:
        """A picture's features [...], None where they must be made: not there, or damaged."""
        if digest in self._made:
            return self._made[digest]
        found = self._shelf.find(digest)
        return None if found is None else found[0].arrays[0][found[1]]

    def put(self, digests: Sequence[bytes], rows_B: Tensor) -> None:
        """Keep the features of pictures that were made now; a file is written for every `PART` of them.

        Raises:
            OSError: the disk is full.
        """
        for digest, row in zip(digests, rows_B, strict=True):
            if digest not in self._shelf:  # a picture that comes twice has one row
                self._made.setdefault(digest, row)
        if len(self._made) >= PART:
            self.write()

    def write(self) -> None:
        """Write what was made since the last file."""
        if self._made:
            made, self._made = self._made, {}
            self._shelf.add(list(made), [torch.stack(list(made.values()))])
