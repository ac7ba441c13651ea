"""Rows that a frozen model gave for pictures, in files named by what they depend on: what kept features and tokens share.

A file holds the rows of up to some hundred pictures: a checksum (16 bytes) of all that follows, the length of the header (4), the
header (JSON: whose rows, of which layer and view, how many), the digests of the pictures' bytes [n, 16], and one or more arrays
[n, ...], each at a multiple of 64. Its name begins with a digest of all that the rows depend on beside the pictures, and ends
with one of the pictures. So nothing stale is ever found, a picture is found whatever stands beside it, and two processes that
make the same part write the same file.

A file is there whole or not at all; so what was killed goes on where it was, and processes may share a folder. What is damaged is
said, removed and made anew. A file's access time is when it was last used, for `wordsight cache`.

Shape legend: n pictures of a part, ... what the model gives of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT_VERSION = 2  # raised too where the same model comes to give other features
SUFFIX = ".features"
DIGEST_BYTES = 16
LENGTH_BYTES = 4
ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 16
LEFTOVER_S = 3600.0  # a part is written within seconds: what is older belongs to a process that is no more
ROW_BITS = 24  # of a place: which part, and which of its rows


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What rows depend on beside their pictures.

    Attributes:
        identity: stands for the model's weights and form, its preprocessing and how pictures are decoded.
        layer: what of the model is kept, e.g. "projected".
        view: which view of a picture: "fixed" is the model's own preprocessing.
        model: a name of the model for people; no part of the key.
    """

    identity: str
    layer: str
    view: str = "fixed"
    model: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """24 hex digits, with which the names of its files begin."""
        text = json.dumps([FORMAT_VERSION, self.identity, self.layer, self.view])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Part:
    """The rows of n pictures; of a file they are mapped, and read when they are used. A map holds no file open.

    Attributes:
        arrays: each [n, ...].
        about: what else was said of them, e.g. how much was lost by rounding.
    """

    arrays: tuple[Tensor, ...]
    about: dict[str, Any]


class Shelf:
    """The parts of one subject in a folder, by picture.

    Args:
        folder: of the files; None: parts are held in memory alone.
        subject: whose rows.
        names: those of the folder's files that may be the subject's; None: the folder is looked at.
    """

    def __init__(self, folder: Path | None, subject: Subject, names: Sequence[str] | None = None) -> None:
        self.folder, self.subject = folder, subject
        self._parts: list[Part | Path] = []  # a path: not checked yet
        self._places: dict[bytes, int] = {}
        if folder is None:
            return
        for name in sorted(part_names(folder) if names is None else names):
            if not name.startswith(f"{subject.key}-"):
                continue
            try:
                digests = _read_digests(folder / name, subject)
            except FileNotFoundError:  # pruned meanwhile
                continue
            except ValueError as error:
                discard(folder / name, str(error))
                continue
            self._enter(folder / name, digests)

    def __contains__(self, digest: object) -> bool:
        return digest in self._places

    @property
    def known(self) -> frozenset[bytes]:
        """The digests of all pictures that seem to be there; what is damaged comes out when it is asked for."""
        return frozenset(self._places)

    def find(self, digest: bytes) -> tuple[Part, int] | None:
        """The part with a picture's row, checked, and which row; None where it must be made."""
        place = self._places.get(digest)
        if place is None:
            return None
        number, row = place >> ROW_BITS, place & ((1 << ROW_BITS) - 1)
        part = self._parts[number]
        if isinstance(part, Path):
            found = _open_part(part)
            if found is None:
                self._places = {digest: place for digest, place in self._places.items() if place >> ROW_BITS != number}
                return None
            part = self._parts[number] = found
        return part, row

    def add(self, digests: Sequence[bytes], arrays: Sequence[Tensor], about: dict[str, Any] | None = None) -> Part:
        """Keep the rows of n pictures, on the disk where there is a folder.

        Raises:
            OSError: the disk is full; what is whole stays.
        """
        part = Part(tuple(arrays), about or {})
        if self.folder is not None:
            path = _write(self.folder, self.subject, digests, part)
            part = Part(_map(path, read_header(path)), part.about)
        self._enter(part, digests)
        return part

    def _enter(self, part: Part | Path, digests: Sequence[bytes]) -> None:
        number = len(self._parts)
        self._parts.append(part)
        for row, digest in enumerate(digests):
            self._places[digest] = number << ROW_BITS | row


def part_names(folder: Path) -> list[str]:
    """The names of all parts in a folder, whatever their subject; leftovers of killed processes are removed."""
    if not folder.is_dir():
        return []
    names = os.listdir(folder)
    remove_leftovers(folder, names)
    return [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]


def remove_leftovers(folder: Path, names: Sequence[str]) -> int:
    """Remove what killed processes left half-written among a folder's files: how many bytes."""
    freed = 0
    for name in names:
        if name.startswith(".") and f"{SUFFIX}." in name and name.endswith(".tmp"):
            with suppress(FileNotFoundError, PermissionError):  # another process was faster, or the folder is read-only
                found = (folder / name).stat()
                if time.time() - found.st_mtime > LEFTOVER_S:
                    (folder / name).unlink()
                    freed += found.st_size
    return freed


# One file


def _write(folder: Path, subject: Subject, digests: Sequence[bytes], part: Part) -> Path:
    """Write a part, whole or not at all: its path."""
    arrays = [array.contiguous().cpu() for array in part.arrays]
    header = {
        "format": FORMAT_VERSION,
        "identity": subject.identity,
        "layer": subject.layer,
        "view": subject.view,
        "model": subject.model[:500],
        "pictures": len(digests),
        "arrays": [[str(array.dtype).removeprefix("torch."), list(array.shape)] for array in arrays],
        "about": part.about,
    }
    text = json.dumps(header).encode()
    chunks = [len(text).to_bytes(LENGTH_BYTES, "little"), text, *digests]
    for array in arrays:
        chunks.append(bytes(-(DIGEST_BYTES + sum(map(len, chunks))) % ALIGNMENT))
        chunks.append(memoryview(array.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
    of_pictures = hashlib.blake2b(b"".join(digests), digest_size=8).hexdigest()
    path = folder / f"{subject.key}-{of_pictures}{SUFFIX}"
    _write_checked(path, chunks)
    return path


def _write_checked(path: Path, chunks: Sequence[bytes]) -> None:
    """Bytes, one after the other, with their checksum in front: whole or not at all."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for chunk in chunks:
        digest.update(chunk)
    path.parent.mkdir(parents=True, exist_ok=True)
    # by chance too: processes of two containers may have one number
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(digest.digest())
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size_mb = (DIGEST_BYTES + sum(map(len, chunks))) / 1e6
        whole = sum(1 for _ in path.parent.glob(f"*{SUFFIX}"))
        raise OSError(
            error.errno,
            f"no room in {path.parent} for a further part of {size_mb:.1f} MB: the {whole} parts there are whole and stay; make "
            "room (`wordsight cache prune`), or give a folder on another disk, and run the same again: it goes on from them",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: Path) -> dict[str, Any]:
    """What a part says about itself, and as "start" where its digests begin.

    Raises:
        ValueError: it is no part of this format.
        FileNotFoundError: it is not there.
    """
    with open(path, "rb") as file:
        file.seek(DIGEST_BYTES)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        text = file.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT_VERSION:
        raise ValueError("its header can't be read")
    return {**header, "start": DIGEST_BYTES + LENGTH_BYTES + length}


def _read_digests(path: Path, subject: Subject) -> list[bytes]:
    """The pictures of a part of this subject.

    Raises:
        ValueError: it is not what its name says.
    """
    header = read_header(path)
    found = Subject(identity=header.get("identity", ""), layer=header.get("layer", ""), view=header.get("view", ""))
    num_pictures = header.get("pictures")
    if found != subject or not isinstance(num_pictures, int) or not 0 < num_pictures < 1 << ROW_BITS:
        raise ValueError("it is not what its name says")
    with open(path, "rb") as file:
        file.seek(header["start"])
        content = file.read(DIGEST_BYTES * num_pictures)
    if len(content) < DIGEST_BYTES * num_pictures:
        raise ValueError("it ends early")
    return [content[i : i + DIGEST_BYTES] for i in range(0, len(content), DIGEST_BYTES)]


def _open_part(path: Path) -> Part | None:
    """A part, checked and mapped, and marked as used; None where it is damaged (said, and removed) or gone."""
    try:
        if not is_whole(path):
            discard(path, "its checksum differs")
            return None
        header = read_header(path)
        mark_used(path)
        return Part(_map(path, header), header["about"])
    except FileNotFoundError:  # pruned, or found to be damaged by another process
        return None


def _map(path: Path, header: dict[str, Any]) -> tuple[Tensor, ...]:
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    end, arrays = header["start"] + DIGEST_BYTES * header["pictures"], []
    for name, shape in header["arrays"]:
        dtype: torch.dtype = getattr(torch, name)
        start = end + -end % ALIGNMENT
        end = start + int(np.prod(shape)) * dtype.itemsize
        arrays.append(content[start:end].view(dtype).view(shape))
    return tuple(arrays)


def is_whole(path: Path) -> bool:
    """Whether a part's checksum is that of its content.

    Raises:
        FileNotFoundError: it is not there.
    """
    with open(path, "rb") as file:
        digest = file.read(DIGEST_BYTES)
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest() == digest


def discard(path: Path, why: str) -> None:
    """Remove a part that can't be used, and say so."""
    warnings.warn(f"{path} is damaged ({why}): it is removed, and its pictures are looked at again", stacklevel=2)
    with suppress(FileNotFoundError, PermissionError):
        path.unlink()


def mark_used(path: Path) -> None:
    """Set a file's access time, whatever the file system makes of reading; the time when it was written stays."""
    with suppress(FileNotFoundError, PermissionError):  # a folder of someone else's may be read all the same
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


@contextmanager
def looking(path: Path) -> Iterator[os.stat_result]:
    """A file's status; what is read of it meanwhile does not count as use."""
    before = path.stat()
    try:
        yield before
    finally:
        with suppress(FileNotFoundError, PermissionError):
            after = path.stat()
            if (after.st_ino, after.st_mtime_ns) == (
                before.st_ino,
                before.st_mtime_ns,
            ) and after.st_atime_ns != before.st_atime_ns:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# All of a folder


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A part as `wordsight cache` sees it.

    Attributes:
        path: its file.
        size: in bytes.
        used_s: when it was last used or made, in seconds since 1970.
        subject: whose rows; None where its header says nothing (damaged, or of an older format).
        num_pictures: n; 0 where it is not known.
    """

    path: Path
    size: int
    used_s: float
    subject: Subject | None
    num_pictures: int


def list_parts(folder: Path) -> list[Listed]:
    """All parts below a folder, in the order of their paths; reading them does not count as use."""
    found = []
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        if path.name.startswith(".") or not path.is_file():
            continue
        with suppress(FileNotFoundError), looking(path) as status:
            subject, num_pictures = None, 0
            with suppress(ValueError, KeyError, TypeError):
                header = read_header(path)
                subject = Subject(**{name: str(header[name]) for name in ("identity", "layer", "view", "model")})
                num_pictures = int(header["pictures"])
            used_s = max(status.st_atime, status.st_mtime)
            found.append(Listed(path=path, size=status.st_size, used_s=used_s, subject=subject, num_pictures=num_pictures))
    return found


def open_shelves(folder: Path | None, subjects: Sequence[Subject]) -> list[Shelf]:
    """A shelf for each subject; the folder is looked at once."""
    names: list[str] = [] if folder is None else part_names(folder)
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(name.split("-")[0], []).append(name)
    return [Shelf(folder, subject, by_key.get(subject.key, [])) for subject in subjects]
