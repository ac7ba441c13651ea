"""Tar shards (WebDataset, img2dataset): indexed once by their headers, read by offset, in any order and from any process.

Members of one sample share the path up to the first dot of the file name, as in WebDataset; the suffix after it says what
a member is. Nothing is ever unpacked to disk, and only regular files with plain relative names are read.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wordsight.data.errors import BadSampleError
from wordsight.types import BadSample, Sample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json", "cls")
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 22
MAX_OPEN_FILES = 64
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")  # WebDataset's key and suffix
_SUFFIX_CODE = {suffix: code for code, suffix in enumerate(SUFFIXES)}


class _Shard:
    """Where every sample of one shard lies, in a few arrays (about 100 bytes a sample, shared by forked workers)."""

    __slots__ = ("_key_ends", "_keys", "bad", "broken", "codes", "ends", "name", "offsets", "path", "sizes")

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.name = name
        self.bad: list[BadSample] = []
        self.broken = False  # it ends in the middle
        samples = self._index()
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

    def _report(self, member: str, reason: str) -> None:
        self.bad.append(BadSample(f"{self.name}/{member}" if member else self.name, reason))

    def _break(self, member: str, reason: str) -> None:
        self.broken = True
        self._report(member, reason)

    def _index(self) -> list[tuple[str, dict[int, tuple[int, int]]]]:
        """Samples in order of appearance: (key, {suffix code: (offset, size)})."""
        samples: list[tuple[str, dict[int, tuple[int, int]]]] = []
        latest: dict[str, int] = {}
        last = ""
        for member in self._headers():
            key, code = _key_and_code(member.name)
            last = key or last
            if code is None:
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
            elif not has_image:
                self._report(key, f"has no picture among its members ({', '.join(SUFFIXES[code] for code in members)})")
            else:
                kept.append((key, members))
        return kept

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        """The shard's regular members that lie in it whole; what is wrong with the others is reported."""
        size = os.path.getsize(self.path)
        try:
            tar = tarfile.open(self.path, "r:")  # noqa: SIM115 (closed below; opening alone can fail)
        except tarfile.TarError as error:
            self._report("", f"is no tar file: {error}" if size else "is empty (0 bytes)")
            return
        with tar:
            last = -1
            while True:
                try:
                    member = tar.next()
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
            self._check_end(tar.offset, size)

    def _check_end(self, offset: int, size: int) -> None:
        """tarfile stops without a word at a damaged header: a whole shard ends in a block of zeros."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            block = file.read(tarfile.BLOCKSIZE)
        if any(block):
            self._break("", f"has a damaged header at byte {offset:,} of {size:,}; it was read up to there")
        elif len(block) < tarfile.BLOCKSIZE:
            self._break("", "has no end mark: it was cut off between two members, or is still being written")


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
    if code is not None:
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
        paths: the shards.

    Attributes:
        bad: what was found while indexing: shards that end in the middle, links, names that point outside, ...
        part_sizes: the number of samples in each shard.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self._shards = [_Shard(str(path), name) for path, name in zip(paths, _names(paths), strict=True)]
        self._files = _Files()
        self.bad = [bad for shard in self._shards for bad in shard.bad]
        self.part_sizes = [len(shard) for shard in self._shards]
        self._ends = np.cumsum(self.part_sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; raises BadSampleError where its members can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        at = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[at]
        row = index - (int(self._ends[at - 1]) if at else 0)
        members = shard.members(row)
        image_suffix, image_offset, image_size = next(member for member in members if member[0] in IMAGE_SUFFIXES)
        stem = f"{shard.name}/{shard.key(row)}"
        key = f"{stem}.{image_suffix}"
        image = self._read(shard.path, image_offset, image_size, key)
        texts = {
            suffix: self._read(shard.path, offset, size, f"{stem}.{suffix}")
            for suffix, offset, size in members
            if suffix not in IMAGE_SUFFIXES
        }
        return _sample(key, image, texts)

    def _read(self, path: str, offset: int, size: int, key: str) -> bytes:
        try:
            data = self._files.read(path, offset, size)
        except OSError as error:
            raise BadSampleError(key, f"can't be read: {error.strerror or error}") from error
        if len(data) != size:
            raise BadSampleError(key, f"is cut off: {len(data):,} of {size:,} bytes")
        return data


def _sample(key: str, image: bytes, texts: dict[str, bytes]) -> Sample:
    """Captions: the .txt, then the JSON's "caption" and "captions", each text once; label: the .cls or the JSON's "label"."""
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
    return Sample(key, image, clean_captions(captions), None if label is None else str(label), meta)


def clean_captions(texts: Sequence[Any]) -> tuple[str, ...]:
    """The texts among `texts`, stripped, without empty ones, each once, in order."""
    return tuple(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))


def _names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A short name for each shard: its path below the deepest folder that holds them all."""
    absolute = [os.path.abspath(path) for path in paths]
    if not absolute:
        return []
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, common)).as_posix() for path in absolute]
