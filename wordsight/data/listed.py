"""Labelled pictures as people keep them: class folders, tables with path and label, split files. All listing is sorted.

A split file is CoOp's `split_zhou_*.json`: {"train": [[path, class index, class name], ...], "val": ..., "test": ...}, the paths
relative to a folder of pictures.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from wordsight.data.few_shot import NAMED, LabelledSet, Splits
from wordsight.data.shards import IMAGE_SUFFIXES
from wordsight.data.tables import IMAGE_COLUMNS, LABEL_COLUMNS, read_file, read_table
from wordsight.data.weights import WEIGHT_COLUMNS, not_a_weight, weigh, weight_of
from wordsight.types import BadSample, Sample

PARTS = ("train", "val", "test")
PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_COLUMNS = ("split", "subset", "fold")
_PICTURES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)

Row = tuple[str, str]  # a picture's path under the root, its class


class MissingPicturesError(FileNotFoundError):
    """Listed pictures that are not there; the message shows the first ones.

    Attributes:
        missing: the paths of all of them, as they are listed.
    """

    def __init__(self, message: str, missing: Sequence[str]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class ListedSource:
    """Pictures by their paths under a folder, in the order given.

    Args:
        root: the folder that relative paths start from.
        rows: path and class of each picture.
    """

    def __init__(self, root: Path, rows: Sequence[Row]) -> None:
        self.bad: list[BadSample] = []
        self.part_sizes = [len(rows)]
        self._root = root
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self._root / self._rows[index][0]

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; raises BadSampleError where the file can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        name, label = self._rows[index]
        return Sample(name, read_file(self._root / name, name), (), label)


def listed_set(root: Path, rows: Iterable[Row], classes: Sequence[str]) -> LabelledSet:
    """A labelled set of the pictures at `rows`, sorted by class index, then by path."""
    place = {name: i for i, name in enumerate(classes)}
    ordered = sorted(rows, key=lambda row: (place[row[1]], row[0]))
    return LabelledSet(
        source=ListedSource(root, ordered),
        keys=tuple(path for path, _ in ordered),
        labels=tuple(label for _, label in ordered),
        classes=tuple(classes),
    )


def listed_splits(
    name: str, root: Path, rows: Mapping[str, Iterable[Row]], classes: Sequence[str], notes: Sequence[str] = ()
) -> Splits:
    """Splits of the pictures listed for each; one without a picture is none."""
    found = {part: listed_set(root, given, classes) for part, given in rows.items()}
    train, val, test = (found[part] if len(found.get(part, ())) else None for part in PARTS)
    return Splits(name=name, classes=tuple(classes), train=train, val=val, test=test, notes=tuple(notes))


def require_pictures(root: Path, splits: Splits, how: str) -> Splits:
    """The splits, once every picture they list is known to be there; each folder is listed once.

    Raises:
        MissingPicturesError: pictures that are not there, with their number, the first ones, and `how` to mend it.
    """
    keys = [key for part in splits.parts().values() for key in part.keys]
    there: dict[str, set[str]] = {}
    missing = []
    for key in keys:
        folder, _, name = key.rpartition("/")
        if folder not in there:
            path = root / folder if folder or not key.startswith("/") else Path("/")
            there[folder] = set(os.listdir(path)) if path.is_dir() else set()
        if name not in there[folder]:
            missing.append(key)
    if missing:
        first = "".join(f"\n  {root / key}" for key in missing[:NAMED])
        told = f"{len(missing)} of the {len(keys)} pictures of {splits.name} are missing:{first}\n{how}"
        raise MissingPicturesError(told, missing)
    return splits


# ----------------------------------------------------------------------------------------------------------------- folders


def folders_in(folder: Path) -> list[str]:
    """The names of the sub-folders, links to folders included, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def pictures_in(root: Path, folder: str) -> Iterator[str]:
    """The pictures in `root/folder` and below, as paths under `root`."""
    for path, below, files in os.walk(root / folder):
        below[:] = [name for name in below if not name.startswith(".")]
        start = Path(path).relative_to(root)
        for name in files:
            if name.lower().endswith(_PICTURES) and not name.startswith("."):
                yield (start / name).as_posix()


def class_folders(root: Path, under: str = "") -> list[Row]:
    """Every picture of `root/under/<class>/`, its class the folder's name."""
    return [(path, name) for name in folders_in(root / under) for path in pictures_in(root, f"{under}/{name}" if under else name)]


def read_folder(root: Path) -> Splits:
    """Class folders, or class folders in folders named train, val (valid, validation) and test.

    Without such folders all pictures are for training.

    Raises:
        ValueError: no pictures in class folders, or split folders beside others.
    """
    found = folders_in(root)
    named = {PART_NAMES[name.lower()]: name for name in found if name.lower() in PART_NAMES}
    is_split = "train" in named and bool(folders_in(root / named["train"]))  # a class may be called "train" too
    if is_split and len(named) < len(found):
        others = [name for name in found if name not in named.values()]
        raise ValueError(
            f"{root} holds split folders ({', '.join(sorted(named.values()))}) and beside them {', '.join(others[:NAMED])}. Keep "
            "either class folders, or train, val and test with class folders in each"
        )
    folders = {part: named[part] for part in PARTS if part in named} if is_split else {"train": ""}
    rows = {part: class_folders(root, under) for part, under in folders.items()}
    loose = [name for under in folders.values() for name in _pictures_beside(root / under)]
    if not any(rows.values()):
        raise ValueError(f"no pictures in class folders under {root}: expected {root}/<class>/<picture>.jpg")
    notes = []
    if loose:
        notes.append(f"{len(loose)} pictures lie in no class folder and are not used: {', '.join(loose[:NAMED])}")
    return _own_splits(root.resolve().name, root, rows, notes)


def _pictures_beside(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(_PICTURES) and (folder / name).is_file())


def _own_splits(name: str, root: Path, rows: Mapping[str, list[Row]], notes: Sequence[str] = ()) -> Splits:
    """Splits of one's own data: the classes are all labels, sorted."""
    return listed_splits(name, root, rows, sorted({label for part in rows.values() for _, label in part}), notes)


# ------------------------------------------------------------------------------------------------------------------ tables


def read_split_table(path: Path, root: Path | None = None) -> Splits:
    """A table with a picture's path and label in each row, and its split where there is a column for that.

    Args:
        path: .csv, .tsv, .parquet or .jsonl. Columns are found by name: path (image, filename, ...), label (class, ...), split,
            weight (how much a training picture counts, see `weights`; 1 where the cell is empty).
        root: the folder that relative paths start from; None: the table's own.

    Raises:
        ValueError: no such columns, damaged or incomplete rows, an unknown split, a weight that is none, a picture listed twice.
        FileNotFoundError: pictures that are not there.
    """
    bad: list[BadSample] = []
    table = read_table(path, bad)
    columns = {name: _column(table.column_names, known) for name, known in _COLUMNS.items()}
    for name in ("path", "label"):
        if columns[name] is None:
            known = ", ".join(_COLUMNS[name])
            raise ValueError(f"{path} has no column of {name}s: call it one of {known}. It has {', '.join(table.column_names)}")
    cells = {name: [_text(c) for c in table[column].to_pylist()] for name, column in columns.items() if column is not None}
    splits, given = cells.get("split", ["train"] * table.num_rows), cells.get("weight", [""] * table.num_rows)
    rows: dict[str, list[Row]] = {part: [] for part in PARTS}
    weights: dict[str, float] = {}
    problems = [f"{one.key} {one.reason}" for one in bad]
    for number, (picture, label, split, cell) in enumerate(
        zip(cells["path"], cells["label"], splits, given, strict=True), start=1
    ):
        weight = weight_of(cell or 1.0)
        if not picture or not label:
            problems.append(f"row {number} has no {'label' if picture else 'path'}")
        elif split.lower() not in PART_NAMES:
            problems.append(f"row {number} is in split {split!r}; known are {', '.join(PART_NAMES)}")
        elif weight is None:
            problems.append(not_a_weight(f"row {number}", cell))
        else:
            rows[PART_NAMES[split.lower()]].append((PurePosixPath(picture).as_posix(), label))
            weights[rows[PART_NAMES[split.lower()]][-1][0]] = weight
    if problems:
        first = "".join(f"\n  {line}" for line in problems[:NAMED])
        raise ValueError(f"{path} has {len(problems)} rows that can't be used:{first}\nMend or remove them.")
    if not table.num_rows:
        raise ValueError(f"{path} has no rows under its column names")
    _refuse_repeats(path, rows)
    start = root if root is not None else path.parent
    how = f"Paths in {path} start from {start}; give another folder as root, or mend the rows"
    found = require_pictures(start, _own_splits(path.stem, start, rows), how)
    return weigh(found, weights, f"the weight column of {path.name}") if columns["weight"] is not None else found


_COLUMNS = {"path": IMAGE_COLUMNS, "label": LABEL_COLUMNS, "split": SPLIT_COLUMNS, "weight": WEIGHT_COLUMNS}


def _column(columns: Sequence[str], known: Sequence[str]) -> str | None:
    return next((column for name in known for column in columns if column.lower() == name), None)


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _refuse_repeats(path: Path, rows: dict[str, list[Row]]) -> None:
    """A picture in two splits leaks, a picture with two labels is a mistake, and one listed twice counts double."""
    where: dict[str, list[str]] = defaultdict(list)
    for part, found in rows.items():
        for picture, label in found:
            where[picture].append(f"{part} as {label!r}")
    if repeated := {picture: places for picture, places in where.items() if len(places) > 1}:
        first = "".join(f"\n  {picture}: {', '.join(places)}" for picture, places in list(repeated.items())[:NAMED])
        raise ValueError(f"{path} lists {len(repeated)} pictures more than once:{first}\nKeep each in one split, with one label.")


# ------------------------------------------------------------------------------------------------------------- split files


def read_split_file(path: Path, root: Path | None = None, *, name: str | None = None) -> Splits:
    """CoOp's `split_zhou_*.json`, or one's own in that format. The classes are in the order of their indices.

    Args:
        path: the file.
        root: the folder that its paths start from; None: the file's own.
        name: what reports call the data set; None: the file's name.

    Raises:
        ValueError: another format, indices that leave one out, an index with two names or a name with two indices, a path that
            leads out of `root`, a picture listed twice.
        FileNotFoundError: pictures that are not there.
    """
    start = root if root is not None else path.parent
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not content or not set(content) <= set(PARTS):
        found = ", ".join(map(repr, list(content)[:NAMED])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} is no split file: expected {{"train": [...], "val": [...], "test": [...]}}, found {found}')
    rows: dict[str, list[Row]] = {}
    names: dict[int, str] = {}
    for part, items in content.items():
        rows[part] = [_split_row(path, part, i, item, names) for i, item in enumerate(_list(path, part, items))]
    if sorted(names) != list(range(len(names))):
        missing = next(i for i in range(len(names)) if i not in names)
        raise ValueError(f"{path} has {len(names)} classes with indices up to {max(names)}, but none has index {missing}")
    if twice := [label for label, count in Counter(names.values()).items() if count > 1]:
        indices = [index for index, label in names.items() if label == twice[0]]
        raise ValueError(f"{path} calls several classes {twice[0]!r}: indices {', '.join(map(str, indices))}; rename them")
    _refuse_repeats(path, rows)
    if not names:
        raise ValueError(f"{path} lists no picture")
    splits = listed_splits(name or path.stem, start, rows, [names[i] for i in range(len(names))])
    return require_pictures(start, splits, f"Paths in {path} start from {start}; give another folder as root")


def _list(path: Path, part: str, items: Any) -> list[Any]:
    if not isinstance(items, list):
        raise ValueError(f"{path}: {part!r} must be a list of [path, class index, class name], not {type(items).__name__}")
    return items


def _split_row(path: Path, part: str, number: int, item: Any, names: dict[int, str]) -> Row:
    where = f"{path}: {part}[{number}]"
    if not (isinstance(item, list) and len(item) == 3 and isinstance(item[0], str) and isinstance(item[2], str)):
        raise ValueError(f"{where} is {str(item)[:100]}, not [path, class index, class name]")
    picture, index, label = item
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"{where} has class index {index!r}; indices are integers from 0")
    if not is_inside(picture):
        raise ValueError(f"{where}: refused path {picture!r}; paths are relative and stay in the folder of pictures")
    if names.setdefault(index, label) != label:
        raise ValueError(f"{where}: class index {index} is called {names[index]!r} and {label!r}")
    return PurePosixPath(picture).as_posix(), label


def is_inside(path: str) -> bool:
    """Whether a path is relative and stays below its start, as POSIX and as Windows read it."""
    if not path or "\0" in path or path[0] in "/\\" or path[1:2] == ":":  # strings: pathlib takes 10 s for iNaturalist's paths
        return False
    return ".." not in path.replace("\\", "/").split("/")


def write_split_file(splits: Splits, path: Path) -> None:
    """Write the splits in the format of `split_zhou_*.json`; the paths are the pictures' keys, class indices those of `classes`.

    Raises:
        ValueError: a key that is no path under one folder, or a class without a picture, for which the format has no place.
    """
    used = {label for given in splits.parts().values() for label in given.labels}
    if empty := [label for label in splits.classes if label not in used]:
        raise ValueError(f"a split file can't hold classes without pictures, such as {empty[0]!r}: leave them out by splits.only")
    content: dict[str, list[Any]] = {}
    for part in PARTS:
        given = splits.parts().get(part)
        if given is None:
            content[part] = []
            continue
        if outside := [key for key in given.keys if not is_inside(key)]:
            raise ValueError(f"a split file holds relative paths only; {outside[0]!r} is none")
        content[part] = [list(row) for row in zip(given.keys, given.targets(), given.labels, strict=True)]
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(temporary, path)
