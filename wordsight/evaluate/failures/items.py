"""Questions of pictures and texts, how a model's scores answer them, and what is reported.

A question is right where the score of the right pair is *strictly* higher than every one it is compared with: a tie is wrong.
Three kinds of item:

- one picture, K texts: which text? Chance 1 / K.
- K pictures, one text: which picture? Chance 1 / K.
- two pictures, two texts, picture i belongs to text i (Winoground, arXiv 2204.03162, section 3). `text`: each picture scores
  higher with its own text than with the other (chance 1/4); `image`: each text scores higher with its own picture than with the
  other (1/4); `group`: both (1/6). `accuracy` is the mean over the pictures of the first question (1/2).

The three chances of Winoground are those of four independent scores. A model that prefers one of the texts whatever the picture
shows has 0 there, but 1/2 of `accuracy`: every preference that does not look at the picture is right for exactly one picture.

Intervals are those of grouped shares (`wordsight.evaluate.intervals`): items of one group (the same objects, the same photograph)
are not independent.

Shape legend: N answers, P pictures and T texts of an item, B pictures of a batch, U texts of a batch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from wordsight.evaluate.embedding import _checked, _unit, embed_texts, require_embedder
from wordsight.evaluate.failures.chance import Draw
from wordsight.evaluate.failures.drawing import SIZE_PX
from wordsight.evaluate.intervals import grouped_share
from wordsight.evaluate.modes import judging
from wordsight.evaluate.results import Finding, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.types import Metric

WINOGROUND_CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question.

    Attributes:
        key: its name, the same in every run.
        rows: what the table counts it under, e.g. the number, and whether others are there.
        group: items of the same group are not independent (the same objects, the same photograph).
        pictures: P functions that draw or read a picture.
        texts: T texts.
        right: of each picture the index of its text; with one text, the index of its picture alone.
    """

    key: str
    rows: tuple[str, ...]
    group: str
    pictures: tuple[Callable[[], Image.Image], ...]
    texts: tuple[str, ...]
    right: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = len(self.pictures), len(self.texts)
        choices = max(shape)
        if 1 in shape:
            good = len(self.right) == 1 and choices > 1 and 0 <= self.right[0] < choices
        else:
            good = shape == (2, 2) and self.right == (0, 1)
        if not good:
            raise ValueError(
                f"item {self.key}: {shape[0]} pictures, {shape[1]} texts and right={self.right} are neither a choice (one of "
                "several texts or pictures) nor a group (2 pictures, 2 texts, right=(0, 1))"
            )

    @property
    def is_group(self) -> bool:
        """Whether it has two pictures and two texts."""
        return len(self.pictures) == 2 and len(self.texts) == 2


def answers(item: Item, scores_PT: np.ndarray) -> dict[str, list[float]]:
    """What became of an item: `accuracy` of each question, and for a group `text`, `image` and `group`; 1 right, 0 wrong."""
    if item.is_group:
        by_picture = [scores_PT[0, 0] > scores_PT[0, 1], scores_PT[1, 1] > scores_PT[1, 0]]
        by_text = [scores_PT[0, 0] > scores_PT[1, 0], scores_PT[1, 1] > scores_PT[0, 1]]
        text, image = all(by_picture), all(by_text)
        found = {"accuracy": by_picture, "text": [text], "image": [image], "group": [text and image]}
        return {name: [float(one) for one in right] for name, right in found.items()}
    choices = scores_PT.reshape(-1)
    return {"accuracy": [float((np.delete(choices, item.right[0]) < choices[item.right[0]]).all())]}


def has_tie(item: Item, scores_PT: np.ndarray) -> bool:
    """Whether a right score is equalled by one that it is compared with and exceeded by none, in one question or more."""
    rows = [*scores_PT, *scores_PT.T] if item.is_group else [scores_PT.reshape(-1)]
    rights = [0, 1, 0, 1] if item.is_group else [item.right[0]]
    return any(row[right] == np.delete(row, right).max() for row, right in zip(rows, rights, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What scores come to: see `Finding`."""

    metrics: dict[str, Metric]
    outcomes: tuple[Outcomes, ...]
    table: list[dict[str, Any]]
    ties: int


def figures(items: Sequence[Item], scores: Sequence[np.ndarray]) -> Figures:
    """Figures of all items together and of each row.

    Args:
        items: of one kind, with equally many choices.
        scores: [P, T] of each item, higher is better.

    Raises:
        ValueError: no items, items of different kinds, scores of another shape or not finite.
    """
    shapes = Counter((len(item.pictures), len(item.texts)) for item in items)
    if len(shapes) != 1:
        raise ValueError(f"items of one kind are judged together, got (pictures, texts) {dict(shapes) or 'of no items'}")
    for item, scores_PT in zip(items, scores, strict=True):
        if scores_PT.shape != (len(item.pictures), len(item.texts)) or not np.isfinite(scores_PT).all():
            raise ValueError(f"the scores of item {item.key} must be {next(iter(shapes))} finite numbers, got {scores_PT}")
    chances = {"accuracy": 1 / max(next(iter(shapes)))} | (WINOGROUND_CHANCE if items[0].is_group else {})
    found = [answers(item, scores_PT) for item, scores_PT in zip(items, scores, strict=True)]

    def share(name: str, places: Sequence[int]) -> Metric:
        values = [value for i in places for value in found[i][name]]
        groups = [items[i].group for i in places for _ in found[i][name]]
        return grouped_share(values, groups, chances[name])

    rows: dict[str, list[int]] = {}
    for kind in range(max(len(item.rows) for item in items)):  # all numbers, then "alone" and "among others"
        for i, item in enumerate(items):
            for row in item.rows[kind : kind + 1]:
                rows.setdefault(row, []).append(i)
    everything = range(len(items))
    table = []
    for row, places in rows.items():
        metric = share("accuracy", places)
        line: dict[str, Any] = {"row": row, "items": len(places), "accuracy": metric.value}
        line |= {"low": metric.ci95[0], "high": metric.ci95[1], "chance": metric.chance}
        table.append(line | {name: share(name, places).value for name in chances if name != "accuracy"})
    return Figures(
        metrics={name: share(name, everything) for name in chances},
        outcomes=tuple(_outcomes(name, items, found) for name in chances),
        table=table,
        ties=sum(has_tie(item, scores_PT) for item, scores_PT in zip(items, scores, strict=True)),
    )


def _outcomes(name: str, items: Sequence[Item], found: Sequence[dict[str, list[float]]]) -> Outcomes:
    keys, values, groups = [], [], []
    for item, answer in zip(items, found, strict=True):
        several = len(answer[name]) > 1
        keys += [f"{item.key}/{k}" if several else item.key for k in range(len(answer[name]))]
        values += answer[name]
        groups += [item.group] * len(answer[name])
    return Outcomes(metric=name, keys=tuple(keys), values=np.array(values), groups=tuple(groups))


# -------------------------------------------------------------------------------------------------------------------- a model


def score_items(
    model: Any, items: Sequence[Item], *, batch_size: int = 64, progress: bool = False, description: str = "pictures"
) -> tuple[list[np.ndarray], str]:
    """What `model` gives each picture and text of each item.

    Pictures are drawn or read, a batch at a time, and not kept.

    Returns:
        [P, T] float32 of each item, and a hash of what was shown: pixels, texts and right answers.
    """
    require_embedder(model)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    place = {text: i for i, text in enumerate(dict.fromkeys(text for item in items for text in item.texts))}
    texts_MD = embed_texts(model, list(place), description="texts" if progress else None)
    compare = pair_scores(model)
    scores = [np.empty((len(item.pictures), len(item.texts)), np.float32) for item in items]
    listing = hashlib.sha256()
    total = sum(len(item.pictures) for item in items)
    with tqdm(total=total, desc=description, unit="picture", disable=not progress) as bar, judging(model) as device:
        asked = ((i, k) for i, item in enumerate(items) for k in range(len(item.pictures)))
        while batch := list(islice(asked, batch_size)):
            pixels = []
            for i, k in batch:
                picture = items[i].pictures[k]()
                listing.update(repr((items[i].key, items[i].texts, items[i].right, k, picture.mode, picture.size)).encode())
                listing.update(picture.tobytes())
                pixels.append(model.preprocess(picture))
            vectors = model.encode_image(torch.stack(pixels).to(device))
            vectors_BD = _unit(model, _checked(vectors, f"a picture of {items[batch[0][0]].key}"))
            used = sorted({place[text] for i, _ in batch for text in items[i].texts})
            scores_BU = compare(vectors_BD, texts_MD[used]).numpy()
            column = {text: j for j, text in enumerate(used)}
            for row_U, (i, k) in zip(scores_BU, batch, strict=True):
                scores[i][k] = row_U[[column[place[text]] for text in items[i].texts]]
            bar.update(len(batch))
    return scores, listing.hexdigest()


def judge_items(
    model: Any,
    items: Sequence[Item],
    *,
    task: str,
    protocol: str,
    notes: tuple[str, ...] = (),
    batch_size: int = 64,
    progress: bool = False,
) -> Finding:
    """Score items with a model and say what came of them.

    Args:
        model: an Embedder.
        items: of one kind.
        task, protocol: of the Finding; the protocol names everything that the items were made from.
        notes: what a reader should know.
        batch_size: pictures encoded at once.
        progress: show a bar.
    """
    scores, listing = score_items(model, items, batch_size=batch_size, progress=progress, description=task)
    found = figures(items, scores)
    protocol = f"{protocol}; a tie is wrong"
    if found.ties:
        notes = (*notes, f"{found.ties} of {len(items)} items have a tie at the top, which counts as wrong")
    texts = list(dict.fromkeys(text for item in items for text in item.texts))
    return Finding(
        task=task,
        metrics=found.metrics,
        protocol=protocol,
        fingerprint=fingerprint(model, texts, listing, protocol),
        outcomes=found.outcomes,
        table=found.table,
        notes=notes,
    )


# --------------------------------------------------------------------------------------------------------------- generated ones


@dataclass(frozen=True, kw_only=True)
class FailureMode:
    """Items of one kind, made from a seed: the first `n` of them are the same for every `num`.

    A subclass says its `name` and how item `i` is made (`_item`), which must be balanced: over consecutive items every row and
    every place of the right answer comes equally often.

    Attributes:
        num: how many items.
        seed: another seed draws other objects and places.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # goes up when the same seed gives other items
    num: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"num must be at least 1 item, got {self.num}")

    def items(self) -> list[Item]:
        """The items; nothing is drawn yet."""
        return [self._item(i, self._draw(i)) for i in range(self.num)]

    def _draw(self, i: int) -> Draw:
        return Draw(self.name, self.version, self.seed, i)

    def _item(self, i: int, draw: Draw) -> Item:
        raise NotImplementedError

    def how(self) -> str:
        """What a protocol says of how the items are made, after number and seed."""
        return f"{SIZE_PX} px, Twemoji"

    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures should know."""
        return ()

    def run(self, model: Any) -> dict[str, Metric]:
        """The figures alone."""
        return self.judge(model).metrics

    def judge(self, model: Any, *, batch_size: int = 64, progress: bool = False) -> Finding:
        """The figures with their protocol, fingerprint, outcomes and table.

        Args:
            model: an Embedder.
            batch_size: pictures encoded at once; it changes the speed, not the result.
            progress: show a bar.
        """
        protocol = f"{self.name} {self.version}, {self.num} items, seed {self.seed}, {self.how()}"
        return judge_items(
            model, self.items(), task=self.name, protocol=protocol, notes=self.notes(), batch_size=batch_size, progress=progress
        )
