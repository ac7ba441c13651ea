"""Labelled pictures of which it is known where they come from: GeoDE, Dollar Street, and any table with columns of groups.

- **GeoDE** (arXiv 2301.02560): `geode/index.csv` with columns `file_path, object, region` beside `geode/images`; 40 objects, six
  regions.
- **Dollar Street** (Gaviria Rojas et al., NeurIPS 2022): `dataset_dollarstreet/images_v2_imagenet_test.csv`, or `images_v2.csv`,
  with columns `imageRelPath, country.name, region.id, income` and the labels: lists of `imagenet_synonyms`, else of `topics`. A
  picture of several labels is right with any of them. Income is in dollars a month; its quartiles are those of the pictures read.

Columns are those that public programs read from the published files; the files themselves were not at hand.

Shape legend: N pictures, C classes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from wordsight.data.few_shot import NAMED
from wordsight.data.listed import ListedSource, is_inside
from wordsight.data.sources import Source
from wordsight.data.tables import IMAGE_COLUMNS, LABEL_COLUMNS, TABLE_SUFFIXES, read_table
from wordsight.types import BadSample

GEODE, DOLLAR_STREET = "geode", "dataset_dollarstreet"
_DOLLAR_STREET_TABLES = ("images_v2_imagenet_test.csv", "images_v2.csv")
QUARTILES = ("Q1 poorest", "Q2", "Q3", "Q4 richest")


@dataclass(frozen=True, kw_only=True)
class GroupedSet:
    """Labelled pictures with the groups that they belong to.

    Attributes:
        name: what reports call it.
        source: the N pictures.
        labels: of each picture, one or more right classes.
        classes: the C class names, sorted.
        groups: what is grouped by -> the group of each picture; None where it is not known.
        notes: what a reader should know.
    """

    name: str
    source: Source
    labels: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    groups: Mapping[str, tuple[str | None, ...]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.source) == len(self.labels) or any(len(one) != len(self.labels) for one in self.groups.values()):
            raise ValueError(
                f"{self.name}: {len(self.source)} pictures, each has labels and a group by each of {list(self.groups)}"
            )
        if not self.groups:
            raise ValueError(f"{self.name} has no groups: name a column of them")


def geography_needs(name: str, root: str | Path) -> tuple[tuple[Path, str], ...]:
    """(path, what to put there) of what `open_geode` ("geode") or `open_dollar_street` ("dollar_street") reads."""
    if name == "geode":
        folder = Path(root) / GEODE
        return (folder / "index.csv", "GeoDE's index.csv"), (folder / "images", "GeoDE's pictures, as index.csv lists them")
    if name == "dollar_street":
        folder = Path(root) / DOLLAR_STREET
        table = next(
            (folder / file for file in _DOLLAR_STREET_TABLES if (folder / file).exists()), folder / _DOLLAR_STREET_TABLES[0]
        )
        return (table, f"Dollar Street's {' or '.join(_DOLLAR_STREET_TABLES)}"), (folder / "assets", "Dollar Street's pictures")
    raise ValueError(f"no geographic set {name!r}: there are geode, dollar_street")


def open_geode(root: str | Path) -> GroupedSet:
    """GeoDE by region; objects are named with spaces for underscores.

    Raises:
        FileNotFoundError: it is not complete under `root`.
        ValueError: rows that can't be used.
    """
    (table, _), (images, _) = _complete("geode", "GeoDE", root)
    return read_grouped(
        table,
        group_columns=("region",),
        path_column="file_path",
        label_column="object",
        root=images,
        name="GeoDE",
        spell=lambda label: label.replace("_", " "),
    )


def open_dollar_street(root: str | Path, *, label_column: str | None = None) -> GroupedSet:
    """Dollar Street by quartile of income, by region and by country.

    Args:
        root: the folder of all data sets.
        label_column: "imagenet_synonyms" or "topics"; None: the first of them that the table has.

    Raises:
        FileNotFoundError: it is not complete under `root`.
        ValueError: rows that can't be used, an income that is no number.
    """
    (table, _), _ = _complete("dollar_street", "Dollar Street", root)
    columns = read_table(table, []).column_names
    label = label_column or next((name for name in ("imagenet_synonyms", "topics") if name in columns), "topics")
    found = read_grouped(
        table,
        group_columns=("income", "region.id", "country.name"),
        path_column="imageRelPath",
        label_column=label,
        name="Dollar Street",
    )
    quartiles, limits = _quartiles(found.groups["income"], table)
    groups = {"income": quartiles, "region": found.groups["region.id"], "country": found.groups["country.name"]}
    told = f"income quartiles of these pictures end at {', '.join(f'{limit:g}' for limit in limits)} dollars a month"
    return GroupedSet(
        name=found.name,
        source=found.source,
        labels=found.labels,
        classes=found.classes,
        groups=groups,
        notes=(*found.notes, f"labels are of the column {label}; any of a picture's is right", told),
    )


def read_grouped(
    path: str | Path,
    *,
    group_columns: Sequence[str],
    path_column: str | None = None,
    label_column: str | None = None,
    root: str | Path | None = None,
    name: str | None = None,
    spell: Callable[[str], str] = str,
) -> GroupedSet:
    """Any table with a picture's path, its label or labels, and groups in each row.

    Args:
        path: .csv, .tsv, .parquet or .jsonl.
        group_columns: columns of groups; an empty cell is an unknown group.
        path_column, label_column: None finds them by their names (path, image, ...; label, class, ...). A label cell may be a
            list, also one written as text: `["stove", "hob"]`.
        root: the folder that relative paths start from; None: the table's own.
        name: what reports call it; None: the table's name.
        spell: how a label is written.

    Raises:
        FileNotFoundError: no such table.
        ValueError: no such columns, rows without path or label, a path that leads out of `root`, a picture listed twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}")
    if not path.name.lower().endswith(TABLE_SUFFIXES):
        raise ValueError(f"{path} is no table ({', '.join(TABLE_SUFFIXES)})")
    bad: list[BadSample] = []
    table = read_table(path, bad)
    columns = table.column_names
    picture_column = path_column or _known(columns, IMAGE_COLUMNS, path, "path_column")
    label_column = label_column or _known(columns, LABEL_COLUMNS, path, "label_column")
    for column in (picture_column, label_column, *group_columns):
        if column not in columns:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(columns)}")
    pictures, labels = _usable(path, bad, table[picture_column].to_pylist(), table[label_column].to_pylist(), spell)
    rows = [(PurePosixPath(picture).as_posix(), one[0]) for picture, one in zip(pictures, labels, strict=True)]
    return GroupedSet(
        name=name or path.stem,
        source=ListedSource(Path(root) if root is not None else path.parent, rows),
        labels=tuple(labels),
        classes=tuple(sorted({label for one in labels for label in one})),
        groups={column: tuple(_group(cell) for cell in table[column].to_pylist()) for column in group_columns},
    )


def _usable(
    path: Path, bad: Sequence[BadSample], paths: Sequence[Any], cells: Sequence[Any], spell: Callable[[str], str]
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Each row's path and labels, or an error that lists the rows that can't be used."""
    problems = [f"{one.key} {one.reason}" for one in bad]
    pictures, labels, seen = [], [], set()
    for number, (picture, cell) in enumerate(zip(paths, cells, strict=True), 1):
        one = tuple(dict.fromkeys(spell(label) for label in _labels(cell)))
        text = "" if picture is None else str(picture).strip()
        if not text or not one:
            problems.append(f"row {number} has no {'label' if text else 'path'}")
        elif not is_inside(text):
            problems.append(f"row {number}: refused path {text!r}; paths are relative and stay in the folder of pictures")
        elif text in seen:
            problems.append(f"row {number} lists {text} again")
        seen.add(text)
        pictures.append(text)
        labels.append(one)
    if problems:
        first = "".join(f"\n  {line}" for line in problems[:NAMED])
        raise ValueError(f"{path} has {len(problems)} rows that can't be used:{first}\nMend or remove them.")
    if not pictures:
        raise ValueError(f"{path} has no rows under its column names")
    return pictures, labels


def _complete(name: str, title: str, root: str | Path) -> tuple[tuple[Path, str], ...]:
    needs = geography_needs(name, root)
    if missing := [(path, what) for path, what in needs if not path.exists()]:
        told = "".join(f"\n  {path}: {what}" for path, what in missing)
        raise FileNotFoundError(f"{title} is not complete under {root}; missing:{told}")
    return needs


def _known(columns: Sequence[str], known: Sequence[str], path: Path, option: str) -> str:
    found = next((column for name in known for column in columns if column.lower() == name), None)
    if found is None:
        raise ValueError(
            f"{path} has no column called one of {', '.join(known)}: name it by {option}. It has {', '.join(columns)}"
        )
    return found


def _labels(cell: Any) -> list[str]:
    """The labels in a cell: one, a list, or a list as text."""
    if isinstance(cell, str) and cell.strip().startswith("["):
        try:
            cell = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            cell = [cell]  # a label may begin with a bracket
    given = cell if isinstance(cell, (list, tuple)) else [cell]
    return [str(label).strip() for label in given if label is not None and str(label).strip()]


def _group(cell: Any) -> str | None:
    text = "" if cell is None else str(cell).strip()
    return text or None


def _quartiles(incomes: Sequence[str | None], table: Path) -> tuple[tuple[str | None, ...], list[float]]:
    """The quarter of the pictures that each income lies in, equal ones in one quarter; and where the first three end."""
    values = []
    for number, income in enumerate(incomes, start=1):
        try:
            values.append(np.nan if income is None else float(income))
        except ValueError:
            raise ValueError(f"{table}, row {number}: the income {income!r} is no number") from None
    known = np.array(values)[np.isfinite(values)]
    if not len(known):
        raise ValueError(f"{table} has no income at all")
    limits = np.quantile(known, [0.25, 0.5, 0.75])
    return tuple(QUARTILES[int(np.searchsorted(limits, v))] if np.isfinite(v) else None for v in values), limits.tolist()
