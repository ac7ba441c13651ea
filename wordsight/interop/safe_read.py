"""Read tensors from a file of weights without ever running code from it: safetensors, PyTorch files, TorchScript archives.

Safetensors hold no code by design. PyTorch's pickles go through `torch.load(weights_only=True)` with a short allow-list.
TorchScript archives (OpenAI's) are never given to the TorchScript runtime: their `data.pkl` is read by an unpickler that knows
tensors and turns every class of the archive into an inert placeholder.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 64 << 20  # the largest published archive's data.pkl is below 1 MB
MAX_DEPTH = 64  # of modules in modules

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class CheckpointError(ValueError):
    """A file of weights that can't be used: what is wrong with it and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file of weights holds.

    Attributes:
        tensors: name -> tensor, in the file's own names (`module.` and the like taken off), dtypes as stored.
        layout: "safetensors", "pytorch" or "torchscript".
        class_names: the classes that a TorchScript archive mentions, e.g. `__torch__.clip.model.QuickGELU`; else empty.
        notes: what a user should be told about how it was read.
    """

    tensors: dict[str, Tensor]
    layout: str
    class_names: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())


def read_weights(path: str | Path) -> Weights:
    """Read a file of weights, whatever its extension, by its first bytes.

    Args:
        path: a safetensors file, a `torch.save` file (a state dict or a training checkpoint around one) or a TorchScript archive.

    Returns:
        Its tensors by name, dtypes as stored.

    Raises:
        CheckpointError: the file is empty, cut off, of another kind, or its pickle asks for anything but tensors.
        OSError: the file can't be opened.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes): fetch or write it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    if head.startswith(b"PK"):
        with _open_zip(path, size) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_torchscript(path, archive)
        return _read_pickle(path, mmap=True)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20:
        return _read_safetensors(path)
    if head.startswith(b"\x80") or head[257:262] == b"ustar":  # torch.save before 1.6, or any other pickle
        return _read_pickle(path, mmap=False)
    raise CheckpointError(
        f"{path} ({size:,} bytes) is no file of weights: it begins with {head[:16]!r}, and neither safetensors, a PyTorch file "
        "nor a TorchScript archive does. If it was downloaded, fetch it again: an error page may have been saved in its place"
    )


# ------------------------------------------------------------------------------------------------------------- safetensors


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Weights(tensors=_strip_wrappers(load_file(path)), layout="safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is a damaged or cut-off safetensors file ({error}): fetch or write it again") from error


# ------------------------------------------------------------------------------------------------------- torch.save's files


def _allowed_globals() -> list[Any]:
    """What training checkpoints hold beside tensors: their command line's arguments and numpy scalars. None of it runs code."""
    import argparse

    import numpy as np

    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)]
    return [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]


def load_pickle(path: Path, *, mmap: bool = False, allowed: Sequence[tuple[Any, str]] = ()) -> Any:
    """What a `torch.save` file holds: tensors, containers and a training program's plain records; nothing of it is run.

    Args:
        path: the file.
        mmap: map it into memory; for files since PyTorch 1.6.
        allowed: further names that the file may use, as (what stands for it, "module.name"); what stands for them must be inert.

    Raises:
        CheckpointError: it asks for more, or is damaged.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([*_allowed_globals(), *allowed]):
            warnings.simplefilter("ignore")  # torch warns of its own legacy storages
            # torch.load judges a path by its extension, an open file by its content; only a path can be mapped into memory
            with nullcontext(path) if mmap and path.suffix != ".safetensors" else path.open("rb") as source:
                return torch.load(source, map_location="cpu", weights_only=True, mmap=isinstance(source, Path))
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except Exception as error:  # a damaged pickle can fail in any way; what it may call is fixed by weights_only
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} is a damaged or cut-off PyTorch file ({reason}): fetch or write it again") from error


def _read_pickle(path: Path, *, mmap: bool) -> Weights:
    tensors, notes = _find_state_dict(path, load_pickle(path, mmap=mmap))
    return Weights(tensors=_strip_wrappers(tensors), layout="pytorch", notes=notes)


def _refused(path: Path, message: str) -> CheckpointError:
    """The one error for a pickle that asks for more than tensors; `message` is what the unpickler said."""
    named = re.search(r"(?:GLOBAL|class|type|function|global:?) `?<?((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*)", message)
    what = f"it asks for {named[1]}" if named else "it asks for more than tensors"
    return CheckpointError(
        f"refused to read {path}: {what}, and a file of weights may hold tensors only; nothing of it was run. If you trust its "
        "author, ask for a safetensors file, or save the bare state dict in the program that made it"
    )


def _find_state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict itself, or the one in a training checkpoint {epoch, name, state_dict, optimizer, ...}."""
    notes: tuple[str, ...] = ()
    if isinstance(content, Mapping):
        for key in ("state_dict", "state_dict_ema"):
            if isinstance(content.get(key), Mapping):
                if key == "state_dict" and "state_dict_ema" in content:
                    notes = (f"{path} holds plain and averaged (state_dict_ema) weights: the plain ones were read",)
                content = content[key]
                break
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if tensors and len(tensors) == len(content):
            return tensors, notes
        found = f"a dictionary with {', '.join(repr(k) for k in list(content)[:8]) or 'nothing in it'}"
    else:
        found = f"a {type(content).__name__}"
    raise CheckpointError(
        f"{path} holds {found}; expected a state dict (names to tensors) or a training checkpoint with one under 'state_dict'"
    )


def _strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) put before every name."""
    stripped = dict(tensors)
    while stripped and any(all(n.startswith(p) for n in stripped) for p in ("module.", "_orig_mod.")):
        stripped = {name.split(".", 1)[1]: value for name, value in stripped.items()}
    return stripped


# ----------------------------------------------------------------------------------------------------- TorchScript archives


def _open_zip(path: Path, size: int) -> zipfile.ZipFile:
    """Open a zip archive, refusing one that says it holds much more than the file has bytes (tensors are stored uncompressed)."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a damaged or cut-off archive ({error}): fetch or write it again") from error
    records = archive.infolist()
    inflated = sum(r.file_size for r in records if r.compress_type != zipfile.ZIP_STORED)
    if inflated > MAX_PICKLE_BYTES + 20 * size or any("/data/" in r.filename and r.compress_type for r in records):
        archive.close()
        raise CheckpointError(
            f"refused to read {path}: it would unpack to {inflated:,} bytes from {size:,}, and no PyTorch file compresses "
            "its tensors"
        )
    return archive


class _Inert:
    """Stands for an object of any class of the archive: keeps its attributes, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ListBuilder:
    """TorchScript's typed lists: `build_intlist([1, 2])` -> [1, 2]."""

    __slots__ = ()

    def __call__(self, values: Any, *_: Any) -> Any:
        return values


class _TensorBuilder:
    """A tensor over a storage of the archive, with every size and stride checked to lie inside of it."""

    __slots__ = ()

    def __call__(self, storage: Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        if not isinstance(storage, torch.Tensor) or min((offset, *shape, *stride)) < 0 or len(shape) != len(stride):
            raise pickle.UnpicklingError("a tensor without a storage, or with a negative size")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if prod(shape) else offset - 1
        if last >= storage.numel():
            raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
        return storage.as_strided(shape, stride, offset)


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors, ordered dictionaries and lists; every `__torch__` class is inert; anything else is refused."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(data))
        self.archive, self.root = archive, root
        self.class_names: set[str] = set()
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            self.class_names.add(f"{module}.{name}")
            return _Inert
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _TensorBuilder()
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and (name == "restore_type_tag" or re.fullmatch("build_[a-z]+list", name)):
            return _ListBuilder()
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not re.fullmatch(r"\d+", key):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if key not in self.storages:
            record = self.archive.getinfo(f"{self.root}/data/{key}")
            if record.file_size < numel * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} is shorter than it says")
            data = bytearray(self.archive.read(record))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _read_torchscript(path: Path, archive: zipfile.ZipFile) -> Weights:
    pickles = [r for r in archive.infolist() if r.filename.endswith("/data.pkl") and r.filename.count("/") == 1]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path} is no TorchScript archive of a model: expected one data.pkl of at most {MAX_PICKLE_BYTES:,} bytes"
        )
    try:
        reader = _TensorUnpickler(archive.read(pickles[0]), archive, pickles[0].filename.split("/")[0])
        tensors = dict(_walk(reader.load()))
        if not tensors:
            raise pickle.UnpicklingError("no tensors in it")
    except pickle.UnpicklingError as error:
        if str(error).startswith("GLOBAL"):
            raise _refused(path, str(error)) from None
        raise CheckpointError(f"{path} is a damaged TorchScript archive ({error}): fetch it again") from error
    except Exception as error:  # a damaged pickle can fail in any way; what it may call is fixed above
        raise CheckpointError(f"{path} is a damaged TorchScript archive ({error!r}): fetch it again") from error
    return Weights(tensors=_strip_wrappers(tensors), layout="torchscript", class_names=frozenset(reader.class_names))


def _walk(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree of inert modules, named by their path; a module met twice is walked once."""
    stack: list[tuple[str, Any]] = [("", module)]
    seen: set[int] = set()
    while stack:
        prefix, node = stack.pop()
        if not isinstance(node, _Inert) or not isinstance(node.state, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        if prefix.count(".") > MAX_DEPTH:
            raise pickle.UnpicklingError(f"modules nested more than {MAX_DEPTH} deep")
        for name, value in node.state.items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{name}", value
            else:
                stack.append((f"{prefix}{name}.", value))
