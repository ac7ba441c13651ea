"""Tar shards (WebDataset, img2dataset): indexed once by their headers, read by offset, in any order and from any process.

Members of one sample share the path up to the first dot of the file name, as in WebDataset; the suffix after it says what
a member is. Nothing is ever unpacked to disk, and only regular files with plain relative names are read. A shard may lie on an
object store (`s3://...`, see `remote`): then its samples are ranges of bytes that are read ahead.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from wordsight.data.errors import BadSampleError
from wordsight.data.remote import Range, RemoteFile, RemoteFiles, RemoteReadError, is_url
from wordsight.types import BadSample, Sample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json", "cls", "npy")
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 22
MAX_OPEN_FILES = 64
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")  # WebDataset's key and suffix
_SUFFIX_CODE = {suffix: code for code, suffix in enumerate(SUFFIXES)}
_ARRAY = _SUFFIX_CODE["npy"]
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_INDEX_FORMAT = 2


class _Shard:
    """Where every sample of one shard lies, in a few arrays (about 100 bytes a sample, shared by forked workers)."""

    __slots__ = ("_key_ends", "_keys", "bad", "broken", "codes", "ends", "name", "offsets", "path", "sizes")

    def __init__(self, path: str, name: str, files: RemoteFiles | None = None) -> None:
        self.path = path
        self.name = name
        self.bad: list[BadSample] = []
        self.broken = False  # it ends in the middle
        if files is None:
            self._fill(self._index(None))
            return
        kept = _kept_index(path, files)
        if kept is None or not self._load(kept):
            self._fill(self._index(files))
            if kept is not None and not self.broken:  # a shard that ends in the middle may be on its way still
                self._save(kept)

    def _fill(self, samples: list[tuple[str, dict[int, tuple[int, int]]]]) -> None:
        keys = [key.encode("utf-8", "surrogateescape") for key, _ in samples]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        self.ends = np.cumsum([len(members) for _, members in samples], dtype=np.int64)
        table = [(code, *where) for _, members in samples for code, where in members.items()]
        self.codes = np.array([row[0] for row in table], dtype=np.uint8)
        self.offsets = np.array([row[1] for row in table], dtype=np.int64)
        self.sizes = np.array([row[2] for row in table], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def key(self, index: int) -> str:
        start = self._key_ends[index - 1] if index else 0
        return self._keys[start : self._key_ends[index]].decode("utf-8", "surrogateescape")

    def members(self, index: int) -> list[tuple[str, int, int]]:
        """(suffix, offset, size) of each member of a sample."""
        rows = range(self.ends[index - 1] if index else 0, self.ends[index])
        return [(SUFFIXES[self.codes[row]], int(self.offsets[row]), int(self.sizes[row])) for row in rows]

    def _load(self, path: Path) -> bool:
        """Take over an index that was kept; False where there is none, or a damaged one."""
        try:
            with np.load(path, allow_pickle=False) as kept:
                if int(kept["format"]) != _INDEX_FORMAT:
                    return False
                self._keys = kept["keys"].tobytes()
                self._key_ends, self.ends, self.codes = kept["key_ends"], kept["ends"], kept["codes"]
                self.offsets, self.sizes = kept["offsets"], kept["sizes"]
                self.bad = [BadSample(f"{self.name}{key}", reason) for key, reason in json.loads(kept["bad"].tobytes())]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False
        return True

    def _save(self, path: Path) -> None:
        """Keep the index, whole or not at all."""
        file = io.BytesIO()
        bad = json.dumps([[one.key.removeprefix(self.name), one.reason] for one in self.bad]).encode()
        np.savez(
            file,
            format=np.int64(_INDEX_FORMAT),
            keys=np.frombuffer(self._keys, np.uint8),
            key_ends=self._key_ends,
            ends=self.ends,
            codes=self.codes,
            offsets=self.offsets,
            sizes=self.sizes,
            bad=np.frombuffer(bad, np.uint8),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_bytes(file.getvalue())
        os.replace(new, path)

    def _report(self, member: str, reason: str) -> None:
        self.bad.append(BadSample(f"{self.name}/{member}" if member else self.name, reason))

    def _break(self, member: str, reason: str) -> None:
        self.broken = True
        self._report(member, reason)

    def _index(self, files: RemoteFiles | None) -> list[tuple[str, dict[int, tuple[int, int]]]]:
        """Samples in order of appearance: (key, {suffix code: (offset, size)})."""
        samples: list[tuple[str, dict[int, tuple[int, int]]]] = []
        latest: dict[str, int] = {}
        last = ""
        for member in self._headers(files):
            key, code = _key_and_code(member.name)
            last = key or last
            if code is None or (code == _ARRAY and member.size > MAX_TEXT_BYTES):  # arrays are rarely wanted, so never an error
                continue
            at = latest.get(key)
            if at is None or code in samples[at][1]:  # a repeated suffix begins another sample, as in WebDataset
                at = latest[key] = len(samples)
                samples.append((key, {}))
            samples[at][1][code] = (member.offset_data, member.size)
        kept = []
        for key, members in samples:
            has_image = any(code < len(IMAGE_SUFFIXES) for code in members)
            if self.broken and key == last and len(members) < len(samples[0][1]):
                self._report(key, "is incomplete: the shard ends in it")
            elif list(members) == [_ARRAY]:
                continue
            elif not has_image:
                self._report(key, f"has no picture among its members ({', '.join(SUFFIXES[code] for code in members)})")
            else:
                kept.append((key, members))
        return kept

    def _headers(self, files: RemoteFiles | None) -> Iterator[tarfile.TarInfo]:
        """The shard's regular members that lie in it whole; what is wrong with the others is reported."""
        file: Any = None
        try:
            if files is None:
                size = os.path.getsize(self.path)
                file = open(self.path, "rb")  # noqa: SIM115 (closed below)
            else:
                size = files.size(self.path)
                file = RemoteFile(files, self.path, size)
            yield from self._members_of(file, size)
        except RemoteReadError as error:
            self._break("", str(error).removeprefix(f"{self.path} "))
        finally:
            if file is not None:
                file.close()

    def _members_of(self, file: Any, size: int) -> Iterator[tarfile.TarInfo]:
        if file.read(5).startswith(COMPRESSED):
            self._report("", "is a compressed tar by its content: unpack it to a plain .tar first")
            return
        file.seek(0)
        try:
            tar = tarfile.open(self.path, "r:", fileobj=file)  # noqa: SIM115 (it holds nothing of its own)
        except tarfile.TarError as error:
            self._report("", f"is no tar file: {error}" if size else "is empty (0 bytes)")
            return
        last = -1
        while True:
            try:
                member = tar.next()
            except RemoteReadError:
                raise
            except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
                self._break("", f"can't be read beyond byte {tar.offset:,} of {size:,}: {error}")
                return
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            if member is None:
                break
            if member.offset <= last or member.size < 0:
                self._break("", f"has a damaged header at byte {member.offset:,}; it was read up to there")
                return
            last = member.offset
            reason = _refusal(member)
            if reason:
                self._report(member.name, reason)
            elif member.isreg() and member.offset_data + member.size > size:
                self._break(member.name, "is cut off: the shard ends in the middle of it")
                return
            elif member.isreg():
                yield member
        self._check_end(file, tar.offset, size)

    def _check_end(self, file: Any, offset: int, size: int) -> None:
        """tarfile stops without a word at a damaged header: a whole shard ends in a block of zeros."""
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if any(block):
            self._break("", f"has a damaged header at byte {offset:,} of {size:,}; it was read up to there")
        elif len(block) < tarfile.BLOCKSIZE:
            self._break("", "has no end mark: it was cut off between two members, or is still being written")


def _kept_index(url: str, files: RemoteFiles) -> Path | None:
    """Where a remote shard's index is kept, by its URL, size and mark of change; None: nowhere."""
    if files.config.index_dir is None:
        return None
    mark = files.mark(url)
    if mark is None:
        return None
    return Path(files.config.index_dir) / f"{hashlib.sha256(repr((url, mark)).encode()).hexdigest()[:40]}.npz"


def _key_and_code(name: str) -> tuple[str, int | None]:
    """A member's sample and what it is (an index into SUFFIXES; None: nothing that we read)."""
    match = _NAME.match(name)
    return (match[1].removeprefix("./"), _SUFFIX_CODE.get(match[2].lower())) if match else ("", None)


def _refusal(member: tarfile.TarInfo) -> str | None:
    """Why a member may not be read; None where it may (or is a plain folder)."""
    name = member.name.replace("\\", "/")
    if name.startswith("/") or re.match(r"^[A-Za-z]:/", name) or ".." in name.split("/") or "\0" in name:
        return "has a name that points outside of the shard; nothing was read"
    if member.isdir():
        return None
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname!r}; nothing was read"
    if not member.isreg():
        return "is a device or a pipe; nothing was read"
    if member.issparse():
        return "is a sparse file; nothing was read"
    code = _key_and_code(member.name)[1]
    if code is not None and code != _ARRAY:
        limit = MAX_IMAGE_BYTES if code < len(IMAGE_SUFFIXES) else MAX_TEXT_BYTES
        if member.size > limit:
            return f"is too large: {member.size:,} bytes, {limit:,} are allowed; nothing was read"
    return None


class _Files:
    """Open file descriptors by path; the least used are closed. Safe to fork (pread has no position) and to pickle."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        fd = self._open.get(path)
        if fd is None:
            fd = self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if len(self._open) > MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return os.pread(fd, size, offset)

    def __reduce__(self) -> tuple[type[_Files], tuple[()]]:
        return _Files, ()

    def __del__(self) -> None:
        for fd in self._open.values():
            os.close(fd)


class ShardSource:
    """Samples in tar shards, in the order of the shards and of their members.

    Args:
        paths: the shards: local paths, or URLs for fsspec.
        files: who reads the URLs; None makes one.
        arrays: read a sample's `.npy` too; its bytes are `meta["array"]`.

    Attributes:
        bad: what was found while indexing: shards that end in the middle, links, names that point outside, ...
        part_sizes: the number of samples in each shard.

    Raises:
        FileNotFoundError: a URL without a file.
        ValueError: no backend for a kind of URL.
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], files: RemoteFiles | None = None, *, arrays: bool = False
    ) -> None:
        self._files = _Files()
        self._arrays = arrays
        self.remote = (files or RemoteFiles()) if any(is_url(path) for path in paths) else None
        named = list(zip([str(path) for path in paths], _names(paths), strict=True))
        if self.remote is None:
            self._shards = [_Shard(path, name) for path, name in named]
        else:  # several at once: their headers come from far
            with ThreadPoolExecutor(self.remote.config.num_threads, "wordsight-index") as pool:
                self._shards = list(pool.map(self._index, named))
        self.bad = [bad for shard in self._shards for bad in shard.bad]
        self.part_sizes = [len(shard) for shard in self._shards]
        self._ends = np.cumsum(self.part_sizes, dtype=np.int64)

    def _index(self, named: tuple[str, str]) -> _Shard:
        path, name = named
        try:
            return _Shard(path, name, self.remote if is_url(path) else None)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no such file: {path}") from error

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; raises BadSampleError where its members can't be read."""
        shard, row = self._find(index)
        members = self._members(shard, row)
        image_suffix = next(suffix for suffix, _, _ in members if suffix in IMAGE_SUFFIXES)
        stem = f"{shard.name}/{shard.key(row)}"
        key = f"{stem}.{image_suffix}"
        found: dict[str, bytes] = {}
        if is_url(shard.path):
            for url, first, stop in _ranges(shard.path, members):
                data = self._fetch(url, first, stop, key)
                for suffix, offset, size in members:
                    if first <= offset and offset + size <= stop:
                        found.setdefault(suffix, data[offset - first : offset - first + size])
        else:
            for suffix, offset, size in members:
                if suffix not in found and (suffix == image_suffix or suffix not in IMAGE_SUFFIXES):
                    found[suffix] = self._read(shard.path, offset, size, f"{stem}.{suffix}")
        texts = {suffix: data for suffix, data in found.items() if suffix not in IMAGE_SUFFIXES}
        return _sample(key, found[image_suffix], texts)

    def ahead(self, indices: Iterable[int]) -> None:
        """Announce samples that will be asked for soon: those on object stores are sent for."""
        if self.remote is None:
            return
        ranges: list[Range] = []
        for index in indices:
            shard, row = self._find(index)
            if is_url(shard.path):
                ranges += _ranges(shard.path, self._members(shard, row))
        self.remote.start(ranges)

    def _members(self, shard: _Shard, row: int) -> list[tuple[str, int, int]]:
        """Those that are read."""
        return [member for member in shard.members(row) if self._arrays or member[0] != "npy"]

    def _find(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        at = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[at], int(index - (int(self._ends[at - 1]) if at else 0))

    def _read(self, path: str, offset: int, size: int, key: str) -> bytes:
        try:
            data = self._files.read(path, offset, size)
        except OSError as error:
            raise BadSampleError(key, f"can't be read: {error.strerror or error}") from error
        if len(data) != size:
            raise BadSampleError(key, f"is cut off: {len(data):,} of {size:,} bytes")
        return data

    def _fetch(self, url: str, first: int, stop: int, key: str) -> bytes:
        assert self.remote is not None
        try:
            return self.remote.read(url, first, stop)
        except RemoteReadError as error:
            raise BadSampleError(key, f"can't be read: {error}") from error


def _ranges(url: str, members: Sequence[tuple[str, int, int]]) -> list[Range]:
    """The bytes of a sample: one range where its members lie side by side, one each otherwise."""
    used: dict[str, tuple[int, int]] = {}
    for suffix, offset, size in members:
        kind = "picture" if suffix in IMAGE_SUFFIXES else suffix
        used.setdefault(kind, (offset, offset + size))
    first, stop = min(a for a, _ in used.values()), max(b for _, b in used.values())
    if stop - first <= sum(b - a for a, b in used.values()) + 3 * tarfile.BLOCKSIZE * len(used):
        return [(url, first, stop)]
    return [(url, a, b) for a, b in used.values()]


def _sample(key: str, image: bytes, texts: dict[str, bytes]) -> Sample:
    """Captions: the .txt, then the JSON's "caption" and "captions", each text once; label: the .cls or the JSON's "label"."""
    array = texts.pop("npy", None)
    try:
        decoded = {suffix: data.decode("utf-8") for suffix, data in texts.items()}
    except UnicodeDecodeError as error:
        raise BadSampleError(key, f"has a text that is not UTF-8: {error.reason} at byte {error.start}") from error
    meta: dict[str, Any] = {}
    if "json" in decoded:
        try:
            meta = json.loads(decoded["json"])
        except (ValueError, RecursionError) as error:
            raise BadSampleError(key, f"has a .json that can't be parsed: {error}") from error
        if not isinstance(meta, dict):
            raise BadSampleError(key, f"has a .json that is no object but a {type(meta).__name__}")
    captions = [decoded.get("txt")]
    for name in ("caption", "captions"):
        value = meta.pop(name, None)
        captions += value if isinstance(value, list) else [value]
    label = meta.pop("label", None)
    if "cls" in decoded:
        label = decoded["cls"].strip()
    if array is not None:
        meta["array"] = array
    return Sample(key, image, clean_captions(captions), None if label is None else str(label), meta)


def clean_captions(texts: Sequence[Any]) -> tuple[str, ...]:
    """The texts among `texts`, stripped, without empty ones, each once, in order."""
    return tuple(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))


def _names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A short name for each shard: its path below the deepest folder that holds them all."""
    if not paths:
        return []
    if any(is_url(path) for path in paths):
        parts = [(str(path) if is_url(path) else Path(path).absolute().as_posix()).split("/") for path in paths]
        depth = min(len(one) for one in parts) - 1
        shared = next((i for i in range(depth) if len({one[i] for one in parts}) > 1), depth)
        return ["/".join(one[shared:]) for one in parts]
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, common)).as_posix() for path in absolute]
