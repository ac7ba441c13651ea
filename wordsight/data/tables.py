"""Tables (CSV, TSV, Parquet, JSON Lines) with a column of picture paths and one or several columns of captions.

Rows with the same picture are one sample with several captions. Relative paths are resolved against the table's folder.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wordsight.data.errors import BadSampleError
from wordsight.data.shards import MAX_IMAGE_BYTES, clean_captions
from wordsight.types import BadSample, Sample

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
IMAGE_COLUMNS = ("image", "image_path", "path", "filepath", "file_path", "filename", "file_name", "file", "img", "img_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title", "sentence", "sentences", "description")
LABEL_COLUMNS = ("label", "class", "class_name", "category")


def read_file(path: Path, key: str) -> bytes:
    """A picture's bytes; raises BadSampleError where there is no such file or it is no file."""
    try:
        if not path.is_file():
            raise BadSampleError(key, "is no file" if path.exists() else "does not exist")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise BadSampleError(key, f"is too large: {path.stat().st_size:,} bytes, {MAX_IMAGE_BYTES:,} are allowed")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadSampleError(key, f"can't be read: {getattr(error, 'strerror', None) or error}") from error


class TableSource:
    """Samples in a table, in order of the first row of each picture.

    Args:
        path: a .csv, .tsv, .parquet or .jsonl file.
        image_column: the column of paths; None finds it by its name (`IMAGE_COLUMNS`).
        caption_columns: one or several columns of texts or lists of texts; None takes those known by name (`CAPTION_COLUMNS`).
        label_column: the column of class names; None takes it where there is one by a known name (`LABEL_COLUMNS`).
        weight_column: the column of the samples' weights (of a picture with several rows, the first one's); None: none.
        negatives_column: the column of texts, or lists of texts, that are wrong for the picture; None: none.
        root: the folder that relative paths start from; None is the table's own.

    Raises:
        ValueError: no such column, or a table that can't be parsed.
    """

    def __init__(
        self,
        path: Path,
        *,
        image_column: str | None = None,
        caption_columns: Sequence[str] | None = None,
        label_column: str | None = None,
        weight_column: str | None = None,
        negatives_column: str | None = None,
        root: Path | None = None,
    ) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.bad: list[BadSample] = []
        self._root = root if root is not None else path.parent
        table = read_table(path, self.bad)
        columns = table.column_names
        image = image_column if image_column is not None else _known(columns, IMAGE_COLUMNS, path, "image_column")
        if isinstance(caption_columns, str):
            caption_columns = (caption_columns,)
        captions = list(caption_columns) if caption_columns is not None else [c for c in columns if c.lower() in CAPTION_COLUMNS]
        labels = [label_column] if label_column is not None else [c for c in columns if c.lower() in LABEL_COLUMNS][:1]
        further = [column for column in (weight_column, negatives_column) if column is not None]
        for column in (image, *captions, *labels, *further):
            if column not in columns:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(columns)}")
        if not captions and not labels:
            raise ValueError(f"{path} has no column of captions; name it with caption_columns=(...). It has {', '.join(columns)}")
        paths = pc.cast(table[image], pa.large_string()).combine_chunks()
        paths = pc.if_else(pc.equal(paths, ""), None, paths)
        coded = paths.dictionary_encode()
        self._paths = coded.dictionary
        codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(codes < 0):
            self.bad.append(BadSample(f"{path.name}:row {row + 1}", "has no picture path"))
        rows = np.argsort(codes, kind="stable")
        self._rows = rows[np.searchsorted(codes[rows], 0) :]
        self._starts = np.searchsorted(codes[self._rows], np.arange(len(self._paths) + 1))
        self._captions = [table[column] for column in captions]
        self._labels = table[labels[0]] if labels else None
        self._weights = table[weight_column] if weight_column is not None else None
        self._negatives = table[negatives_column] if negatives_column is not None else None
        self.part_sizes = [len(self)]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; raises BadSampleError where the file can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        name = self._paths[index].as_py()
        data = read_file(self._root / name, name)
        rows = [int(row) for row in self._rows[self._starts[index] : self._starts[index + 1]]]
        texts = [text for row in rows for column in self._captions for text in _as_list(column[row].as_py())]
        label = self._labels[rows[0]].as_py() if self._labels is not None else None
        meta: dict[str, Any] = {}
        if self._weights is not None:
            meta["weight"] = self._weights[rows[0]].as_py()
        if self._negatives is not None:
            meta["negatives"] = [text for row in rows for text in _as_list(self._negatives[row].as_py())]
        return Sample(name, data, clean_captions(texts), None if label is None else str(label), meta)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_table(path: Path, bad: list[BadSample]) -> pa.Table:
    """A table by its ending, one of `TABLE_SUFFIXES`; damaged rows are left out and added to `bad`.

    Raises:
        ValueError: it can't be parsed.
    """
    return _READERS[path.suffix.lower()](path, bad)


def _known(columns: Sequence[str], known: Sequence[str], path: Path, option: str) -> str:
    for name in known:
        for column in columns:
            if column.lower() == name:
                return column
    raise ValueError(f"{path} has no column known to hold picture paths; name it with {option}=... It has {', '.join(columns)}")


def _read_csv(path: Path, bad: list[BadSample]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv as pa_csv

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file, delimiter=delimiter), [])
    if not header:
        raise ValueError(f"{path} is empty: its first line must name the columns")

    def skip(row: Any) -> str:
        bad.append(BadSample(f"{path.name}:line {row.number}", f"has {row.actual_columns} columns, not {row.expected_columns}"))
        return "skip"

    try:
        return pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(use_threads=False),  # rows are numbered only so
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(column_types={name: pa.large_string() for name in header}),
        )
    except pa.ArrowException as error:
        raise ValueError(f"{path} can't be read as a table: {error}") from error


def _read_parquet(path: Path, bad: list[BadSample]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be read as Parquet: {error}") from error


def _read_jsonl(path: Path, bad: list[BadSample]) -> pa.Table:
    """Line by line, so that one damaged line costs one sample and columns may hold a text in one line and a list in another."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("it is no object")
            except (ValueError, RecursionError) as error:
                bad.append(BadSample(f"{path.name}:line {number}", f"is no JSON object: {error}"))
                continue
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    if not names:
        raise ValueError(f"{path} holds no JSON object; each line must be one, with a picture path and captions")
    lists = {name for name in names if any(isinstance(row.get(name), list) for row in rows)}
    columns: dict[str, pa.Array] = {}
    for name in names:
        if name in lists:
            columns[name] = pa.array([_strings(row.get(name)) for row in rows], pa.large_list(pa.large_string()))
        else:
            columns[name] = pa.array([_string(row.get(name)) for row in rows], pa.large_string())
    return pa.table(columns)


def _string(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


def _strings(value: Any) -> list[str] | None:
    if value is None:
        return None
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else [str(value)]


_READERS = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
