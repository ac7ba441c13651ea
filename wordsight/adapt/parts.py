"""Pictures through a frozen tower, part by part, each part in a file that is named by its content: what kept features and tokens
share.

A random view is drawn by (seed, view, the picture's bytes): never by its place, its batch or the machine. So what is learned from
kept parts is what would be learned from the tower, and a part's name says all that it depends on: model, view and pictures.
Another model or another picture is another file. A file has a checksum in front and is there whole or not at all; so a run that
was killed goes on where it was, and processes may share a folder.

Shape legend: n pictures of a part, V views of them, B pictures at once, S image side in pixels, ... what the tower gives.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wordsight.data.decode import decode
from wordsight.data.errors import BadSampleError
from wordsight.data.transform import TrainTransform
from wordsight.evaluate.modes import judging
from wordsight.types import Sample

if TYPE_CHECKING:
    from PIL import Image

CROP_SCALE = (0.08, 1.0)  # of CoOp's, CLAP's and the decoder's training views, which are flipped half of the time
DIGEST_BYTES = 16
LEFTOVER_S = 3600.0  # a part is written within seconds: what is older belongs to a process that is no more

Kept = TypeVar("Kept")


def kept_parts(
    model: Any,
    encode: Callable[[Tensor], Tensor],
    pictures: Sequence[Any],
    *,
    num_views: int,
    seed: int,
    batch_size: int,
    part: int,
    views_at_once: int,
    folder: Path | None,
    identity: str,
    load: Callable[[Path, int], Kept | None],
    keep: Callable[[Path | None, Tensor], Kept],
    progress: bool,
) -> list[list[Kept]]:
    """What a frozen tower makes of pictures, computed only where it is not kept yet.

    Args:
        model: an Embedder with `preprocessor`.
        encode: normalised pixels [B, 3, S, S] -> [B, ...].
        pictures: paths, PIL images or Samples.
        num_views: V, random views beside the fixed one.
        seed: of the random views.
        batch_size: pictures that the model sees at once.
        part: n, pictures of one file.
        views_at_once: views of a picture that are held as pixels.
        folder: of the files; None: nothing is kept.
        identity: stands for all that the tower's output depends on beside pictures and views.
        load: (path, n) -> a part that is kept there, None where it is not, or not whole.
        keep: (path, float32 [n, ...]) -> the same part, just made and now kept; the path is None without a folder.
        progress: show a bar.

    Returns:
        For the fixed view and then each random one, its parts in the pictures' order.

    Raises:
        OSError: a picture can't be read, or there is no room for a part; the message names it.
        ValueError: no pictures, or a model that gives infinite or undefined numbers.
    """
    if len(pictures) == 0:
        raise ValueError("no pictures: give at least one")
    if num_views < 0:
        raise ValueError(f"num_views must be at least 0, got {num_views}")
    if folder is not None:
        remove_leftovers(folder)
    views: list[int | None] = [None, *range(num_views)]
    parts: list[list[Kept]] = [[] for _ in views]
    with (
        judging(model) as device,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1), "wordsight-decode") as pool,
        tqdm(total=len(pictures) * len(views), desc="pictures", unit="picture", disable=not progress) as bar,
    ):
        for start in range(0, len(pictures), part):
            items = [pictures[i] for i in range(start, min(start + part, len(pictures)))]
            read = list(pool.map(read_picture, range(start, start + len(items)), items))
            paths = [None if folder is None else folder / part_name(identity, seed, view, read) for view in views]
            found = list(pool.map(lambda path, n=len(items): None if path is None else load(path, n), paths))
            missing = [v for v, kept in enumerate(found) if kept is None]
            bar.update(len(items) * (len(views) - len(missing)))
            for at in range(0, len(missing), views_at_once):
                these = missing[at : at + views_at_once]
                made = _encode(model, encode, device, pool, read, [views[v] for v in these], seed, batch_size, bar)
                for v in these:
                    found[v] = keep(paths[v], made.pop(0))
            for own, kept in zip(parts, found, strict=True):
                assert kept is not None
                own.append(kept)
    return parts


# Pictures


@dataclass(frozen=True)
class Picture:
    """A picture that has been read: its name, its bytes or pixels, and their digest."""

    name: str
    content: bytes | Image.Image
    digest: bytes


def read_picture(position: int, item: Any) -> Picture:
    """A path, PIL image or Sample, read but not decoded."""
    from PIL import Image

    content: bytes | Image.Image
    if isinstance(item, Sample):
        name, content = item.key, item.image
    elif isinstance(item, str | os.PathLike):
        name = os.fspath(item)
        content = Path(item).read_bytes()
    elif isinstance(item, Image.Image):
        name, content = f"picture {position} of the given ones", item
    else:
        raise ValueError(f"pictures are paths, PIL images or Samples; the one at position {position} is {type(item).__name__}")
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        digest.update(f"{content.mode} {content.size}".encode())
        digest.update(content.tobytes())
    return Picture(name, content, digest.digest())


def draw_views(preprocessor: Any, picture: Picture, views: Sequence[int | None], seed: int) -> Tensor:
    """Some views of a picture (None: the fixed one), decoded once: uint8 [V, 3, S, S].

    Raises:
        OSError: it can't be decoded; the message names it.
    """
    draw = TrainTransform(preprocessor.image_size_px, CROP_SCALE, flip=0.5, interpolation=preprocessor.interpolation)
    try:
        image = decode(picture.content, key=picture.name)
    except BadSampleError as error:
        raise OSError(f"{picture.name} {error.reason}") from error
    number = int.from_bytes(picture.digest[:8], "little")
    return torch.stack(
        [
            preprocessor.to_uint8(image) if view is None else draw(image, np.random.default_rng([seed, view, number]))
            for view in views
        ]
    )


def _encode(
    model: Any,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    pool: ThreadPoolExecutor,
    pictures: Sequence[Picture],
    views: Sequence[int | None],
    seed: int,
    batch_size: int,
    bar: tqdm,
) -> list[Tensor]:
    """What the tower makes of some views (None: the fixed one) of n pictures, each decoded once: float32 [n, ...] a view."""
    dtype = next(model.parameters()).dtype
    rows: list[list[Tensor]] = [[] for _ in views]
    for batch in _batches(pictures, max(1, batch_size // len(views))):
        pixels_BVCHW = torch.stack(list(pool.map(lambda picture: draw_views(model.preprocessor, picture, views, seed), batch)))
        normal = model.preprocessor.normalize(pixels_BVCHW.flatten(0, 1).to(device)).to(dtype)
        out_BV = encode(normal).float().cpu().unflatten(0, (len(batch), len(views)))
        if not torch.isfinite(out_BV).all():
            first = int((~torch.isfinite(out_BV)).flatten(1).any(1).nonzero()[0, 0])
            raise ValueError(f"the model gives infinite or undefined features, first for {batch[first].name}")
        for own, out_B in zip(rows, out_BV.unbind(1), strict=True):
            own.append(out_B.clone())
        bar.update(len(batch) * len(views))
    return [torch.cat(own) for own in rows]


def _batches(pictures: Sequence[Picture], size: int) -> Iterator[Sequence[Picture]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


# Files


def part_name(identity: str, seed: int, view: int | None, pictures: Iterable[Picture]) -> str:
    """The name of a part's file: a digest of all that its content depends on."""
    digest = hashlib.blake2b(f"{identity} {'plain' if view is None else (seed, view)}".encode(), digest_size=20)
    for picture in pictures:
        digest.update(picture.digest)
    return f"{digest.hexdigest()}.features"


def write_part(path: Path, *content: Any) -> None:
    """Bytes, one after the other, with their checksum in front: whole or not at all.

    Raises:
        OSError: the disk is full; what is whole stays.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for chunk in content:
        digest.update(chunk)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(digest.digest())
            for chunk in content:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size_mb = (DIGEST_BYTES + sum(memoryview(chunk).nbytes for chunk in content)) / 1e6
        whole = sum(1 for _ in path.parent.glob("*.features"))
        raise OSError(
            error.errno,
            f"no room in {path.parent} for a further part of {size_mb:.1f} MB: the {whole} parts there are whole and stay; make "
            "room, or give a folder on another disk, and run the same again: it goes on from them",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a part is there just as it was written; one that is damaged is said."""
    try:
        with open(path, "rb") as file:
            digest = file.read(DIGEST_BYTES)
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()
    except FileNotFoundError:
        return False
    if found != digest:
        say_damaged(path, "its checksum differs")
    return found == digest


def say_damaged(path: Path, why: str) -> None:
    """Warn of a kept part that can't be used."""
    warnings.warn(f"{path} is damaged ({why}): its pictures are looked at again", stacklevel=2)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    for path in folder.glob(".*.features.*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > LEFTOVER_S:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue
