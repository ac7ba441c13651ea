"""Features of pictures from a frozen image tower, computed once: of the fixed view, and of random views drawn beforehand.

A random view is drawn by (seed, view, the picture's bytes): never by its place, its batch or the machine. So a classifier trained
on kept features gets the numbers that it would get from the tower, and features can be kept in files by their content.

Shape legend: N pictures, V random views, D feature width, S image side in pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wordsight.data.decode import decode
from wordsight.data.errors import BadSampleError
from wordsight.data.transform import TrainTransform
from wordsight.evaluate.modes import judging
from wordsight.evaluate.results import fingerprint
from wordsight.types import Sample

if TYPE_CHECKING:
    from PIL import Image

Layer = Literal["projected", "penultimate"]
LAYERS = ("projected", "penultimate")
CROP_SCALE = (0.08, 1.0)  # of CoOp's and CLAP's training views, which are flipped half of the time
PART = 256  # pictures of one file of the cache
VIEWS_AT_ONCE = 8  # views of a picture that are held as pixels


@dataclass(frozen=True)
class ImageFeatures:
    """Features of N pictures, as estimators take them in place of the pictures.

    Attributes:
        plain: float32 [N, D] of the model's own preprocessing, not normalised.
        views: float32 [V, N, D] of random views, or None.
        layer: "projected" (what the model's `encode_image` gives) or "penultimate" (what its projection reads).
    """

    plain: Tensor
    views: Tensor | None = None
    layer: Layer = "projected"

    def __len__(self) -> int:
        return len(self.plain)

    def take(self, rows: Sequence[int] | np.ndarray | Tensor) -> ImageFeatures:
        """The features of some of the pictures, in that order."""
        index = torch.as_tensor(np.asarray(rows), dtype=torch.int64)
        return ImageFeatures(self.plain[index], None if self.views is None else self.views[:, index], self.layer)


def image_features(
    model: Any,
    pictures: Sequence[Any],
    *,
    num_views: int = 0,
    seed: int = 0,
    layer: Layer = "projected",
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ImageFeatures:
    """Compute the features of pictures with a frozen model.

    Args:
        model: an Embedder with `preprocessor`.
        pictures: paths, PIL images or Samples; a Source is such a sequence.
        num_views: V; view v of a picture is a random crop of 8 to 100% of its area, flipped half of the time.
        seed: of the random views.
        layer: which features.
        batch_size: pictures that the model sees at once.
        cache: a folder where parts of 256 pictures are kept by their content: model, view and the pictures' bytes. What is there
            whole is not computed again; another model or another picture is another file. None keeps nothing.
        progress: show a bar.

    Returns:
        The features, on the CPU, in the pictures' order.

    Raises:
        OSError: a picture can't be read; the message names it.
        ValueError: an unknown layer, or a model without it.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    encode = encoder(model, layer)
    if len(pictures) == 0:
        raise ValueError("no pictures: give at least one")
    folder = None if cache is None else Path(cache)
    identity = "" if folder is None else fingerprint(model, (), "", ["features", layer, CROP_SCALE])
    views: list[int | None] = [None, *range(num_views)]
    rows: list[list[Tensor]] = [[] for _ in views]
    threads = min(8, os.cpu_count() or 1)
    total = len(pictures) * len(views)
    with (
        judging(model) as device,
        ThreadPoolExecutor(threads, "wordsight-decode") as pool,
        tqdm(total=total, desc="pictures", unit="picture", disable=not progress) as bar,
    ):
        for start in range(0, len(pictures), PART):
            part = [pictures[i] for i in range(start, min(start + PART, len(pictures)))]
            read = list(pool.map(_read, range(start, start + len(part)), part))
            paths = [None if folder is None else folder / _name(identity, seed, view, read) for view in views]
            found = [None if path is None else _load(path, len(part)) for path in paths]
            missing = [v for v, tensor in enumerate(found) if tensor is None]
            for at in range(0, len(missing), VIEWS_AT_ONCE):
                these = missing[at : at + VIEWS_AT_ONCE]
                made = _encode(model, encode, device, pool, read, [views[v] for v in these], seed, batch_size, bar)
                for v, features_nD in zip(these, made, strict=True):
                    path = paths[v]
                    if path is not None:
                        _save(path, features_nD)
                    found[v] = features_nD
            bar.update(len(part) * (len(views) - len(missing)))
            for own, tensor in zip(rows, found, strict=True):
                assert tensor is not None
                own.append(tensor)
    plain, *drawn = [torch.cat(own) for own in rows]
    return ImageFeatures(plain, torch.stack(drawn) if drawn else None, layer)


def encoder(model: Any, layer: Layer) -> Callable[[Tensor], Tensor]:
    """Normalised pixels [B, 3, S, S] -> features [B, D] of that layer, not normalised."""
    if layer == "projected":
        return lambda pixels: model.encode_image(pixels, normalize=False)
    features: Callable[[Tensor], Tensor] | None = getattr(getattr(model, "image_tower", None), "features", None)
    if features is None:
        raise ValueError(f"{type(model).__name__}'s image tower has no penultimate features: use layer='projected'")
    return features


@dataclass(frozen=True)
class _Picture:
    """A picture that has been read: its name, its bytes or pixels, and their digest."""

    name: str
    content: bytes | Image.Image
    digest: bytes


def _read(position: int, item: Any) -> _Picture:
    """A path, PIL image or Sample, read but not decoded; runs in a thread."""
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
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        digest.update(f"{content.mode} {content.size}".encode())
        digest.update(content.tobytes())
    return _Picture(name, content, digest.digest())


def _encode(
    model: Any,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    pool: ThreadPoolExecutor,
    pictures: Sequence[_Picture],
    views: Sequence[int | None],
    seed: int,
    batch_size: int,
    bar: tqdm,
) -> list[Tensor]:
    """The features [n, D] of some views (None: the fixed one) of n pictures, each decoded once."""
    preprocessor = model.preprocessor
    draw = TrainTransform(preprocessor.image_size_px, CROP_SCALE, flip=0.5, interpolation=preprocessor.interpolation)

    def pixels(picture: _Picture) -> Tensor:
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

    dtype = next(model.parameters()).dtype
    rows: list[list[Tensor]] = [[] for _ in views]
    for batch in _batches(pictures, max(1, batch_size // len(views))):
        pixels_BVCHW = torch.stack(list(pool.map(pixels, batch)))
        normal = preprocessor.normalize(pixels_BVCHW.flatten(0, 1).to(device)).to(dtype)
        features_BVD = encode(normal).float().cpu().unflatten(0, (len(batch), len(views)))
        if not torch.isfinite(features_BVD).all():
            first = int((~torch.isfinite(features_BVD)).flatten(1).any(1).nonzero()[0, 0])
            raise ValueError(f"the model gives infinite or undefined features, first for {batch[first].name}")
        for own, features_BD in zip(rows, features_BVD.unbind(1), strict=True):
            own.append(features_BD.clone())
        bar.update(len(batch) * len(views))
    return [torch.cat(own) for own in rows]


def _batches(pictures: Sequence[_Picture], size: int) -> Iterator[Sequence[_Picture]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def _name(identity: str, seed: int, view: int | None, pictures: Sequence[_Picture]) -> str:
    digest = hashlib.blake2b(f"{identity} {'plain' if view is None else (seed, view)}".encode(), digest_size=20)
    for picture in pictures:
        digest.update(picture.digest)
    return f"{digest.hexdigest()}.features"


def _load(path: Path, num_rows: int) -> Tensor | None:
    """The features in a file, None where it is absent or damaged (which is then made anew)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, body = content[:16], content[16:]
    if hashlib.blake2b(body, digest_size=16).digest() != digest or len(body) % (4 * num_rows):
        return None
    return torch.frombuffer(bytearray(body), dtype=torch.float32).view(num_rows, -1)


def _save(path: Path, features: Tensor) -> None:
    """Whole or not at all, with a checksum in front."""
    body = features.contiguous().numpy().tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(hashlib.blake2b(body, digest_size=16).digest())
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
