"""Vectors of pictures that were made elsewhere, with their names, labels and captions: a .npy file or a Parquet table.

- `X.npy` [N, D], of floats; its rows are named by `X.npy.names.txt` (as `wordsight embed` writes it), one a line, else numbered;
  `X.npy.labels.txt` has their labels, one a line, an empty line for none.
- `X.parquet` with a column of lists of D floats (`vector`, `embedding`, `features`) and none of paths to pictures, and where it
  has them columns of names (`name`, `key`, `id`), labels and captions.

There are no pictures, so nothing can be shown, and the vectors can't be told from those of another model of the same width.
Shape legend: N pictures, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wordsight.data.errors import BadSampleError
from wordsight.data.shards import clean_captions
from wordsight.data.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, LABEL_COLUMNS
from wordsight.types import BadSample, Sample

if TYPE_CHECKING:
    import pyarrow as pa

VECTORS = ("vector", "vectors", "embedding", "embeddings", "feature", "features", "image_embedding", "image_embeddings")
NAMES = ("name", "key", "__key__", "id", "uid")


class VectorSource:
    """Pictures of which only vectors are there.

    Attributes:
        vectors_ND: float [N, D], finite; a .npy is mapped into memory.
        keys, labels, captions: N of each.
        bad: none. part_sizes: [N].
    """

    def __init__(
        self, vectors_ND: np.ndarray, keys: Sequence[str], labels: Sequence[str | None], captions: Sequence[tuple[str, ...]]
    ) -> None:
        self.vectors_ND = vectors_ND
        self.keys, self.labels, self.captions = tuple(keys), tuple(labels), tuple(captions)
        self.bad: list[BadSample] = []
        self.part_sizes = [len(self)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSampleError: there is no picture."""
        raise BadSampleError(self.keys[index], "is a vector alone, without its picture")

    def ahead(self, indices: Iterable[int]) -> None:
        """Nothing lies far away."""


def holds_vectors(path: Path) -> bool:
    """Whether a file is one of vectors: a .npy, or a Parquet table with a column of lists of floats called as vectors are, and no
    paths to pictures."""
    if path.suffix.lower() == ".npy":
        return True
    if path.suffix.lower() != ".parquet":
        return False
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except (pa.ArrowException, OSError):
        return False  # whoever reads it as a table will say what is wrong
    return _vector_column(schema) is not None and not any(name.lower() in IMAGE_COLUMNS for name in schema.names)


def read_vectors(path: Path) -> VectorSource:
    """The vectors in a file, checked.

    Raises:
        ValueError: no floats in two dimensions, no rows, a row that is not finite (it is named), or other numbers of names or
            labels than rows.
    """
    source = _read_npy(path) if path.suffix.lower() == ".npy" else _read_parquet(path)
    for start in range(0, len(source), 4096):
        finite = np.isfinite(source.vectors_ND[start : start + 4096]).all(axis=1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            raise ValueError(
                f"{path}: the vector of {source.keys[row]!r} (row {row}) is not finite: make it again, or leave it out"
            )
    return source


def _read_npy(path: Path) -> VectorSource:
    try:
        vectors_ND = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} can't be read as an array of numbers: {error}") from error
    if not isinstance(vectors_ND, np.ndarray) or vectors_ND.ndim != 2 or vectors_ND.dtype.kind != "f":
        about = f"{vectors_ND.dtype} {vectors_ND.shape}" if isinstance(vectors_ND, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {about}; vectors are floats of the shape [pictures, width]")
    if not len(vectors_ND):
        raise ValueError(f"{path} has no rows")
    names = _lines(path, "names", len(vectors_ND))
    labels = _lines(path, "labels", len(vectors_ND))
    return VectorSource(
        vectors_ND,
        names or [f"row {row}" for row in range(len(vectors_ND))],
        [label or None for label in labels] if labels is not None else [None] * len(vectors_ND),
        [()] * len(vectors_ND),
    )


def _lines(path: Path, what: str, count: int) -> list[str] | None:
    """The lines of the file beside `path`, one a row; None where it is not there."""
    beside = path.with_name(f"{path.name}.{what}.txt")
    if not beside.is_file():
        return None
    try:
        text = beside.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{beside} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    lines = text.removesuffix("\n").split("\n")
    if len(lines) != count:
        lines = [*lines, ""] if text.endswith("\n") and len(lines) == count - 1 else lines  # the last line is empty, and meant
    if len(lines) != count:
        raise ValueError(f"{beside} has {len(lines)} lines and {path.name} {count} rows; it needs one a row")
    return [line.strip() for line in lines]


def _read_parquet(path: Path) -> VectorSource:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be read as Parquet: {error}") from error
    column = _vector_column(table.schema)
    if column is None:
        raise ValueError(f"{path} has no column of vectors ({', '.join(VECTORS)}); it has {', '.join(table.column_names)}")
    if not table.num_rows:
        raise ValueError(f"{path} has no rows")
    lists = table[column].combine_chunks()
    sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    if lists.null_count or len(set(sizes.tolist())) != 1 or sizes[0] == 0:
        raise ValueError(
            f"{path}: the lists of {column!r} must be of one length, without gaps; got {sorted(set(sizes.tolist()))[:5]}"
        )
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    by_name = {name.lower(): name for name in table.column_names}
    name, label = _first(by_name, NAMES), _first(by_name, LABEL_COLUMNS)
    keys = [str(key) for key in table[name].to_pylist()] if name else [f"row {row}" for row in range(table.num_rows)]
    labels = [None if one is None else str(one) for one in table[label].to_pylist()] if label else [None] * table.num_rows
    texts = [table[by_name[one]].to_pylist() for one in CAPTION_COLUMNS if one in by_name]
    captions = [
        clean_captions([text for value in row for text in (value if isinstance(value, list) else [value])])
        for row in zip(*texts, strict=True)
    ]
    return VectorSource(flat.reshape(table.num_rows, int(sizes[0])), keys, labels, captions or [()] * table.num_rows)


def _first(by_name: dict[str, str], known: Sequence[str]) -> str | None:
    return next((by_name[name] for name in known if name in by_name), None)


def _vector_column(schema: pa.Schema) -> str | None:
    """The column of lists of floats that is called as vectors are."""
    import pyarrow as pa

    def floats(kind: Any) -> bool:
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return lists and pa.types.is_floating(kind.value_type)

    found = {field.name.lower(): field.name for field in schema if floats(field.type)}
    return _first(found, VECTORS)
