"""Pictures through a frozen tower, in their fixed view and in random ones, computed only where it is not kept yet: what kept
features and tokens share.

A random view is drawn by (seed, view, the picture's bytes): never by its place, its batch or the machine. So what is learned from
kept rows is what would be learned from the tower, and each row is found by all that it depends on: model, view and picture. The
files are those of `wordsight.evaluate.part_files`, which the evaluators share.

Shape legend: N pictures, n pictures of a part, V views of them, B pictures at once, S image side in pixels, ... what the tower
gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wordsight.data.decode import decode
from wordsight.data.errors import BadSampleError
from wordsight.data.reader import picture_digest
from wordsight.data.transform import TrainTransform
from wordsight.evaluate.modes import judging
from wordsight.evaluate.part_files import Part, Subject, open_shelves
from wordsight.types import Sample

if TYPE_CHECKING:
    from PIL import Image

CROP_SCALE = (0.08, 1.0)  # of CoOp's, CLAP's and the decoder's training views, which are flipped half of the time

Packed = tuple[tuple[Tensor, ...], dict[str, Any]]  # arrays [n, ...] as they are kept, and what is said of them


@dataclass(frozen=True)
class KeptView:
    """The rows of N pictures in one view.

    Attributes:
        parts: that hold them.
        part_N: int64 [N], the part of each picture.
        row_N: int64 [N], its row there.
    """

    parts: list[Part]
    part_N: np.ndarray
    row_N: np.ndarray

    def gather(self) -> Tensor:
        """The first array's rows [N, ...], in memory."""
        out = torch.empty(len(self.part_N), *self.parts[0].arrays[0].shape[1:], dtype=self.parts[0].arrays[0].dtype)
        for number, part in enumerate(self.parts):
            at = np.flatnonzero(self.part_N == number)
            out[torch.from_numpy(at)] = part.arrays[0][torch.from_numpy(self.row_N[at])]
        return out


def kept_views(
    model: Any,
    encode: Callable[[Tensor], Tensor],
    pictures: Sequence[Any],
    *,
    subject: Subject,
    pack: Callable[[Tensor], Packed],
    num_views: int,
    seed: int,
    batch_size: int,
    part: int,
    views_at_once: int,
    folder: Path | None,
    progress: bool,
) -> list[KeptView]:
    """What a frozen tower makes of pictures, computed only where it is not kept yet.

    Args:
        model: an Embedder with `preprocessor`.
        encode: normalised pixels [B, 3, S, S] -> [B, ...].
        pictures: paths, PIL images or Samples.
        subject: what the rows of the fixed view depend on beside the pictures.
        pack: float32 [n, ...] -> what is kept of it.
        num_views: V, random views beside the fixed one.
        seed: of the random views.
        batch_size: pictures that the model sees at once.
        part: n, pictures of one file.
        views_at_once: views of a picture that are held as pixels.
        folder: of the files; None: nothing is kept.
        progress: show a bar.

    Returns:
        The fixed view and then each random one.

    Raises:
        OSError: a picture can't be read, or there is no room for a part; the message names it.
        ValueError: no pictures, or a model that gives infinite or undefined numbers.
    """
    if len(pictures) == 0:
        raise ValueError("no pictures: give at least one")
    if num_views < 0:
        raise ValueError(f"num_views must be at least 0, got {num_views}")
    views: list[int | None] = [None, *range(num_views)]
    shelves = open_shelves(folder, [replace(subject, view=_view_name(seed, view)) for view in views])
    places: list[list[tuple[Part, int]]] = [[] for _ in views]
    with (
        judging(model) as device,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1), "wordsight-decode") as pool,
        tqdm(total=len(pictures) * len(views), desc="pictures", unit="picture", disable=not progress) as bar,
    ):
        for start in range(0, len(pictures), part):
            items = [pictures[i] for i in range(start, min(start + part, len(pictures)))]
            read = list(pool.map(read_picture, range(start, start + len(items)), items))
            # opening a part reads and checks all of it, so the views do it side by side
            absent = list(pool.map(lambda shelf, read=read: [one for one in read if shelf.find(one.digest) is None], shelves))
            missing = [{picture.digest: picture for picture in own} for own in absent]
            todo = [v for v, own in enumerate(missing) if own]
            bar.update(len(read) * len(views))
            for at in range(0, len(todo), views_at_once):
                these = todo[at : at + views_at_once]
                asked = {digest: picture for v in these for digest, picture in missing[v].items()}
                bar.update(-len(asked) * len(these))
                made = _encode(
                    model, encode, device, pool, list(asked.values()), [views[v] for v in these], seed, batch_size, bar
                )
                rows = {digest: row for row, digest in enumerate(asked)}
                for v in these:
                    shelves[v].add(list(missing[v]), *pack(made.pop(0)[[rows[digest] for digest in missing[v]]]))
            for own, shelf in zip(places, shelves, strict=True):
                found = [shelf.find(picture.digest) for picture in read]
                own += [place for place in found if place is not None]
    return [_as_view(own) for own in places]


def _view_name(seed: int, view: int | None) -> str:
    """A view as `Subject` knows it: all that it is drawn by beside the picture."""
    return Subject.view if view is None else f"random view {view} of seed {seed}, crops of {CROP_SCALE[0]} to {CROP_SCALE[1]}"


def _as_view(places: list[tuple[Part, int]]) -> KeptView:
    numbers: dict[int, int] = {}
    parts: list[Part] = []
    for part, _ in places:
        if numbers.setdefault(id(part), len(parts)) == len(parts):
            parts.append(part)
    part_N = np.array([numbers[id(part)] for part, _ in places], np.int64)
    return KeptView(parts, part_N, np.array([row for _, row in places], np.int64))


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
    return Picture(name, content, picture_digest(content))


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
