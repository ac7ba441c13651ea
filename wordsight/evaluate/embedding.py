"""From a model and a data set to embeddings, once for every measurement: what a judge needs of an Embedder and of a Source.

Shape legend: N pictures, M texts, D embedding width, K vectors of one picture, L text length in tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from wordsight.data import Source, iterate, open_source
from wordsight.evaluate.modes import judging
from wordsight.system import PairScorer
from wordsight.types import BadSample

CAPABILITIES = ("encode_image", "encode_text", "preprocess", "tokenize")


@dataclass(frozen=True, slots=True)
class Embedded:
    """The pictures of a data set as vectors, with what the data says of each.

    Attributes:
        source: where the pictures came from (to show some of them again).
        images_ND: float32 on the CPU, L2-normalised; what `encode_image` gave, [N, K, D] too, where the model is a PairScorer.
        positions: [N] index of each picture in `source`.
        keys, captions, labels: what the source says of each picture.
        bad: the samples that could not be read; they are not among the N.
        listing: hash of the keys, captions, labels and encoded bytes of the N, in order.
    """

    source: Source
    images_ND: Tensor
    positions: tuple[int, ...]
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[str | None, ...]
    bad: tuple[BadSample, ...]
    listing: str

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


def _kept(model: Any, vectors: Tensor, what: str) -> Tensor:
    """Checked float32 on the CPU, unit vectors unless the model scores pairs itself: a NaN would win or lose every comparison
    unseen."""
    vectors = vectors.float().cpu()
    if not torch.isfinite(vectors).all():
        raise ValueError(
            f"the model gives infinite or undefined embeddings, first for {what}: its weights are damaged or have diverged"
        )
    return vectors if isinstance(model, PairScorer) else normalize(vectors, dim=-1)


def embed_texts(model: Any, texts: Sequence[str], *, batch_size: int = 256, description: str | None = None) -> Tensor:
    """Unit vectors of texts (what `encode_text` gives, for a PairScorer): equal texts are encoded once, and those of like length
    together.

    Args:
        model: an Embedder.
        texts: M texts.
        batch_size: texts encoded at once.
        description: the name of a progress bar, none without it.

    Returns:
        float32 [M, D] on the CPU.
    """
    require_embedder(model)
    if not texts:
        raise ValueError("no texts to embed")
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    parts = []
    with judging(model) as device, tqdm(total=len(unique), desc=description, unit="text", disable=description is None) as bar:
        for start in range(0, len(unique), batch_size):
            chunk = unique[start : start + batch_size]
            parts.append(_kept(model, model.encode_text(model.tokenize(chunk).to(device)), f"the text {chunk[0]!r}"))
            bar.update(len(chunk))
        place = {text: i for i, text in enumerate(unique)}
        return torch.cat(parts)[torch.tensor([place[text] for text in texts])]


def embed_source(
    model: Any,
    data: Source | str | Path,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad_share: float = 0.05,
    progress: bool = False,
) -> Embedded:
    """Unit vectors of all readable pictures of a data set, in its order.

    Args:
        model: an Embedder.
        data: a Source, or what `wordsight.data.open_source` takes (a path, a glob, `sample:test-twemoji-seen`).
        batch_size: pictures encoded at once.
        num_workers: processes that decode; 0 decodes in this one.
        max_bad_share: a larger share of unreadable pictures is an error that names the first ten.
        progress: show a bar.

    Raises:
        ValueError: too many pictures are bad, or no picture could be read.
    """
    require_embedder(model)
    source = open_source(str(data)) if isinstance(data, str | Path) else data
    listing = hashlib.sha256()
    parts: list[Tensor] = []
    rows: list[tuple[int, str, tuple[str, ...], str | None]] = []
    bad: list[BadSample] = list(getattr(source, "bad", ()))
    preprocess = getattr(model, "preprocessor", None) or model.preprocess
    with judging(model) as device, tqdm(total=len(source), desc="pictures", unit="picture", disable=not progress) as bar:
        for batch in iterate(source, preprocess, batch_size=batch_size, num_workers=num_workers, max_bad_share=max_bad_share):
            bad.extend(batch.bad)
            bar.update(len(batch.samples) + len(batch.bad))
            if not batch.samples:
                continue
            parts.append(_kept(model, model.encode_image(batch.pixels.to(device)), batch.samples[0].key))
            for position, sample in zip(batch.positions, batch.samples, strict=True):
                rows.append((position, sample.key, tuple(sample.captions), sample.label))
                encoded = sample.image if isinstance(sample.image, bytes) else sample.image.tobytes()
                listing.update(repr((sample.key, tuple(sample.captions), sample.label)).encode())
                listing.update(hashlib.sha256(encoded).digest())
        if not rows:
            reasons = "; ".join(f"{one.key}: {one.reason}" for one in bad[:10])
            raise ValueError(
                f"no picture could be read from {data}" + (f" ({len(bad)} bad: {reasons})" if bad else ": it is empty")
            )
        images_ND = torch.cat(parts)
    positions, keys, captions, labels = zip(*rows, strict=True)
    return Embedded(source, images_ND, positions, keys, captions, labels, tuple(bad), listing.hexdigest())
