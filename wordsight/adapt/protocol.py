"""Protocols of few labels: what each seed learns from, what it chooses by, and what it is judged by.

- few_shot: K shots a class, judged by the test split (CoOp, arXiv 2109.01134, section 4.1).
- base_to_new: shots of the first half of the classes, judged by that half's test split and by the other half's among its own
  names; the harmonic mean of both (CoCoOp, arXiv 2203.05557, section 4.1).
- cross_dataset: shots of one data set, judged by others, each among its own names (CoCoOp, section 4.2).
- domain: shots of one data set, judged by others that show its classes, or some of them, in another way (CoCoOp, section 4.3).

Settings are chosen by validation shots alone; a test split's labels serve nothing but the figures.

Shape legend: S seeds, N pictures, C classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from wordsight.data.few_shot import LabelledSet, Splits, base_to_new, class_positions, few_shot, hold_out
from wordsight.evaluate.metrics import wilson_interval

PROTOCOLS = ("few_shot", "base_to_new", "cross_dataset", "domain")
Choice = Literal["learned", "some", "new"]
Shots = int | Literal["all"]


@dataclass(frozen=True, kw_only=True)
class Test:
    """Pictures that a classifier is judged by.

    Attributes:
        name: short, of letters that file names may have: the split in results.json.
        data: the data set's name.
        pictures: what is asked.
        choice: among which classes: "learned": the classifier's own; "some": those of its own that the pictures' set has; "new":
            the set's, which the classifier has never seen.
    """

    name: str
    data: str
    pictures: LabelledSet
    choice: Choice = "learned"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One seed: what is learned from, chosen by and judged by."""

    seed: int
    train: LabelledSet | None
    val: LabelledSet | None
    classes: tuple[str, ...]
    tests: tuple[Test, ...]
    notes: tuple[str, ...] = ()


def trials(
    protocol: str,
    splits: Splits,
    shots: Shots,
    seeds: Sequence[int],
    others: Sequence[Splits] = (),
    *,
    allow_fewer: bool = False,
) -> list[Trial]:
    """What each seed learns from and is judged by.

    Args:
        protocol: one of PROTOCOLS.
        splits: the data set to learn from. Without a test split one is held out of train, and the notes say so.
        shots: K pictures a class; "all" takes the whole train split; 0 learns nothing (zero-shot).
        seeds: of the draws.
        others: what else to be judged by, for cross_dataset and domain; each needs a test split.
        allow_fewer: see `few_shot`.

    Raises:
        ValueError: an unknown protocol, seeds that are not different, `others` that are missing or not used, or what the data
            lack.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {list(seeds)}")
    if bool(others) != (protocol in ("cross_dataset", "domain")):
        needs = "needs other data sets to be judged by" if not others else "is judged by the data set's own test split alone"
        raise ValueError(f"the protocol {protocol} {needs}")
    if splits.test is None:
        splits = hold_out(splits)
    if protocol == "base_to_new":
        base, new = base_to_new(splits)
        assert base.test is not None
        assert new.test is not None
        tests: tuple[Test, ...] = (
            Test(name="base", data=splits.name, pictures=base.test),
            Test(name="new", data=splits.name, pictures=new.test, choice="new"),
        )
        splits = base
    else:
        assert splits.test is not None
        choice: Choice = "some" if protocol == "domain" else "new"
        tests = (Test(name="test", data=splits.name, pictures=splits.test),)
        for other in others:
            tests = (*tests, _other(other, choice, splits, {test.name for test in tests}))
    for test in tests:
        if len(test.pictures) == 0:
            raise ValueError(f"the {test.name} split of {test.data} has no picture of the classes that are asked for")
    return [_trial(splits, shots, seed, tests, allow_fewer) for seed in seeds]


def _other(other: Splits, choice: Choice, source: Splits, taken: set[str]) -> Test:
    """Another data set's test, by a name that file names may have and that is not taken."""
    pictures = other.test or other.val or other.train  # a plain folder of pictures has one split, whatever it is called
    assert pictures is not None
    if choice == "some":
        class_positions(other.classes, source.classes)  # names a class that the source does not have
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", other.name).strip("-.") or "other"
    name = next(name for name in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if name not in taken)
    return Test(name=name, data=other.name, pictures=pictures, choice=choice)


def _trial(splits: Splits, shots: Shots, seed: int, tests: tuple[Test, ...], allow_fewer: bool) -> Trial:
    if shots == 0:
        return Trial(seed=seed, train=None, val=None, classes=splits.classes, tests=tests, notes=splits.notes)
    drawn = _whole(splits, seed) if shots == "all" else few_shot(splits, shots, seed=seed, allow_fewer=allow_fewer)
    return Trial(seed=seed, train=drawn.train, val=drawn.val, classes=drawn.classes, tests=tests, notes=drawn.notes)


def _whole(splits: Splits, seed: int) -> Splits:
    """All of train to learn from; where there is no validation split, a tenth of each class to choose by."""
    if splits.val is not None or splits.train is None:
        return few_shot(splits, 1, seed=seed) if splits.train is None else splits  # the first names what is missing
    held = hold_out(Splits(name=splits.name, classes=splits.classes, train=splits.train), 0.1, seed=seed)
    assert held.train is not None
    assert held.test is not None
    note = f"no validation split: {len(held.test)} of {len(splits.train)} pictures of train are taken for it"
    return Splits(
        name=splits.name, classes=splits.classes, train=held.train, val=held.test, test=splits.test, notes=(*splits.notes, note)
    )


def for_classes(classifier: Any, names: Sequence[str]) -> Any:
    """A fitted classifier for other classes than it was fitted to.

    Raises:
        ValueError: the method can't: its weights belong to the classes that it has learned.
    """
    if not names_new_classes(type(classifier)):
        raise ValueError(
            f"{type(classifier).__name__} can't name new classes: its weights belong to those that it learned. Ask zero_shot, "
            "coop (with a context that all classes share) or cocoop"
        )
    return classifier.with_classes(list(names))


def names_new_classes(method: Any) -> bool:
    """Whether an estimator's class can take what it has learned to other class names."""
    return hasattr(method, "with_classes")


def logits_among(classifier: Any, test: Test, features: Any) -> tuple[tuple[str, ...], Tensor]:
    """(class names [C], logits float64 [N, C]) of a test's pictures, among the classes that it asks for."""
    if test.choice == "new":
        classifier = for_classes(classifier, test.pictures.classes)
    logits_NC = classifier.logits(features).double()
    names = [str(name) for name in classifier.classes_]
    if test.choice == "some":
        columns = sorted(class_positions(test.pictures.classes, names))
        return tuple(names[column] for column in columns), logits_NC[:, columns]
    return tuple(names), logits_NC


# ---------------------------------------------------------------------------------------------------------------- over seeds


def mean_over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean and its 95% interval by Student's t with S - 1 degrees of freedom, cut to [0, 1].

    It says how much another draw of shots would change the figure, not how much another test set would.

    Raises:
        ValueError: fewer than two values, which have no spread.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 of them, got {len(values)}")
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = student_t(len(values) - 1) * spread / math.sqrt(len(values))
    return mean, (min(mean, max(0.0, mean - half)), max(mean, min(1.0, mean + half)))


def student_t(degrees: int) -> float:
    """The 97.5% point of Student's t distribution."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def harmonic_mean(base: float, new: float) -> float:
    """2 base new / (base + new), 0 where both are 0: of the accuracies averaged over seeds, as CoCoOp reports it."""
    return 2 * base * new / (base + new) if base + new else 0.0


def interval_of(values: Sequence[float], count: int) -> tuple[float, float]:
    """The interval over seeds; of one seed alone, Wilson's of its `count` pictures."""
    if len(values) > 1:
        return mean_over_seeds(values)[1]
    return wilson_interval(values[0] * count, count)
