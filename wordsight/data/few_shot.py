"""Few labels: labelled sets, their splits, K shots a class, base and new classes.

The protocol is CoOp's (arXiv 2109.01134, section 4.1): K training and min(K, 4) validation pictures a class, the test split
whole; base and new classes are CoCoOp's (arXiv 2203.05557, section 4.1). Which pictures are drawn is a function of (seed, class,
picture's name) alone: not of the file system's order, of other classes, or of a library's random numbers; and the K pictures are
among the K + 1. The published programs draw otherwise (Python's `random`, over unsorted listings); `interop.dassl` reads theirs.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from wordsight.data.errors import BadSampleError
from wordsight.data.selection import Selection
from wordsight.data.sources import Source

MAX_VAL_SHOTS = 4
NAMED = 10  # classes or pictures that an error lists


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Pictures of known classes; nothing is read before `source[i]` is asked for.

    Attributes:
        source: N samples.
        keys: N names, the samples' own.
        labels: N class names.
        classes: all there is to choose from, in the order of the class indices; some may have no picture here.
        weights: N finite numbers above 0, how much each picture counts where it is learned from; None: all alike.
    """

    source: Source
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.source) == len(self.keys) == len(self.labels):
            raise ValueError(
                f"{len(self.source)} samples, {len(self.keys)} keys and {len(self.labels)} labels: each picture has one of each"
            )
        if self.weights is not None and (len(self.weights) != len(self) or not all(0 < w < math.inf for w in self.weights)):
            raise ValueError("weights are one finite number above 0 a picture; leave pictures out that do not count")
        if repeated := _repeated(self.classes):
            raise ValueError(f"class names must differ; these are there twice or more: {_some(repeated)}")
        if unknown := sorted(set(self.labels) - set(self.classes)):
            raise ValueError(f"{len(unknown)} labels are not among the {len(self.classes)} classes: {_some(unknown)}")

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> dict[str, int]:
        """How many pictures each class has, in the order of `classes`; 0 where there is none."""
        found = Counter(self.labels)
        return {name: found[name] for name in self.classes}

    def weighed_counts(self) -> dict[str, float]:
        """The sum of the weights of each class's pictures, as `counts`; with none given, how many they are."""
        if self.weights is None:
            return dict(self.counts())
        own: dict[str, list[float]] = {name: [] for name in self.classes}
        for label, weight in zip(self.labels, self.weights, strict=True):
            own[label].append(weight)
        return {name: math.fsum(weights) for name, weights in own.items()}

    def targets(self) -> list[int]:
        """The N class indices, in [0, C)."""
        place = {name: i for i, name in enumerate(self.classes)}
        return [place[label] for label in self.labels]

    def select(self, positions: Sequence[int]) -> LabelledSet:
        """The pictures at `positions`, in that order, of the same classes."""
        return replace(
            self,
            source=Selection(self.source, positions),
            keys=tuple(self.keys[i] for i in positions),
            labels=tuple(self.labels[i] for i in positions),
            weights=None if self.weights is None else tuple(self.weights[i] for i in positions),
        )

    def only(self, classes: Sequence[str]) -> LabelledSet:
        """The pictures of `classes`, which become the set's classes in that order.

        Raises:
            ValueError: a name that is none of the set's classes.
        """
        class_positions(classes, self.classes)
        kept = set(classes)
        chosen = self.select([i for i, label in enumerate(self.labels) if label in kept])
        return replace(chosen, classes=tuple(classes))


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A data set: what to learn from, what to choose settings on, what to be judged by.

    Attributes:
        name: what reports call it.
        classes: the class names in the order of the class indices, the same in each split.
        train, val, test: None where the data set has no such split.
        notes: what a report should say about how it was read and drawn.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledSet | None = None
    val: LabelledSet | None = None
    test: LabelledSet | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts():
            raise ValueError(f"{self.name} has neither train, val nor test: give at least one of them")
        for part, given in self.parts().items():
            if given.classes != self.classes:
                raise ValueError(f"the {part} split of {self.name} has other classes than the data set, or in another order")

    def parts(self) -> dict[str, LabelledSet]:
        """The splits that are there, by name."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {part: given for part, given in found.items() if given is not None}

    def only(self, classes: Sequence[str], *, name: str | None = None) -> Splits:
        """The same splits with the pictures of `classes` alone, which are numbered anew in that order.

        Raises:
            ValueError: a name that is none of the data set's classes.
        """
        train, val, test = (given.only(classes) if given is not None else None for given in (self.train, self.val, self.test))
        return Splits(name=name or self.name, classes=tuple(classes), train=train, val=val, test=test, notes=self.notes)


def label_source(source: Source, *, classes: Sequence[str] | None = None) -> LabelledSet:
    """A labelled set of any source whose samples say their label (shards, `sample:SPLIT`). Each sample is read once, to see it.

    Args:
        source: what to read.
        classes: the class names in their order; None: the labels found, sorted.

    Raises:
        ValueError: samples without a label, or that can't be read; it names the first ones.
    """
    keys: list[str] = []
    labels: list[str] = []
    bad: list[str] = []
    for i in range(len(source)):
        try:
            sample = source[i]
        except BadSampleError as error:
            bad.append(str(error))
            continue
        if sample.label is None:
            bad.append(f"{sample.key}: has no label")
        else:
            keys.append(sample.key)
            labels.append(sample.label)
    if bad:
        first = "".join(f"\n  {line}" for line in bad[:NAMED])
        raise ValueError(f"{len(bad)} of {len(source)} samples can't be used as labelled pictures:{first}\nMend or remove them.")
    names = tuple(classes) if classes is not None else tuple(sorted(set(labels)))
    return LabelledSet(source=source, keys=tuple(keys), labels=tuple(labels), classes=names)


# ------------------------------------------------------------------------------------------------------------------ shots


def few_shot(
    splits: Splits, num_shots: int, *, seed: int = 1, num_val_shots: int | None = None, allow_fewer: bool = False
) -> Splits:
    """K shots a class to learn from, a few more to choose settings on, and the test split as it is.

    Args:
        splits: a data set with a train split.
        num_shots: K, pictures a class to learn from; 1 or more.
        seed: which ones; the papers use 1, 2 and 3.
        num_val_shots: pictures a class to choose settings on; None: min(K, 4) as published; 0: none, and `val` is None. They come
            from the validation split; where there is none, from what the shots left of train, and the notes say so.
        allow_fewer: where a class has fewer pictures, take those that it has and say so in the notes.

    Returns:
        The splits, drawn; pictures lie class by class.

    Raises:
        ValueError: no train split, fewer than two classes, a class without a picture in train, or, without `allow_fewer`, classes
            with too few pictures; it names them with their counts.
    """
    num_val = min(num_shots, MAX_VAL_SHOTS) if num_val_shots is None else num_val_shots
    if num_shots < 1 or num_val < 0:
        raise ValueError(f"num_shots is 1 or more and num_val_shots 0 or more, got {num_shots} and {num_val}")
    if splits.train is None:
        raise ValueError(f"{splits.name} has no train split to draw shots from: it is for tests only")
    if len(splits.classes) < 2:
        raise ValueError(f"{splits.name} has {len(splits.classes)} class; a classifier needs at least 2")
    if empty := [name for name, count in splits.train.counts().items() if count == 0]:
        raise ValueError(
            f"{len(empty)} of {len(splits.classes)} classes of {splits.name} have no picture in train: {_some(empty)}. Add "
            "pictures of them, or leave them out with splits.only(classes)"
        )
    order = _draw_order(splits.train, seed)
    notes = [f"{num_shots} shots a class, seed {seed}"]
    notes += _too_few(order, num_shots, "train", splits.name, allow_fewer)
    train = splits.train.select([i for drawn in order.values() for i in drawn[:num_shots]])
    val = None
    if num_val > 0:
        if splits.val is not None:
            pool, left, where = splits.val, _draw_order(splits.val, seed), "val"
        else:
            pool, left, where = (
                splits.train,
                {name: drawn[num_shots:] for name, drawn in order.items()},
                "what the shots left of train",
            )
        notes.append(f"{num_val} validation pictures a class, from {where}")
        notes += _too_few(left, num_val, where, splits.name, allow_fewer)
        val = pool.select([i for drawn in left.values() for i in drawn[:num_val]])
    return replace(splits, train=train, val=val, notes=(*splits.notes, *notes))


def hold_out(splits: Splits, share: float = 0.3, *, seed: int = 0) -> Splits:
    """A test split for a data set that has none: a share of each class of train, at least one picture.

    The seed is one of its own, so that every draw of shots is judged by the same pictures.

    Raises:
        ValueError: there is a test split, or no train split; or a class has fewer than 2 pictures.
    """
    if splits.test is not None or splits.train is None:
        raise ValueError(
            f"{splits.name} has {' and '.join(splits.parts())}; a test split is held out of train where there is none"
        )
    if not 0 < share < 1:
        raise ValueError(f"the share of pictures to hold out lies between 0 and 1, got {share}")
    if small := {name: count for name, count in splits.train.counts().items() if count < 2}:
        raise ValueError(f"holding out a test split needs 2 pictures a class; {splits.name} has too few of {_counted(small)}")
    test: list[int] = []
    for drawn in _draw_order(splits.train, seed).values():
        test += drawn[: min(len(drawn) - 1, max(1, round(share * len(drawn))))]
    taken = set(test)
    note = f"no test split given: {len(test)} of {len(splits.train)} pictures of train, {share:.0%} of each class, are held out"
    return replace(
        splits,
        train=splits.train.select([i for i in range(len(splits.train)) if i not in taken]),
        test=splits.train.select(sorted(test)),
        notes=(*splits.notes, note),
    )


def _draw_order(pictures: LabelledSet, seed: int) -> dict[str, list[int]]:
    """Each class's positions in the order in which they are drawn; the classes in theirs."""
    ranked: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    for i, (key, label) in enumerate(zip(pictures.keys, pictures.labels, strict=True)):
        text = f"{seed}\0{label}\0{key}".encode(errors="surrogateescape")
        ranked[label].append((hashlib.sha256(text).digest(), i))
    return {name: [i for _, i in sorted(ranked[name])] for name in pictures.classes}


def _too_few(order: dict[str, list[int]], wanted: int, where: str, name: str, allow_fewer: bool) -> list[str]:
    """What to report of classes with fewer than `wanted` pictures; an error where that isn't allowed."""
    small = {label: len(drawn) for label, drawn in order.items() if len(drawn) < wanted}
    if not small:
        return []
    told = f"{len(small)} of {len(order)} classes of {name} have fewer than {wanted} pictures in {where}: {_counted(small)}"
    if not allow_fewer:
        raise ValueError(f"{told}. Ask for fewer shots, add pictures, or take what there is with allow_fewer=True")
    return [told]


# ------------------------------------------------------------------------------------------------------- subsets of classes


def base_to_new(splits: Splits) -> tuple[Splits, Splits]:
    """Halves of a data set by class, as in CoCoOp: the first ceil(C / 2) in the order of the class indices, and the others.

    Both are numbered from 0. Learn from the base half's shots, then judge by both test splits, each among its own classes.

    Raises:
        ValueError: fewer than 4 classes, so that one half has nothing to choose between.
    """
    num_classes = len(splits.classes)
    if num_classes < 4:
        raise ValueError(f"base-to-new needs at least 4 classes, 2 in each half; {splits.name} has {num_classes}")
    num_base = -(-num_classes // 2)
    base, new = splits.classes[:num_base], splits.classes[num_base:]
    return splits.only(base, name=f"{splits.name}-base"), splits.only(new, name=f"{splits.name}-new")


def class_positions(classes: Iterable[str], among: Sequence[str]) -> list[int]:
    """Where each of `classes` stands in `among`: the columns of a classifier that a data set with fewer classes asks for.

    ImageNet-A and -R have 200 of ImageNet's 1,000 classes: `scores_NC[:, class_positions(a.classes, imagenet.classes)]`.

    Raises:
        ValueError: a class that is not in `among`.
    """
    place = {name: i for i, name in enumerate(among)}
    wanted = list(classes)
    if missing := [name for name in wanted if name not in place]:
        raise ValueError(f"{len(missing)} of {len(wanted)} classes are not among the {len(among)} known ones: {_some(missing)}")
    return [place[name] for name in wanted]


# ------------------------------------------------------------------------------------------------------------- in words


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + more


def _counted(counts: dict[str, int]) -> str:
    told = [f"{name!r} ({count})" for name, count in list(counts.items())[:NAMED]]
    return ", ".join(told) + (f" and {len(counts) - NAMED} more" if len(counts) > NAMED else "")
