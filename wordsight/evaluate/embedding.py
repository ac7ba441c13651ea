"""From a model and a data set to embeddings, once for every measurement: what a judge needs of an Embedder and of a Source.

Shape legend: N pictures, M texts, D embedding width, K vectors of one picture, L text length in tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from wordsight.data import Source, iterate, open_source
from wordsight.data.errors import BadReport
from wordsight.data.features_in import VectorSource
from wordsight.data.reader import Read, picture_pixels
from wordsight.data.selection import Selection
from wordsight.data.texts import text_batches
from wordsight.evaluate.feature_cache import KeptFeatures, Layer, encoder
from wordsight.evaluate.modes import judging
from wordsight.evaluate.sharing import ALONE, Processes, in_order, own_pieces, together
from wordsight.system import PairScorer
from wordsight.types import BadSample, Sample

CAPABILITIES = ("encode_image", "encode_text", "preprocess", "tokenize")


@dataclass(frozen=True, slots=True)
class Embedded:
    """The pictures of a data set as vectors, with what the data says of each.

    Attributes:
        source: where the pictures came from (to show some of them again).
        images_ND: float32 on the CPU. Projected: L2-normalised; what `encode_image` gave, [N, K, D] too, where the model is a
            PairScorer. Penultimate: as the projection reads them, not normalised.
        positions: [N] index of each picture in `source`.
        keys, captions, labels: what the source says of each picture.
        bad: the samples that could not be read; they are not among the N.
        listing: hash of the keys, captions, labels and encoded bytes of the N, in order.
        reduced_decode: whether large JPEGs were decoded at a reduced scale; figures of them say so.
        layer: "projected", which meets texts, or "penultimate", what the image tower's projection reads.
    """

    source: Source
    images_ND: Tensor
    positions: tuple[int, ...]
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[str | None, ...]
    bad: tuple[BadSample, ...]
    listing: str
    reduced_decode: bool = False
    layer: Layer = "projected"

    @property
    def how(self) -> str:
        """What a protocol says of how the pictures were read, after a comma; nothing where it was exact."""
        given = ", given vectors" if isinstance(self.source, VectorSource) else ""
        return given + (", reduced decoding" if self.reduced_decode else "")

    def require_projected(self) -> None:
        """Raise a ValueError where these vectors can not be compared with texts."""
        if self.layer != "projected":
            raise ValueError(
                f"these are {self.layer} features, which do not lie in the space of texts: embed the pictures with "
                "layer='projected'"
            )

    def __len__(self) -> int:
        return len(self.keys)


def require_embedder(model: Any) -> None:
    """Raise a ValueError that names the methods of an Embedder that `model` lacks."""
    missing = [name for name in CAPABILITIES if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(f'{name}()' for name in missing)}: this measurement needs a model that "
            "embeds pictures and texts (wordsight.system.Embedder)"
        )


def _checked(vectors: Tensor, what: str) -> Tensor:
    """Float32 on the CPU; a NaN would win or lose every comparison unseen."""
    vectors = vectors.float().cpu()
    if not torch.isfinite(vectors).all():
        raise ValueError(
            f"the model gives infinite or undefined embeddings, first for {what}: its weights are damaged or have diverged"
        )
    return vectors


def _unit(model: Any, vectors: Tensor) -> Tensor:
    """Unit vectors, unless the model scores pairs itself."""
    return vectors if isinstance(model, PairScorer) else normalize(vectors, dim=-1)


def embed_texts(
    model: Any, texts: Sequence[str], *, batch_size: int = 256, description: str | None = None, world: Processes = ALONE
) -> Tensor:
    """Unit vectors of texts (what `encode_text` gives, for a PairScorer): equal texts are encoded once, and those of like length
    together.

    Args:
        model: an Embedder.
        texts: M texts.
        batch_size: texts encoded at once.
        description: the name of a progress bar, none without it.
        world: the processes that share the batches; each gets all vectors.

    Returns:
        float32 [M, D] on the CPU.
    """
    require_embedder(model)
    if not texts:
        raise ValueError("no texts to embed")
    batches, rows_M = text_batches(texts, batch_size)
    own = own_pieces(world, len(batches))

    def work() -> dict[int, Tensor]:
        found = {}
        with judging(model) as device:
            for k in tqdm(own, desc=description, unit="batch", disable=description is None or world.rank > 0):
                tokens = model.tokenize(batches[k]).to(device)
                found[k] = _unit(model, _checked(model.encode_text(tokens), f"the text {batches[k][0]!r}")).clone()
        return found

    vectors_UD = _in_order_of_all(world, work)
    assert vectors_UD is not None
    return vectors_UD[rows_M]


def embed_source(
    model: Any,
    data: Source | str | Path,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad_share: float = 0.05,
    reduced_decode: bool = False,
    progress: bool = False,
    world: Processes = ALONE,
    cache: str | os.PathLike[str] | None = None,
    layer: Layer = "projected",
) -> Embedded:
    """The vectors of all readable pictures of a data set, in its order.

    Args:
        model: an Embedder.
        data: a Source, or what `wordsight.data.open_source` takes (a path, a glob, `sample:test-twemoji-seen`).
        batch_size: pictures encoded at once.
        num_workers: processes that decode; 0 decodes in this one.
        max_bad_share: a larger share of unreadable pictures is an error that names the first ten.
        reduced_decode: decode large JPEGs at a reduced scale (`wordsight.data.iterate`); the model needs a `preprocessor`.
        progress: show a bar.
        world: the processes that share the batches; each gets all vectors.
        cache: a folder where features are kept by content: weights, preprocessing, layer, the pictures' bytes. What is there is
            neither decoded nor encoded again, in whatever order and set it comes; `wordsight.adapt` reads and writes the same
            files. None keeps nothing. The model needs a `preprocessor`.
        layer: "projected" gives unit vectors, which meet texts; "penultimate" what the image tower's projection reads, as it is.

    Raises:
        ValueError: too many pictures are bad, no picture could be read, reduced decoding or a cache of a model without
            `preprocessor`, or no such layer.
        OSError: the cache's disk is full; what is whole there stays, and the next call goes on from it.
    """
    require_embedder(model)
    _encoder(model, layer)
    source = open_source(str(data)) if isinstance(data, str | Path) else data
    if isinstance(source, VectorSource):
        return given_vectors(model, source, layer)
    own = own_pieces(world, -(-len(source) // batch_size))
    show = progress and world.rank == 0
    read: dict[int, _Read] = {}

    def work() -> dict[int, Tensor]:
        found = {}
        kept = None if cache is None else KeptFeatures(model, cache, layer, reduced_decode=reduced_decode)
        with kept or nullcontext(), judging(model) as device:
            known = None if kept is None else kept.known
            batches = _batches(model, source, own, batch_size, num_workers, max_bad_share, reduced_decode, show, known)
            for k, batch in zip(own, batches, strict=False):
                read[k] = _Read([_about(sample) for sample in batch.samples], batch.positions, batch.bad)
                if batch.samples:
                    vectors = _features(model, layer, batch, device, kept, reduced_decode)
                    found[k] = (_unit(model, vectors) if layer == "projected" else vectors).clone()
        return found

    images_ND = _in_order_of_all(world, work)
    everyone = {k: one for part in world.gather_objects(read) for k, one in part.items()}
    report = BadReport(max_bad_share, total=len(source), known=getattr(source, "bad", ()))
    in_turn = [everyone[k] for k in sorted(everyone)]
    if world.size > 1:  # one process alone counts while it reads; several see only now how many there are in all
        for one in in_turn:
            report.add(len(one.samples) + len(one.bad), one.bad)
    bad = [*getattr(source, "bad", ()), *(sample for one in in_turn for sample in one.bad)]
    if images_ND is None:
        reasons = "; ".join(f"{one.key}: {one.reason}" for one in bad[:10])
        raise ValueError(f"no picture could be read from {data}" + (f" ({len(bad)} bad: {reasons})" if bad else ": it is empty"))
    listing = hashlib.sha256()
    for key, captions, label, content in (about for one in in_turn for about in one.samples):
        listing.update(repr((key, captions, label)).encode())
        listing.update(content)
    positions = tuple(position for one in in_turn for position in one.positions)
    keys, captions, labels, _ = zip(*(about for one in in_turn for about in one.samples), strict=True)
    return Embedded(source, images_ND, positions, keys, captions, labels, tuple(bad), listing.hexdigest(), reduced_decode, layer)


def _encoder(model: Any, layer: Layer) -> Callable[[Tensor], Tensor]:
    """`feature_cache.encoder`; a PairScorer says itself what is kept of a picture."""
    if layer == "projected" and isinstance(model, PairScorer):
        encode: Callable[[Tensor], Tensor] = model.encode_image  # type: ignore[attr-defined]
        return encode
    return encoder(model, layer)


def _features(model: Any, layer: Layer, batch: Read, device: torch.device, kept: KeptFeatures | None, reduced: bool) -> Tensor:
    """Features [B, ...] of a batch, as the tower gives them: those that are kept, and the others made now."""
    encode = _encoder(model, layer)

    def make(rows: Sequence[int], pixels: Tensor) -> Tensor:
        parameter = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
        pixels = pixels.to(device, None if parameter is None else parameter.dtype)
        return _checked(encode(pixels), batch.samples[rows[0]].key)

    if kept is None:
        return make(batch.decoded, batch.pixels)
    if batch.decoded:
        kept.put([batch.digests[i] for i in batch.decoded], make(batch.decoded, batch.pixels))
    found = [kept.get(digest) for digest in batch.digests]
    damaged = [i for i, row in enumerate(found) if row is None]  # known, so not decoded, but damaged when it was read
    if damaged:
        preprocess = model.preprocessor
        pixels = torch.stack([picture_pixels(batch.samples[i], preprocess, reduced) for i in damaged])
        kept.put([batch.digests[i] for i in damaged], make(damaged, preprocess.normalize(pixels)))
        found = [kept.get(digest) for digest in batch.digests]
    return torch.stack([row for row in found if row is not None])


def given_vectors(model: Any, source: VectorSource, layer: Layer = "projected") -> Embedded:
    """Vectors of pictures that were made elsewhere, in the place of this model's own.

    Args:
        model: whose texts they meet; None where no text is asked. That they are this model's can't be told.
        source: of `open_source`.
        layer: what they are: "projected" ones must be unit vectors.

    Raises:
        ValueError: projected vectors that are not of unit length, or of another width than the model's texts.
    """
    images_ND = torch.from_numpy(np.array(source.vectors_ND, dtype=np.float32))
    if layer == "projected":
        lengths_N = images_ND.norm(dim=1)
        far = torch.nonzero((lengths_N - 1).abs() > 1e-2).flatten()
        if len(far):
            row = int(far[0])
            raise ValueError(
                f"{len(far):,} of {len(source):,} given vectors are not of unit length, first {source.keys[row]!r} with "
                f"{lengths_N[row]:.4g}: divide each by its length, or use them as penultimate features (layer='penultimate')"
            )
        images_ND = normalize(images_ND, dim=-1)
        if model is not None:
            width = embed_texts(model, ["a"]).shape[1]
            if isinstance(model, PairScorer) or width != images_ND.shape[1]:
                raise ValueError(
                    f"the given vectors have {images_ND.shape[1]:,} numbers, this model's texts {width:,}: they are of another "
                    "model"
                )
    listing = hashlib.sha256(images_ND.numpy().tobytes())
    listing.update(repr((source.keys, source.captions, source.labels)).encode())
    positions = tuple(range(len(source)))
    return Embedded(
        source, images_ND, positions, source.keys, source.captions, source.labels, (), listing.hexdigest(), False, layer
    )


_About = tuple[str, tuple[str, ...], str | None, bytes]  # key, captions, label, SHA-256 of the encoded picture


class _Read(NamedTuple):
    """A batch without its pictures."""

    samples: list[_About]
    positions: tuple[int, ...]
    bad: tuple[BadSample, ...]


def _about(sample: Sample) -> _About:
    encoded = sample.image if isinstance(sample.image, bytes) else sample.image.tobytes()
    return sample.key, tuple(sample.captions), sample.label, hashlib.sha256(encoded).digest()


def _batches(
    model: Any,
    source: Source,
    own: range,
    batch_size: int,
    num_workers: int,
    max_bad_share: float,
    reduced_decode: bool,
    progress: bool,
    known: frozenset[bytes] | None,
) -> Iterator[Read]:
    """The batches of `own` numbers among the consecutive ones of a source, with positions in the source."""
    preprocess = getattr(model, "preprocessor", None) or model.preprocess
    whole = own.step == 1
    positions = (
        range(len(source)) if whole else [i for k in own for i in range(k * batch_size, min((k + 1) * batch_size, len(source)))]
    )
    part = source if whole else Selection(source, positions)
    share = max_bad_share if whole else 1.0
    num_bad = 0
    with tqdm(total=len(positions), desc="pictures", unit="picture", disable=not progress) as bar:
        for batch in iterate(
            part,
            preprocess,
            batch_size=batch_size,
            num_workers=num_workers,
            max_bad_share=share,
            reduced_decode=reduced_decode,
            known=known,
        ):
            bar.update(len(batch.samples) + len(batch.bad))
            yield replace(batch, positions=tuple(positions[i] for i in batch.positions))
            num_bad += len(batch.bad)
            if num_bad > max_bad_share * len(source):
                return  # too many already, whatever the other processes find: the count of all will say so


def _in_order_of_all(world: Processes, work: Callable[[], dict[int, Tensor]]) -> Tensor | None:
    """The rows that `work` gives in all processes, by number; None where there are none at all."""
    mine: dict[int, Tensor] = {}

    def count() -> int:
        mine.update(work())
        return len(mine)

    return in_order(world, mine) if any(together(world, count)) else None
