"""Data of unequal classes for a grid of methods: splits with nothing thrown away, and what the methods look at, computed once.

Where a split is missing it is held out of train by a fixed seed, so that all cells of a grid are chosen and judged by the same
pictures. A class of one picture stays whole in train. Classes without a training picture are kept as answers that are asked for:
a method that learns from pictures can't name them, and its figures say so.

Shape legend: N pictures, C classes, L classes that have training pictures, V views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wordsight.adapt.features import LAYERS
from wordsight.adapt.pictures import Features
from wordsight.adapt.token_cache import Tokens, cache_tokens
from wordsight.data.few_shot import LabelledSet, Splits, _draw_order, _some
from wordsight.data.weights import without_weights

HELD_OUT_SEED = 0
TEST_SHARE, VAL_SHARE = 0.3, 0.1  # of each class, where there is no such split
Part = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class TailData:
    """What a grid learns from, chooses by and is judged by.

    Attributes:
        name: of the data set.
        classes: C names, all that the data set has.
        learned: L names, those with a training picture, in the same order.
        train, val, test: pictures; those of val and test may be of classes that are not learned.
        counts: [C], training pictures of each class, or the sums of their weights.
        notes: what a report should say.
    """

    name: str
    classes: tuple[str, ...]
    learned: tuple[str, ...]
    train: LabelledSet
    val: LabelledSet
    test: LabelledSet
    counts: tuple[float, ...]
    notes: tuple[str, ...]

    def part(self, name: Part) -> LabelledSet:
        """The split of that name."""
        found: LabelledSet = getattr(self, name)
        return found

    def targets(self, name: Part) -> np.ndarray:
        """int64 [N], places in `classes`."""
        return np.array(self.part(name).targets(), np.int64)


def prepare(splits: Splits) -> TailData:
    """Splits as a grid needs them.

    Raises:
        ValueError: no train split, training pictures of fewer than two classes, or too few pictures to hold out what is missing.
    """
    if splits.train is None:
        raise ValueError(f"{splits.name} has no train split to learn from: it has {' and '.join(splits.parts())}")
    there = [name for name, count in splits.train.counts().items() if count]
    if len(there) < 2:
        raise ValueError(
            f"{splits.name} has {len(splits.train)} training pictures of {len(there)} class, {_some(there)}: a classifier needs "
            "at least 2 classes"
        )
    if splits.test is None:
        splits = _hold_out(splits, "test", TEST_SHARE)
    if splits.val is None:
        splits = _hold_out(splits, "val", VAL_SHARE)
    train, val, test = splits.train, splits.val, splits.test
    assert train is not None
    assert val is not None
    assert test is not None
    counts = train.weighed_counts()
    learned = tuple(name for name in splits.classes if counts[name])
    return TailData(
        name=splits.name,
        classes=splits.classes,
        learned=learned,
        train=train,
        val=without_weights(val),
        test=without_weights(test),
        counts=tuple(counts.values()),
        notes=(*splits.notes, *_lacks(splits.classes, learned, val, test)),
    )


def _hold_out(splits: Splits, part: Part, share: float) -> Splits:
    """A share of each class of train as another split: at least one picture, none of a class that has but one."""
    assert splits.train is not None
    taken: list[int] = []
    single = []
    for name, drawn in _draw_order(splits.train, HELD_OUT_SEED).items():
        taken += drawn[: max(0, min(len(drawn) - 1, max(1, round(share * len(drawn)))))]
        single += [name] if len(drawn) == 1 else []
    if not taken:
        raise ValueError(
            f"{splits.name} has no {part} split, and one can't be held out: no class has 2 training pictures. Give one with "
            f"--{part}, or more pictures"
        )
    note = (
        f"no {part} split given: {len(taken)} of {len(splits.train)} pictures of train, {share:.0%} of each class, are held out"
    )
    if single:
        note += f"; none of {len(single)} classes of a single picture: {_some(single)}"
    held = set(taken)
    rest = splits.train.select([i for i in range(len(splits.train)) if i not in held])
    return replace(splits, train=rest, **{part: splits.train.select(sorted(taken))}, notes=(*splits.notes, note))  # type: ignore[arg-type]


def _lacks(classes: Sequence[str], learned: Sequence[str], val: LabelledSet, test: LabelledSet) -> list[str]:
    known = set(learned)
    asked, chosen_by = set(test.labels), set(val.labels)
    unseen = [name for name in classes if name not in known and name in asked]
    empty = [name for name in classes if name not in known and name not in asked]
    alone = [name for name in learned if name not in chosen_by]
    notes = []
    if unseen:
        notes.append(
            f"{len(unseen)} classes have test pictures and no training picture: {_some(unseen)}. Only zero_shot can name them; "
            "for all others their pictures count as wrong"
        )
    if empty:
        notes.append(f"{len(empty)} classes have neither training nor test pictures: {_some(empty)}")
    if alone:
        notes.append(f"{len(alone)} of {len(learned)} learned classes have no validation picture: {_some(alone)}")
    return notes


class Inputs:
    """What methods look at in place of the pictures: features, and tokens in files; each picture goes through the tower once.

    Args:
        model: an Embedder.
        data: the pictures.
        folder: where features and tokens are kept.
        token_kind: how tokens are kept, see `cache_tokens`.
        progress: show bars.
    """

    def __init__(self, model: Any, data: TailData, folder: Path, *, token_kind: str = "float16", progress: bool = False) -> None:
        self._model, self._data, self._folder = model, data, folder
        self._kind, self._progress = token_kind, progress
        parts = (data.train, data.val, data.test)
        self._features = Features(model, parts, folder / "features", progress=progress)
        self._views: dict[tuple[str, int, int], Any] = {}  # of features: layer, views, seed
        self._tokens: dict[tuple[Part, int, int | None], Tokens] = {}

    def __len__(self) -> int:
        return len(self._features)

    def of(self, part: Part, estimator: Any) -> Any:
        """What an estimator takes for the pictures of a split; of train the random views of its seed too, where it wants them."""
        layer, pictures = estimator.layer, self._data.part(part)
        num_views = getattr(estimator, "num_views", 0) if part == "train" else 0
        if layer == "pictures":  # a tower that learns looks at them itself
            return self._features.plain(pictures, layer)
        if layer not in LAYERS:
            return self._tokens_of(part, num_views, estimator.seed)
        if not num_views:
            return self._features.plain(pictures, layer)
        key = (layer, num_views, estimator.seed)
        if key not in self._views:
            self._views = {key: self._features.views(pictures, layer, num_views, estimator.seed)}  # one seed's at a time
        return self._views[key]

    def _tokens_of(self, part: Part, num_views: int, seed: int) -> Tokens:
        key = (part, num_views, seed if num_views else None)
        if key not in self._tokens:
            found = cache_tokens(
                self._model,
                self._features.plain(self._data.part(part), "tokens"),
                self._folder / "tokens",
                num_views=num_views,
                seed=seed,
                kind=self._kind,  # type: ignore[arg-type]  # checked there
                progress=self._progress,
            )
            self._tokens[key] = replace(found, identity=None)  # of this model: to compare would hash its weights for each cell
        return self._tokens[key]

    def held_out(self, estimator: Any) -> tuple[Any, list[str]] | None:
        """(X, y) of the validation pictures whose class is learned, for a method's own choices; None where there are none."""
        known = set(self._data.learned)
        rows = [i for i, label in enumerate(self._data.val.labels) if label in known]
        if not rows:
            return None
        return self.of("val", estimator).take(rows), [self._data.val.labels[i] for i in rows]


def answers(classifier: Any, given: Any, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(predicted [N], places in `classes`; the probability that each was given [N]) of a fitted classifier."""
    place = {name: i for i, name in enumerate(classes)}
    columns = np.array([place[str(name)] for name in classifier.classes_])
    confidence_N, winner_N = classifier.logits(given).double().softmax(1).max(1)
    return columns[winner_N.numpy()], confidence_N.clamp(0, 1).numpy()
