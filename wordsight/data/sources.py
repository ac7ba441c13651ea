"""What a user types -> an indexed source of samples: tar shards, tables, class folders, the embedded sample data; folders of
CLIP_benchmark and of Hugging Face `datasets`, files of vectors.

A source has a length, gives sample `i` on demand from any process, and lists what it found damaged while it was indexed.
"""

from __future__ import annotations

import bisect
import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from wordsight.data import clip_benchmark, features_in, hf_folders
from wordsight.data.remote import RemoteConfig, RemoteFiles, expand_url, is_url
from wordsight.data.shards import COMPRESSED, IMAGE_SUFFIXES, ShardSource
from wordsight.data.tables import TABLE_SUFFIXES, TableSource, read_file
from wordsight.types import BadSample, Sample

_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_PICTURES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


class Source(Protocol):
    """An indexed list of samples.

    Attributes:
        bad: what was found damaged while indexing.
        part_sizes: the lengths of consecutive parts that are quickly read one after the other (shards).
    """

    bad: list[BadSample]
    part_sizes: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where samples are and how to read them.

    Attributes:
        path: a shard, table, file of vectors or folder; a glob or brace expansion of shards (`shard-{000..009}.tar`); several of
            them; or `sample:SPLIT` for the embedded data. Shards may be URLs that fsspec reaches (`s3://bucket/{000..009}.tar`,
            `memory://shards/*.tar`, `s3://bucket/shards/` for all in a folder).
        weight: this source's share of every batch, relative to the other sources' (0.1 beside 0.9 is a tenth);
            None for all of them mixes by size. Either every source has a weight or none.
        image_column, caption_columns, label_column: the columns of a table; None finds them by their names.
        root: the folder that a table's relative paths start from; None is the table's own.
        weight_column, negatives_column: the columns of a table that hold a sample's weight in the loss and texts that are wrong
            for its picture (a list, or one text); None: it has none. In shards they are the JSON's "weight" and "negatives".
        name: what the log calls this source; None: its path.
    """

    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    weight: float | None = None
    image_column: str | None = None
    caption_columns: Sequence[str] | None = None
    label_column: str | None = None
    root: str | os.PathLike[str] | None = None
    weight_column: str | None = None
    negatives_column: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"the weight of {self.path} must be above 0, got {self.weight}")


class FolderSource:
    """Pictures in class folders, `root/<class>/**/name.jpg`, sorted by path; the folder's name is the label.

    Pictures that lie in `root` itself have no label.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.bad: list[BadSample] = []
        found = []
        for folder, folders, files in os.walk(root, followlinks=False):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            relative = Path(folder).relative_to(root)
            found += [(relative / name).as_posix() for name in files if _is_picture(name)]
        self._paths = sorted(found)
        self.part_sizes = [len(self._paths)]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; raises BadSampleError where the file can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        name = self._paths[index]
        label = name.split("/", 1)[0] if "/" in name else None
        return Sample(name, read_file(self._root / name, name), (), label)


class ConcatSource:
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.bad = [bad for source in sources for bad in source.bad]
        self.part_sizes = [size for source in sources for size in source.part_sizes]
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; raises BadSampleError where it can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        at = bisect.bisect_right(self._ends, index)
        return self.sources[at][index - (self._ends[at - 1] if at else 0)]

    def ahead(self, indices: Iterable[int]) -> None:
        """Announce samples that will be asked for soon to the sources that read ahead."""
        wanted: dict[int, list[int]] = {}
        for index in indices:
            at = bisect.bisect_right(self._ends, index)
            wanted.setdefault(at, []).append(index - (self._ends[at - 1] if at else 0))
        for at, own in wanted.items():
            read_ahead(self.sources[at], own)


def read_ahead(source: Source, indices: Iterable[int]) -> None:
    """Announce samples that will be asked for soon; nothing where the source lies near."""
    ahead = getattr(source, "ahead", None)
    if ahead is not None:
        ahead(indices)


def remote_files(source: Source) -> list[RemoteFiles]:
    """Who reads from object stores for a source, each once."""
    found = [source.remote] if getattr(source, "remote", None) is not None else []  # type: ignore[attr-defined]
    found += [files for part in getattr(source, "sources", ()) for files in remote_files(part)]
    return list(dict.fromkeys(found))


def open_source(
    what: str | os.PathLike[str] | DataSource | Sequence[str | os.PathLike[str] | DataSource],
    *,
    remote: RemoteFiles | RemoteConfig | None = None,
) -> Source:
    """Index the samples at a path, glob, brace expansion, `sample:SPLIT`, DataSource, or a list of such.

    Args:
        what: see `DataSource.path`. A folder holds tar shards (other files beside them, such as img2dataset's Parquet, are not
            read), pictures in class folders, or is one of CLIP_benchmark (`clip_benchmark`) or of Hugging Face `datasets`
            (`hf_folders`). A .npy, or a Parquet table of vectors, has no pictures (`features_in`).
        remote: how, or through whom, URLs are read; None: by the defaults of `RemoteConfig`.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: it is not of a kind that can be read, or holds no sample.
    """
    files = remote if isinstance(remote, RemoteFiles) else RemoteFiles(remote or RemoteConfig())
    if isinstance(what, DataSource):
        return _open(what, files)
    if isinstance(what, (str, os.PathLike)):
        return _open(DataSource(path=what), files)
    parts = [open_source(one, remote=files) for one in what]
    if not parts:
        raise ValueError("an empty list of sources: name at least one shard, table or folder")
    return parts[0] if len(parts) == 1 else ConcatSource(parts)


def _open(spec: DataSource, files: RemoteFiles) -> Source:
    paths = [spec.path] if isinstance(spec.path, (str, os.PathLike)) else list(spec.path)
    found = [path for one in paths for path in expand(os.fspath(one))]
    if not found:
        raise ValueError("an empty list of paths: name at least one shard, table or folder")
    shards = [path for path in found if _kind(path) == "shard"]
    sources: list[Source]
    if len(shards) == len(found):
        sources = [ShardSource(shards, files)]
    elif all(_is_parquet(path) and hf_folders.has_pictures(Path(path)) for path in found):
        sources = [_hugging_face([Path(path) for path in found], {}, spec)]
    else:
        sources = [_open_one(path, spec, files) for path in found]
    source = sources[0] if len(sources) == 1 else ConcatSource(sources)
    if len(source) == 0:
        first = "".join(f"\n  {bad.key}: {bad.reason}" for bad in source.bad[:10])
        raise ValueError(f"no sample in {spec.path}; pictures end in {', '.join(_PICTURES)}.{first}")
    return source


def _open_one(path: Path | str, spec: DataSource, files: RemoteFiles) -> Source:
    kind = _kind(path)
    if kind == "shard":
        return ShardSource([path], files)
    assert isinstance(path, Path)
    if kind == "vectors" or features_in.holds_vectors(path):
        return features_in.read_vectors(path)
    if kind == "table":
        return TableSource(
            path,
            image_column=spec.image_column,
            caption_columns=spec.caption_columns,
            label_column=spec.label_column,
            weight_column=spec.weight_column,
            negatives_column=spec.negatives_column,
            root=Path(spec.root) if spec.root is not None else None,
        )
    if places := clip_benchmark.find(path):
        return clip_benchmark.ClipBenchmarkSource(*places)
    shards = sorted(path.glob("*.tar")) or sorted(path.glob("*/*.tar"))
    if not shards and (saved := hf_folders.find(path)):
        return _hugging_face(*saved, spec)
    return ShardSource(shards) if shards else FolderSource(path)


def _hugging_face(files: Sequence[Path], info: dict[str, Any], spec: DataSource) -> Source:
    return hf_folders.HfSource(
        files,
        info,
        image_column=spec.image_column,
        label_column=spec.label_column,
        caption_columns=(spec.caption_columns,) if isinstance(spec.caption_columns, str) else spec.caption_columns,
    )


def _is_parquet(path: Path | str) -> bool:
    return isinstance(path, Path) and path.suffix.lower() == ".parquet"


def expand(path: str) -> list[Path | str]:
    """The files that a path, glob or brace expansion stands for; the local ones (Path) exist, URLs (str) may not."""
    if is_url(path):
        return list(expand_url(path))
    if path.startswith("sample:"):
        from wordsight.sample import shards

        return [Path(shard) for shard in shards(path.removeprefix("sample:"))]
    if os.path.exists(path):
        return [Path(path)]
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(path))
    except ValueError as error:
        raise ValueError(f"the braces in {path} don't match: {error}") from error
    found: list[Path | str] = []
    for name in names:
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        if not matches or not os.path.exists(matches[0]):
            raise FileNotFoundError(f"no such file: {name}" + (f" (from {path})" if name != path else ""))
        found += [Path(match) for match in matches]
    return found


def _kind(path: Path | str) -> str:
    """shard, table, vectors or folder."""
    if isinstance(path, Path) and path.is_dir():
        return "folder"
    name = (path.name if isinstance(path, Path) else path.split("?")[0].rsplit("/", 1)[-1]).lower()
    if name.endswith(_COMPRESSED_SUFFIXES):
        raise ValueError(
            f"{path} is compressed, so its samples can't be read one by one: unpack it to a plain .tar (gunzip {name})"
        )
    if isinstance(path, str):
        if not name.endswith(".tar"):
            raise ValueError(
                f"{path} is no .tar shard: of URLs only shards are read (a folder of them ends in /); copy tables here"
            )
        return "shard"
    if name.endswith(".tar"):
        with open(path, "rb") as file:
            if file.read(5).startswith(COMPRESSED):
                raise ValueError(f"{path} is a compressed tar by its content: unpack it to a plain .tar first")
        return "shard"
    if name.endswith(TABLE_SUFFIXES):
        return "table"
    if name.endswith(".npy"):
        return "vectors"
    raise ValueError(f"{path} is neither a .tar shard, a table ({', '.join(TABLE_SUFFIXES)}), vectors (.npy) nor a folder")


def _is_picture(name: str) -> bool:
    return name.lower().endswith(_PICTURES) and not name.startswith(".")
