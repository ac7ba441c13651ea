"""Folders of Hugging Face `datasets` on disk, read by pyarrow alone: no code of theirs is run, nothing is fetched.

- what `save_to_disk` writes: `state.json` (which names the Arrow files), `dataset_info.json`, `data-00000-of-00001.arrow`; of a
  DatasetDict, a `dataset_dict.json` over a folder a split;
- snapshots of the hub: `data/test-00000-of-00001.parquet`, with pictures inside.

A picture is a struct of bytes and path; the names of the classes are in the schema ("ClassLabel") or beside it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordsight.data.errors import BadSampleError
from wordsight.data.shards import MAX_IMAGE_BYTES, clean_captions
from wordsight.data.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, LABEL_COLUMNS, read_file
from wordsight.types import BadSample, Sample

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("label", "labels", "fine_label", *LABEL_COLUMNS)
PICTURES = (*IMAGE_COLUMNS, "pixel_values", "jpg", "jpeg", "png", "webp")


class HfSource:
    """Rows of Arrow or Parquet files with pictures inside.

    Args:
        files: .arrow (streams, or files with a footer) or .parquet, all with the same columns.
        info: `dataset_info.json`'s content, where there is one; else the schema's metadata says what the columns mean.
        image_column, label_column, caption_columns: None finds them by what they are and by their names.

    Attributes:
        bad: none; rows are looked at when they are read.
        part_sizes: rows of each file.
        classes: the names of the classes in their published order; empty where the label is no ClassLabel.
        kind: "multilabel" where a picture has a list of them, else "classification".

    Raises:
        ValueError: a damaged file, no column of pictures, or several and none called as pictures are.
    """

    def __init__(
        self,
        files: Sequence[Path],
        info: dict[str, Any] | None = None,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        caption_columns: Sequence[str] | None = None,
    ) -> None:
        import pyarrow as pa

        self.bad: list[BadSample] = []
        self._files = [_File(path) for path in files]
        schema = self._files[0].schema
        for file in self._files[1:]:
            if file.schema.names != schema.names:
                raise ValueError(f"{file.path} has other columns than {files[0]}: give the files of one data set")
        features = (info or _metadata(schema)).get("features") or {}
        self._image = image_column or _picture_column(files[0], schema, features)
        kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
        single = [field.name for field in schema if not pa.types.is_nested(field.type)]
        labels = [name for name in single if kinds.get(name) == "ClassLabel" or name.lower() in LABELS]
        self._label = label_column or next((name for known in LABELS for name in labels if name.lower() == known), None)
        if self._label is None and len(labels) == 1:
            self._label = labels[0]
        captions = caption_columns if caption_columns is not None else [n for n in schema.names if n.lower() in CAPTION_COLUMNS]
        self._captions = list(captions)
        for column in (self._image, *self._captions, *([self._label] if self._label else [])):
            if column not in schema.names:
                raise ValueError(f"{files[0]} has no column {column!r}; it has {', '.join(schema.names)}")
        names = {name: found for name, feature in features.items() if (found := _listed_names(feature)) is not None}
        if self._label is None and len(names) == 1:
            self._label = next(iter(names))
        self.kind = "multilabel" if self._label in names else "classification"
        names |= {name: features[name].get("names") for name, kind in kinds.items() if kind == "ClassLabel"}
        self.classes = _class_names(files[0], self._label, names.get(self._label or ""))
        self.part_sizes = [file.num_rows for file in self._files]

    def __len__(self) -> int:
        return sum(self.part_sizes)

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded, its classes in `meta["labels"]` where it has several.

        Raises:
            BadSampleError: no picture can be read, or a label is no class.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = index
        for file in self._files:
            if row < file.num_rows:
                break
            row -= file.num_rows
        key = f"{file.path.name}/{row:07d}"
        values = file.row(row, [self._image, *self._captions, *([self._label] if self._label else [])], key)
        image = self._picture(values[self._image], file.path.parent, key)
        texts = [text for column in self._captions for text in _as_list(values[column])]
        label = values.get(self._label or "")
        if self.kind == "multilabel":
            shown = tuple(dict.fromkeys(name for one in _as_list(label) if (name := self._class(one, key)) is not None))
            return Sample(key, image, clean_captions(texts), None, {"labels": shown})
        return Sample(key, image, clean_captions(texts), self._class(label, key))

    def ahead(self, indices: Iterable[int]) -> None:
        """Nothing lies far away."""

    def _picture(self, value: Any, folder: Path, key: str) -> bytes:
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is not None:
            if len(content) > MAX_IMAGE_BYTES:
                raise BadSampleError(key, f"is too large: {len(content):,} bytes, {MAX_IMAGE_BYTES:,} are allowed")
            return bytes(content)
        if not isinstance(path, str) or not path:
            raise BadSampleError(key, "has no picture")
        place = folder / path
        if os.path.isabs(path) or not place.resolve().is_relative_to(folder.resolve()):
            raise BadSampleError(key, f"names a picture outside of its folder, {path[:100]!r}; nothing was read")
        return read_file(place, key)

    def _class(self, value: Any, key: str) -> str | None:
        if value is None or (self.classes and value == -1):  # -1 is how test splits hide their labels
            return None
        if not self.classes:
            return str(value)
        if not isinstance(value, int) or not 0 <= value < len(self.classes):
            raise BadSampleError(key, f"is of class {str(value)[:40]}; there are 0 to {len(self.classes) - 1}")
        return self.classes[value]


class _File:
    """An Arrow or Parquet file: its schema and length, and rows on demand, opened in whatever process asks."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        self._open: Any = None
        self._starts: list[int] = []
        self._group: tuple[int, Any] | None = None  # the last row group of a Parquet file that was read
        try:
            self.schema = self._opened().schema if path.suffix == ".arrow" else self._opened().schema_arrow
            self.num_rows = self._opened().num_rows if path.suffix == ".arrow" else self._opened().metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} can't be read as {path.suffix[1:].title()}: {error}") from error
        self._open = None

    def _opened(self) -> Any:
        import pyarrow as pa
        from pyarrow import parquet

        if self._open is None:
            if self.path.suffix == ".arrow":
                self._open = _arrow_table(self.path)
            else:
                self._open = parquet.ParquetFile(self.path)
                sizes = [self._open.metadata.row_group(i).num_rows for i in range(self._open.num_row_groups)]
                self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        assert isinstance(self._open, (pa.Table, parquet.ParquetFile))
        return self._open

    def row(self, row: int, columns: Sequence[str], key: str) -> dict[str, Any]:
        """The columns of a row, as Python values."""
        import pyarrow as pa

        try:
            table = self._opened()
            if self.path.suffix == ".parquet":
                group = max(i for i, start in enumerate(self._starts) if start <= row)
                if self._group is None or self._group[0] != group:
                    self._group = group, table.read_row_group(group, columns=list(columns))
                table, row = self._group[1], row - self._starts[group]
            return {name: table[name][row].as_py() for name in columns}
        except (pa.ArrowException, OSError) as error:
            raise BadSampleError(key, f"can't be read: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_group": None}


def _arrow_table(path: Path) -> pa.Table:
    """A file of `save_to_disk`, mapped into memory: rows cost no more than themselves."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(mapped).read_all()


# Finding


def find(path: Path) -> tuple[list[Path], dict[str, Any]] | None:
    """(files, dataset_info) where a folder is one of `datasets`; None where it is none.

    Raises:
        ValueError: it has several splits (says which), its lists are damaged, or it is only an index into other files.
        FileNotFoundError: a listed file is missing.
    """
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits")
        known = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        if len(known) != 1:
            raise ValueError(_several(path, [str(path / name) for name in known]))
        return find(_inside(path, known[0]))
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _saved(path)
    files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if not files or not has_pictures(files[0]):
        return None
    splits = {}
    for file in files:
        found = re.match(r"(.+?)-\d+-of-\d+", file.name)
        splits.setdefault(found[1] if found else file.stem, []).append(file)
    if len(splits) > 1:
        raise ValueError(_several(path, [str(own[0].parent / f"{name}*.parquet") for name, own in splits.items()]))
    return files, {}


def _several(path: Path, splits: Sequence[str]) -> str:
    return f"{path} has {len(splits)} splits, and one is read at a time: give one of {', '.join(splits) or 'none'}"


def _saved(path: Path) -> tuple[list[Path], dict[str, Any]]:
    state, info = _json(path / "state.json"), _json(path / "dataset_info.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{path} is an index into other rows: save it again after flatten_indices()")
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise ValueError(f"{path / 'state.json'} names no data files: save the data set again with save_to_disk")
    files = [_inside(path, str(one.get("filename"))) for one in listed]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is listed in {path / 'state.json'} and missing")
    return files, info


def has_pictures(path: Path) -> bool:
    """Whether a Parquet file has pictures inside: a struct of bytes and path, or a column that is said to be an Image."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except (pa.ArrowException, OSError):
        return False  # whoever reads it as a table will say what is wrong
    return bool(_picture_columns(schema, _metadata(schema).get("features") or {}))


def _picture_columns(schema: pa.Schema, features: dict[str, Any]) -> list[str]:
    import pyarrow as pa

    found = []
    for field in schema:
        struct = pa.types.is_struct(field.type) and {"bytes", "path"} <= {
            field.type.field(i).name for i in range(field.type.num_fields)
        }
        feature = features.get(field.name)
        if struct or (isinstance(feature, dict) and feature.get("_type") == "Image"):
            found.append(field.name)
    return found


def _picture_column(path: Path, schema: pa.Schema, features: dict[str, Any]) -> str:
    found = _picture_columns(schema, features)
    if len(found) == 1:
        return found[0]
    known = [own for name in PICTURES for own in found if own.lower() == name]
    if known:
        return known[0]
    what = f"{len(found)} columns of pictures ({', '.join(found)})" if found else "no column of pictures"
    raise ValueError(f"{path} has {what}; name it with DataSource(image_column=...). It has {', '.join(schema.names)}")


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` wrote into a schema: {"features": ...}."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return {}
    info = found.get("info") if isinstance(found, dict) else None
    return info if isinstance(info, dict) else {}


def _listed_names(feature: Any) -> Any:
    """The names of a column of lists of ClassLabel, in the two ways in which `datasets` writes such a one; None for others."""
    if isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
        feature = [feature.get("feature")]
    inner = feature[0] if isinstance(feature, list) and len(feature) == 1 else None
    return inner.get("names") if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" else None


def _class_names(path: Path, label: str | None, names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path}: the classes of {label!r} are no list of names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: the classes of {label!r} have {twice!r} twice; names tell classes apart, so rename one")
    return tuple(names)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _inside(folder: Path, name: str) -> Path:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{folder} lists {name[:100]!r}, which lies outside of it; nothing was read")
    return folder / name


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    return found
