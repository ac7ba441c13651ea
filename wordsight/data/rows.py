"""What a row of a batch is beside its pixels: captions, label, weight, hard negatives; drawn by position, from samples or memory.

Shape legend: B rows, N samples, T captions of all samples, C captions of a row, K negatives of a row, M negatives of all samples,
L text length in tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wordsight.data.errors import BadSampleError
from wordsight.data.negation import negations
from wordsight.data.order import CAPTIONS, NEGATIVES, choose, sample_uniforms
from wordsight.data.shards import clean_captions
from wordsight.data.sources import Source
from wordsight.types import Sample

PROBED = 16  # samples at the beginning of a source that are looked at


@dataclass(frozen=True, slots=True)
class About:
    """One sample's texts and numbers.

    Attributes:
        captions: one or more.
        negatives: texts that are wrong for the picture, none of them a caption of it.
        label_id: a hash of its label, or of its place in the sources where it has none.
        weight: how much it counts.
    """

    captions: tuple[str, ...]
    negatives: tuple[str, ...]
    label_id: int
    weight: float


class RowMaker:
    """Turns samples into a batch's tensors other than pixels. The options are those of `Loader`."""

    def __init__(
        self,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        seed: int,
        first_caption_prob: float | None = None,
        captions_per_image: int = 1,
        num_negatives: int = 0,
        mined: Callable[[str], Sequence[str]] | None = None,
        negation: bool = False,
        weights: bool = False,
        weights_asked: bool = False,
    ) -> None:
        if captions_per_image < 1:
            raise ValueError(f"captions_per_image is 1 or more, got {captions_per_image}")
        if num_negatives < 0:
            raise ValueError(f"num_negatives is 0 or more, got {num_negatives}")
        self.tokenizer, self.seed = tokenizer, seed
        self.first_caption_prob, self.captions_per_image, self.num_negatives = (
            first_caption_prob,
            captions_per_image,
            num_negatives,
        )
        self.mined, self.negation = mined, negation
        self.weights, self._unexpected_weight = weights, weights_asked and not weights

    def about(self, sample: Sample, index: int) -> About:
        """A sample's texts and numbers.

        Raises:
            BadSampleError: it has neither caption nor label, or its negatives are no texts.
            ValueError: its weight is no weight.
        """
        captions = texts_of(sample)
        weight = 1.0
        if self.weights or self._unexpected_weight:
            weight = _weight(sample)
            if self._unexpected_weight and sample.meta.get("weight") is not None:
                raise ValueError(
                    f"{sample.key} has a weight ({sample.meta['weight']!r}) though the first sample of its source has none: set "
                    "data.weights=true to use weights (1 where there is none), or data.weights=false to ignore them"
                )
        negatives: list[str] = []
        if self.num_negatives:
            negatives += _given_negatives(sample)
            for caption in captions:
                negatives += self.mined(caption) if self.mined is not None else ()
                negatives += negations(caption) if self.negation else ()
        wrong = tuple(text for text in clean_captions(negatives) if text not in captions)
        return About(captions, wrong, _label_id(sample.label, index), weight)

    def collate(self, abouts: Sequence[About], positions: NDArray[np.int64]) -> dict[str, Any]:
        """The batch's tensors of samples drawn at `positions`.

        Returns:
            `tokens`, `text_ids`, `label_ids`, `weights`, `negatives`, `negatives_given` of a `Batch`.
        """
        captions_BC = self.choose_captions(np.array([len(one.captions) for one in abouts], np.int64), positions)
        texts = [one.captions[i] for one, row in zip(abouts, captions_BC.tolist(), strict=True) for i in row]
        found = self._pack(
            self.tokenizer(texts),
            text_ids(texts),
            torch.tensor([one.label_id for one in abouts], dtype=torch.int64),
            torch.tensor([one.weight for one in abouts], dtype=torch.float32),
        )
        if self.num_negatives:
            places_BK = self.choose_negatives(np.array([len(one.negatives) for one in abouts], np.int64), positions)
            wrong = [one.negatives[i] if i >= 0 else "" for one, row in zip(abouts, places_BK.tolist(), strict=True) for i in row]
            found |= self._pack_negatives(self.tokenizer(wrong), places_BK)
        return found

    def keep(self, abouts: Sequence[About | None]) -> KeptRows:
        """The same from memory: every text tokenised once (None: a sample that can't be read)."""
        return KeptRows(self, abouts)

    def choose_captions(self, counts_B: NDArray[np.int64], positions_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, C] which of its captions each row gets: different ones, then the same again."""
        first_B = caption_index(counts_B, sample_uniforms(self.seed, positions_B), self.first_caption_prob)
        if self.captions_per_image == 1:
            return first_B[:, None]
        places_BC = choose(self.seed, CAPTIONS, positions_B, counts_B, self.captions_per_image, first_B)
        again_BC = np.arange(self.captions_per_image)[None, :] % np.maximum(counts_B, 1)[:, None]
        return np.take_along_axis(places_BC, again_BC, axis=1)

    def choose_negatives(self, counts_B: NDArray[np.int64], positions_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, K] which of its negatives each row gets; -1 where there are fewer."""
        return choose(self.seed, NEGATIVES, positions_B, counts_B, self.num_negatives)

    def _pack(self, tokens: Tensor, ids: Tensor, label_ids: Tensor, weights: Tensor) -> dict[str, Any]:
        if self.captions_per_image > 1:
            rows = len(label_ids)
            tokens = tokens.view(rows, self.captions_per_image, tokens.shape[-1])
            ids = ids.view(rows, self.captions_per_image)
        return {"tokens": tokens, "text_ids": ids, "label_ids": label_ids, "weights": weights if self.weights else None}

    def _pack_negatives(self, tokens: Tensor, places_BK: NDArray[np.int64]) -> dict[str, Any]:
        return {
            "negatives": tokens.view(*places_BK.shape, tokens.shape[-1]),
            "negatives_given": torch.from_numpy(places_BK >= 0),
        }


class KeptRows:
    """The texts of all samples as tokens in memory; `collate` gives what `RowMaker.collate` gives."""

    def __init__(self, maker: RowMaker, abouts: Sequence[About | None]) -> None:
        self._maker = maker
        captions = [one.captions if one is not None else () for one in abouts]
        self._counts_N, self._firsts_N = _spans(captions)
        texts = [text for own in captions for text in own]
        self._tokens_TL = maker.tokenizer(texts).to(torch.int32)
        self._text_ids_T = text_ids(texts)
        self._label_ids_N = torch.tensor([one.label_id if one is not None else 0 for one in abouts], dtype=torch.int64)
        self._weights_N = torch.tensor([one.weight if one is not None else 0.0 for one in abouts], dtype=torch.float32)
        if maker.num_negatives:
            negatives = [one.negatives if one is not None else () for one in abouts]
            self._num_negatives_N, self._first_negatives_N = _spans(negatives)
            different = {
                text: place for place, text in enumerate(dict.fromkeys(["", *(text for own in negatives for text in own)]))
            }
            self._negative_of_M = np.array([different[text] for own in negatives for text in own] or [0], np.int64)
            self._negatives_L = maker.tokenizer(list(different)).to(torch.int32)  # a row each; the first one is ""

    def collate(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> dict[str, Any]:
        """The batch's tensors of samples `rows` drawn at `positions`."""
        maker = self._maker
        captions_BC = maker.choose_captions(self._counts_N[rows], positions)
        chosen = torch.from_numpy((self._firsts_N[rows][:, None] + captions_BC).reshape(-1))
        samples = torch.from_numpy(rows)
        found = maker._pack(
            self._tokens_TL[chosen].to(torch.int64),
            self._text_ids_T[chosen],
            self._label_ids_N[samples],
            self._weights_N[samples],
        )
        if maker.num_negatives:
            places_BK = maker.choose_negatives(self._num_negatives_N[rows], positions)
            at_BK = np.where(places_BK >= 0, self._first_negatives_N[rows][:, None] + places_BK, 0)
            texts_BK = np.where(places_BK >= 0, self._negative_of_M[at_BK], 0)
            tokens = self._negatives_L[torch.from_numpy(texts_BK.reshape(-1))].to(torch.int64)
            found |= maker._pack_negatives(tokens, places_BK)
        return found


def _spans(lists: Sequence[Sequence[str]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How long each list is, and where it begins when all are laid one after the other."""
    counts = np.array([len(one) for one in lists], np.int64)
    return counts, np.cumsum(counts) - counts


def texts_of(sample: Sample) -> tuple[str, ...]:
    """The captions of a sample; its label where it has none.

    Raises:
        BadSampleError: it has neither.
    """
    if sample.captions:
        return sample.captions
    if sample.label:
        return (sample.label,)
    raise BadSampleError(sample.key, "has neither caption nor label")


def caption_index(num_captions: Any, uniforms: NDArray[np.float64], first_caption_prob: float | None) -> NDArray[np.int64]:
    """Which caption is taken: the first with probability `first_caption_prob` and else another; None takes any evenly.

    Args:
        num_captions: 1 or more; one number or an array.
        uniforms: [..., 2] in [0, 1).
        first_caption_prob: in [0, 1], or None.
    """
    if first_caption_prob is None:
        return np.asarray(uniforms[..., 0] * num_captions).astype(np.int64)
    other = 1 + (uniforms[..., 1] * (num_captions - 1)).astype(np.int64)
    return np.where((uniforms[..., 0] < first_caption_prob) | (np.asarray(num_captions) == 1), 0, other)


def text_ids(texts: Sequence[str]) -> Tensor:
    """[N] int64, equal where two texts are equal, on every rank and in every run: 64 bits of a hash."""
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return torch.from_numpy(np.frombuffer(digests, dtype="<i8").astype(np.int64))


def has_weights(sources: Sequence[Source]) -> bool:
    """Whether the first readable sample of any source carries a weight (of the first 16, where some can't be read)."""
    for source in sources:
        for index in range(min(len(source), PROBED)):
            try:
                sample = source[index]
            except BadSampleError:
                continue
            if sample.meta.get("weight") is not None:
                return True
            break
    return False


def _label_id(label: str | None, index: int) -> int:
    """64 bits of a hash; of the sample's place, with another key, where it has no label."""
    text, kind = (str(index), b"place") if label is None else (label, b"label")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "little", signed=True)


def _weight(sample: Sample) -> float:
    value = sample.meta.get("weight")
    if value is None:
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(
            f"{sample.key} has the weight {value!r}; a weight is a finite number, 0 or more: mend it, or set "
            "data.weights=false to ignore weights"
        )
    return weight


def _given_negatives(sample: Sample) -> list[str]:
    value = sample.meta.get("negatives")
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise BadSampleError(sample.key, f'has "negatives" that are no list of texts: {value!r:.80}')
    return list(value)
