"""How much each picture counts where it is learned from: of labels that may be wrong. A column of a table, or a table of its own.

A weight is a finite number, 0 or more; 1 is usual, and 0 is as if the picture were not there. Weights are of training pictures:
what is chosen and judged by counts every picture alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from wordsight.data.few_shot import NAMED, LabelledSet, Splits
from wordsight.data.tables import IMAGE_COLUMNS, TABLE_SUFFIXES, read_table
from wordsight.types import BadSample

WEIGHT_COLUMNS = ("weight",)


class UnknownPicturesError(ValueError):
    """Pictures that were given weights and that the data do not have; the message shows the first ones.

    Attributes:
        unknown: all of them, as they were given.
    """

    def __init__(self, message: str, unknown: Sequence[str]) -> None:
        super().__init__(message)
        self.unknown = tuple(unknown)


def read_weights(path: Path) -> dict[str, float]:
    """A table with a picture's path and weight in each row.

    Args:
        path: .csv, .tsv, .parquet or .jsonl, with a column path (image, filename, ...) and a column weight.

    Returns:
        path -> weight.

    Raises:
        ValueError: no such columns or rows, weights that are none, a picture listed twice; it names the first ten.
    """
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"weights are a table of paths and weights, {', '.join(TABLE_SUFFIXES)}; got {path}")
    bad: list[BadSample] = []
    table = read_table(path, bad)
    columns = {name.lower(): name for name in reversed(table.column_names)}
    chosen = [next((columns[name] for name in known if name in columns), None) for known in (IMAGE_COLUMNS, WEIGHT_COLUMNS)]
    if None in chosen:
        raise ValueError(f"{path} needs a column path and a column weight; it has {', '.join(table.column_names)}")
    found: dict[str, float] = {}
    problems = [f"{one.key} {one.reason}" for one in bad]
    rows = zip(*(table[name].to_pylist() for name in chosen), strict=True)
    for number, (picture, cell) in enumerate(rows, start=1):
        weight = weight_of(cell)
        key = PurePosixPath("" if picture is None else str(picture).strip()).as_posix()
        if key == ".":
            problems.append(f"row {number} has no path")
        elif weight is None:
            problems.append(not_a_weight(f"row {number}", cell))
        elif key in found:
            problems.append(f"row {number}: {key} is listed more than once")
        else:
            found[key] = weight
    if problems:
        first = "".join(f"\n  {line}" for line in problems[:NAMED])
        raise ValueError(f"{path} has {len(problems)} rows that can't be used:{first}\nMend or remove them.")
    if not found:
        raise ValueError(f"{path} has no rows under its column names")
    return found


def weight_of(cell: Any) -> float | None:
    """What a cell of a table means; None where it is no weight."""
    try:
        weight = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        return None
    return weight if math.isfinite(weight) and weight >= 0 else None


def not_a_weight(where: str, cell: Any) -> str:
    """What to say of such a cell."""
    return f"{where} has the weight {cell!r:.40}; a weight is a finite number, 0 or more"


def weigh(splits: Splits, weights: Mapping[str, float], where: str | Path) -> Splits:
    """The splits with weights of their training pictures; those of weight 0 are left out, those that are not named weigh 1.

    Args:
        splits: without weights.
        weights: picture -> weight, the pictures as `LabelledSet.keys` has them.
        where: what gave the weights, for errors and notes.

    Raises:
        UnknownPicturesError: pictures that the data do not have.
        ValueError: no train split, weights there already, or no training picture that counts.
    """
    parts = splits.parts()
    known = {key for part in parts.values() for key in part.keys}
    if unknown := [key for key in weights if key not in known]:
        first = "".join(f"\n  {key}" for key in unknown[:NAMED])
        example = next(iter(parts.values())).keys[0]
        told = f"{len(unknown)} of the {len(weights)} pictures that {where} weighs are not in {splits.name}:{first}"
        raise UnknownPicturesError(f"{told}\nWrite them as the data do, such as {example}; or remove them", unknown)
    train = splits.train
    if train is None:
        raise ValueError(f"{splits.name} has no train split whose pictures could be weighed")
    if train.weights is not None:
        raise ValueError(f"the pictures of {splits.name} have weights already, of their table: give one or the other")
    elsewhere = {key for part, given in parts.items() if part != "train" for key in given.keys}
    notes = []
    if odd := sum(weights[key] != 1 for key in elsewhere & weights.keys()):
        notes.append(f"{where} weighs {odd} pictures of val and test: there every picture counts alike")
    of_row = [weights.get(key, 1.0) for key in train.keys]
    if all(weight == 1 for weight in of_row):
        return replace(splits, notes=(*splits.notes, *notes))
    kept = [i for i, weight in enumerate(of_row) if weight > 0]
    if not kept:
        raise ValueError(f"all {len(train)} training pictures of {splits.name} have weight 0: there is nothing to learn from")
    weighed, left_out = train.select(kept), len(train) - len(kept)
    if any(of_row[i] != 1 for i in kept):
        weighed = replace(weighed, weights=tuple(of_row[i] for i in kept))
    told = f"training pictures are weighed by {where}: {left_out} of {len(train)} have weight 0 and are left out"
    return replace(splits, train=weighed, notes=(*splits.notes, f"{told}; the weights sum to {math.fsum(of_row):.6g}", *notes))


def without_weights(pictures: LabelledSet) -> LabelledSet:
    """The same pictures, each counting alike: to choose and to judge by."""
    return pictures if pictures.weights is None else replace(pictures, weights=None)
