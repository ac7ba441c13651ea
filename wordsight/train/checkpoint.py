"""Checkpoints that are whole or not there: a temporary folder, a manifest of hashes, fsync, one rename. Safetensors and JSON
alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
_STEP, _TEMPORARY, _DAMAGED = "step-", ".tmp-", "damaged-"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that has been verified: its folder, its step, its state as JSON."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`, on the CPU; empty where there are none of that name."""
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}


class DiskFullError(OSError):
    """There was no room for what should be written; what was saved before is untouched."""


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)


@contextmanager
def _create(path: Path, manifest: dict[str, dict[str, Any]]) -> Iterator[_HashedFile]:
    """Write a file through to the disk and enter it into the manifest."""
    with open(path, "wb") as file:
        hashed = _HashedFile(file)
        yield hashed
        file.flush()
        os.fsync(file.fileno())
    manifest[path.name] = {"size": hashed.size, "sha256": hashed.digest.hexdigest()}


def write_tensors(file: _HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """Tensors in the safetensors format, one at a time, so that no second copy of all of them is held in memory.

    Those that are split over processes are put together here, for which the others `take_part`.
    """
    import torch
    from safetensors.torch import _TYPES

    from wordsight.train.sharded import whole

    names = {dtype: name for name, dtype in _TYPES.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for tensor in tensors.values():
        if tensor.numel():
            file.write(whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def take_part(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give this process's shares of split tensors to the one that saves them, in its order."""
    from wordsight.train.sharded import whole

    for named in tensors.values():
        for tensor in named.values():
            if tensor.numel():
                whole(tensor.detach())  # let go of at once


def save(root: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> Path:
    """Write `root/step-NNNNNNNN` whole, or leave everything as it was; then let go of all but the last `keep`.

    Args:
        root: the run's checkpoint folder.
        step: updates done.
        state: plain values.
        tensors: file name without suffix -> named tensors.
        keep: how many checkpoints stay, this one among them.

    Raises:
        DiskFullError: no room; the checkpoints before are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / f"{_STEP}{step:08d}", root / f"{_TEMPORARY}{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        manifest: dict[str, dict[str, Any]] = {}
        for name, named in tensors.items():
            with _create(temporary / f"{name}.safetensors", manifest) as file:
                write_tensors(file, named)
        with _create(temporary / "state.json", manifest) as file:
            file.write(json.dumps({"format": FORMAT, "step": step, **state}, indent=1).encode())
        with _create(temporary / MANIFEST, {}) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in DISK_FULL:
            raise DiskFullError(error.errno, f"no room for the checkpoint of step {step}", str(final)) from error
        raise
    if final.exists():
        discard(final)
    os.rename(temporary, final)
    sync_folder(root)
    for old in list_checkpoints(root)[:-keep]:
        discard(old)
    return final


def discard(folder: Path) -> None:
    """Remove a checkpoint; half removed it does not look like a damaged one."""
    hidden = folder.with_name(f"{_TEMPORARY}old-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (a rename, new files) to the disk."""
    if os.name == "nt":  # folders can't be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders, oldest first; whether they are whole is not looked at."""
    found = [p for p in root.glob(f"{_STEP}*") if p.is_dir() and p.name.removeprefix(_STEP).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_STEP)))


def clean(root: Path) -> None:
    """Remove what an interrupted write has left."""
    for left in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)


def verify(folder: Path) -> Checkpoint:
    """Read a checkpoint's state after checking every file's size and SHA-256.

    Raises:
        ValueError: what is damaged, and how.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest.items():
            path = folder / name
            size = path.stat().st_size
            if size != entry["size"]:
                raise ValueError(f"{name} has {size} bytes, {entry['size']} were written")
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise ValueError(f"{name} is not what was written (its SHA-256 differs)")
        state = json.loads((folder / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"it has format {state['format']}, this version of wordsight reads {FORMAT}")
        return Checkpoint(folder, int(state["step"]), state)
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named, put aside and passed over.

    Raises:
        ValueError: there are checkpoints and every one is damaged.
    """
    found = list_checkpoints(root)
    for folder in reversed(found):
        try:
            checkpoint = verify(folder)
        except ValueError as error:
            say(f"The checkpoint {folder} is damaged ({error}); trying the one before it.")
            continue
        for damaged in found[found.index(folder) + 1 :]:
            aside = damaged.with_name(f"{_DAMAGED}{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(damaged, aside)
        return checkpoint
    if found:
        raise ValueError(
            f"every checkpoint in {root} is damaged: choose another --run, or delete that folder to train from the start"
        )
    return None
