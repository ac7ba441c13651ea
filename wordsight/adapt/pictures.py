"""The data and the features of an adaptation: splits from what a user types, and each picture's features once for all seeds and
methods.

Shape legend: N pictures of a set, U different pictures in all, V views, D feature width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wordsight.adapt.features import LAYERS, ImageFeatures, Layer, image_features
from wordsight.data.errors import BadSampleError
from wordsight.data.few_shot import LabelledSet, Splits, label_source
from wordsight.data.long_tail import open_long_tail
from wordsight.data.selection import Selection
from wordsight.data.sources import open_source
from wordsight.data.weights import read_weights, weigh
from wordsight.evaluate.results import name_data
from wordsight.types import Sample

Place = tuple[int, int]  # a source (its id) and a position in it


# ------------------------------------------------------------------------------------------------------------------- data


def open_data(
    data: str,
    *,
    root: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    test: str | None = None,
    val: str | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Splits:
    """The splits of what a user types.

    Args:
        data: `sample:SPLIT`, tar shards, or what `wordsight.data.long_tail.open_long_tail` takes: a folder, list files, table,
            split file or published name.
        root: see `open_long_tail`.
        classes: all class names, in their order; None: those of the data.
        test, val: data that take the place of these splits; of several splits the one of that name.
        weights: a table of paths and weights of training pictures, see `data.weights`; a table of pictures may have them itself.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: data without labels, labels that are not among the classes, weights that can't be used.
    """
    splits = _open(data, root)
    if weights is not None:
        splits = weigh(splits, read_weights(Path(weights)), Path(weights).name)
    if classes is not None:
        splits = _of_classes(splits, tuple(classes))
    if test is not None:
        splits = replace(splits, test=_as_part(_open(test, root), "test", splits.classes))
    if val is not None:
        splits = replace(splits, val=_as_part(_open(val, root), "val", splits.classes))
    given = tuple(f"the {part} split is that of {data}" for part, data in (("test", test), ("val", val)) if data is not None)
    return replace(splits, notes=(*splits.notes, *given))


def _open(data: str, root: str | os.PathLike[str] | None) -> Splits:
    if data.startswith("sample:") or data.endswith(".tar"):
        given = label_source(open_source(data))
        name = "-".join(name_data(data)) if data.startswith("sample:") else Path(data).stem
        return Splits(name=name, classes=given.classes, train=given)
    return open_long_tail(data, root)


def _of_classes(splits: Splits, classes: tuple[str, ...]) -> Splits:
    """The splits with these classes; a label that is none of them is an error."""
    train, val, test = (
        None if part is None else replace(part, classes=classes) for part in (splits.train, splits.val, splits.test)
    )
    return Splits(name=splits.name, classes=classes, train=train, val=val, test=test, notes=splits.notes)


def _as_part(splits: Splits, part: str, classes: tuple[str, ...]) -> LabelledSet:
    parts = splits.parts()
    if part not in parts and len(parts) > 1:
        raise ValueError(
            f"{splits.name} has {' and '.join(parts)}, so it is not plain what to take as {part}: name one of their folders"
        )
    return replace(parts.get(part) or next(iter(parts.values())), classes=classes)


# --------------------------------------------------------------------------------------------------------------- features


class Features:
    """Features of labelled sets of pictures by one frozen model; each different picture goes through the model once for each
    layer.

    Args:
        model: an Embedder.
        sets: all that will be asked for.
        cache: the folder where features are kept.
        progress: whether to show a bar.
    """

    def __init__(self, model: Any, sets: Iterable[LabelledSet], cache: Path, *, progress: bool = False) -> None:
        self._model, self._cache, self._progress = model, cache, progress
        self._sources: dict[int, Any] = {}
        self._rows: dict[Place, int] = {}
        for one in sets:
            for place in self._places(one):
                self._rows.setdefault(place, len(self._rows))
        self._plain: dict[Layer, ImageFeatures] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def token_folder(self) -> Path:
        """Where tokens to learn from are kept for all seeds, beside the features."""
        return self._cache.parent / "tokens"

    def plain(self, pictures: LabelledSet, layer: Any = "projected") -> Any:
        """Features [N, D] of the fixed view; the pictures themselves for a method that reads tokens (the decoder).

        Raises:
            OSError: a picture can't be read; it is named.
            ValueError: the model gives infinite or undefined features, or has no such layer.
        """
        if layer not in LAYERS:
            return self._pictures(self._places(pictures))
        if layer not in self._plain:
            self._plain[layer] = self._compute(list(self._rows), layer)
        return self._plain[layer].take([self._rows[place] for place in self._places(pictures)])

    def views(self, pictures: LabelledSet, layer: Any, num_views: int, seed: int) -> Any:
        """The same with V random views of `seed`."""
        plain = self.plain(pictures, layer)
        if not num_views or layer not in LAYERS:
            return plain
        drawn = self._compute(self._places(pictures), layer, num_views, seed)
        return ImageFeatures(plain.plain, drawn.views, layer)

    def _compute(self, places: Sequence[Place], layer: Layer, num_views: int = 0, seed: int = 0) -> ImageFeatures:
        pictures = self._pictures(places)
        return image_features(
            self._model, pictures, num_views=num_views, seed=seed, layer=layer, cache=self._cache, progress=self._progress
        )

    def _pictures(self, places: Sequence[Place]) -> Sequence[Sample]:
        return _Pictures([(self._sources[source], position) for source, position in places])

    def _places(self, pictures: LabelledSet) -> list[Place]:
        """Where the pictures lie in the sources that they were drawn from, so that two draws of one picture are known as one."""
        source, positions = pictures.source, list(range(len(pictures)))
        while isinstance(source, Selection):
            positions = [source.positions[position] for position in positions]
            source = source.sources[0]
        self._sources[id(source)] = source  # keeps it alive, and with it the id its own
        return [(id(source), position) for position in positions]


class _Pictures(Sequence[Sample]):
    """Samples of several sources as one sequence; one that can't be read is an OSError that names it."""

    def __init__(self, places: Sequence[tuple[Any, int]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def take(self, rows: Sequence[int]) -> _Pictures:
        """Some of the pictures, in that order."""
        return _Pictures([self._places[row] for row in rows])

    def __getitem__(self, index: Any) -> Any:
        source, position = self._places[index]
        try:
            return source[position]
        except BadSampleError as error:
            raise OSError(f"{error.key} can't be read: {error.reason}") from error
