"""Position in, batch out: the training loader.

The batch of step k is a pure function of (sources, seed, batch size, k): `BatchOrder` says which samples, and each row's
caption, crop and flip are drawn from (seed, position), position = k B + row. So workers and ranks hold no state, give the same
batches however many they are, and resuming at the exact sample is `batches(start_step)`.

- *sample seen*: one row drawn for a training batch, bad ones included.
- *epoch*: `samples_per_epoch` samples seen (default: the size of the sources), whatever the sampling. Draws go on over the end
  of a pass, so every batch is full.
- *step*: one global batch of `batch_size` rows drawn.

Shape legend: B rows of this rank's slice, N samples, C captions of all samples, H height, W width, L text length in tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from wordsight.data.decode import decode, decode_array
from wordsight.data.errors import BadReport, BadSampleError
from wordsight.data.order import BatchOrder, Sampling, Shuffle, sample_rng, sample_uniforms
from wordsight.data.sources import ConcatSource, DataSource, Source, open_source
from wordsight.data.transform import Preprocess, TrainTransform
from wordsight.types import BadSample, Batch, Sample


class Tokenizer(Protocol):
    """Texts -> int64 [N, L]."""

    def __call__(self, texts: list[str]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Request:
    """What a worker is asked for: which samples, drawn at which positions."""

    first_position: int
    rows: NDArray[np.int64]

    @property
    def positions(self) -> NDArray[np.int64]:
        return np.arange(self.first_position, self.first_position + len(self.rows))


class _BatchMaker(Dataset[Batch]):
    """Reads, decodes, transforms, tokenises and collates one rank's slice of one batch; it has no state that changes."""

    def __init__(
        self,
        source: Source,
        transform: Preprocess | TrainTransform,
        tokenizer: Tokenizer,
        seed: int,
        first_caption_prob: float | None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.tokenizer = tokenizer
        self.seed = seed
        self.first_caption_prob = first_caption_prob

    def __getitem__(self, request: _Request) -> Batch:
        size_px = self.transform.image_size_px
        pixels = torch.empty(len(request.rows), 3, size_px, size_px, dtype=torch.uint8)
        texts: list[str] = []
        keys: list[str] = []
        kept: list[int] = []
        bad: list[BadSample] = []
        uniforms_B2 = sample_uniforms(self.seed, request.positions)
        for row, (index, position) in enumerate(zip(request.rows.tolist(), request.positions.tolist(), strict=True)):
            try:
                sample = self.source[index]
                captions = texts_of(sample)
                pixels[len(kept)] = make_pixels(sample, self.transform, self.seed, position)
            except BadSampleError as error:
                bad.append(error.record)
                continue
            texts.append(captions[int(caption_index(len(captions), uniforms_B2[row], self.first_caption_prob))])
            keys.append(sample.key)
            kept.append(index)
        return Batch(
            pixels=pixels[: len(kept)],
            tokens=self.tokenizer(texts),
            text_ids=text_ids(texts),
            image_ids=torch.tensor(kept, dtype=torch.int64),
            keys=tuple(keys),
            bad=tuple(bad),
        )


class _CachedBatchMaker(_BatchMaker):
    """The same batches from memory: every picture decoded and every caption tokenised once."""

    def __init__(self, maker: _BatchMaker, report: BadReport) -> None:
        super().__init__(maker.source, maker.transform, maker.tokenizer, maker.seed, maker.first_caption_prob)
        size_px = self.transform.image_size_px
        number = len(self.source)
        self._pixels_N3HW = torch.zeros(number, 3, size_px, size_px, dtype=torch.uint8)
        self._keys: list[str] = []
        self._bad: dict[int, BadSample] = {}
        self._firsts = np.zeros(number + 1, dtype=np.int64)
        texts: list[str] = []
        for index in range(number):
            key = ""
            try:
                sample = self.source[index]
                captions = texts_of(sample)
                self._pixels_N3HW[index] = make_pixels(sample, self.transform, self.seed, 0)  # a Preprocess draws nothing
                key = sample.key
                texts += captions
            except BadSampleError as error:
                self._bad[index] = error.record
            self._keys.append(key)
            self._firsts[index + 1] = len(texts)
            report.add(1, [self._bad[index]] if index in self._bad else [])
        self._tokens_CL = self.tokenizer(texts).to(torch.int32)
        self._text_ids_C = text_ids(texts)

    def __getitem__(self, request: _Request) -> Batch:
        drawn = request.rows.tolist()
        good = np.array([index not in self._bad for index in drawn], dtype=bool)
        rows = request.rows[good]
        firsts = self._firsts[rows]
        uniforms_B2 = sample_uniforms(self.seed, request.positions[good])
        chosen = torch.from_numpy(firsts + caption_index(self._firsts[rows + 1] - firsts, uniforms_B2, self.first_caption_prob))
        image_ids = torch.from_numpy(rows)
        return Batch(
            pixels=self._pixels_N3HW[image_ids],
            tokens=self._tokens_CL[chosen].to(torch.int64),
            text_ids=self._text_ids_C[chosen],
            image_ids=image_ids,
            keys=tuple(self._keys[index] for index in rows.tolist()),
            bad=tuple(self._bad[index] for index in drawn if index in self._bad),
        )


class Loader:
    """Batches of training, endless, deterministic and resumable at any step.

    Args:
        sources: one or several of what `open_source` takes, or opened sources; `DataSource.weight` mixes them.
        batch_size: rows of the global batch; every rank gets an equal, consecutive slice of it.
        transform: a TrainTransform (random crops), or a Preprocess (augmentation happens elsewhere).
        tokenizer: texts -> int64 [N, L].
        seed: of the order, the captions and the crops.
        sampling: "epoch" goes through the sources in passes, every sample once a pass; "replacement" draws each row by itself.
        num_samples: samples in an epoch, for counting; default: the size of the sources.
        rank, world_size: which slice of the batch this process gets.
        num_workers: processes that make batches; 0 makes them in this one.
        first_caption_prob: how often the first caption is taken, otherwise one of the others evenly; None takes all evenly. A
            sample without captions is described by its label.
        max_bad_share: the share of bad samples above which reading stops with an error.
        shuffle: the order of a pass: "auto", "full", "window" or "none", see `PassOrder`.
        cache_decoded: decode everything once into memory (needs a Preprocess, and N x 3 x size x size bytes).

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        sources: str | os.PathLike[str] | DataSource | Source | Sequence[str | os.PathLike[str] | DataSource | Source],
        *,
        batch_size: int,
        transform: Preprocess | TrainTransform,
        tokenizer: Tokenizer,
        seed: int = 0,
        sampling: Sampling = "epoch",
        num_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        first_caption_prob: float | None = None,
        max_bad_share: float = 0.05,
        shuffle: Shuffle = "auto",
        cache_decoded: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size is the global batch, a multiple of the {world_size} processes, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        if sampling not in ("epoch", "replacement"):
            raise ValueError(f"sampling is 'epoch' or 'replacement', got {sampling!r}")
        if shuffle not in ("auto", "full", "window", "none"):
            raise ValueError(f"shuffle is 'auto', 'full', 'window' or 'none', got {shuffle!r}")
        if first_caption_prob is not None and not 0 <= first_caption_prob <= 1:
            raise ValueError(f"first_caption_prob is a probability from 0 to 1, or None, got {first_caption_prob}")
        if num_workers < 0:
            raise ValueError(f"num_workers is 0 or more, got {num_workers}")
        if cache_decoded and not isinstance(transform, Preprocess):
            raise ValueError(
                "cache_decoded keeps one picture of each sample: give a Preprocess, and augment the batches on the device"
            )
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples is the samples of an epoch, 1 or more, got {num_samples}")
        opened, weights = _open_all(sources)
        source = opened[0] if len(opened) == 1 else ConcatSource(opened)
        self.source = source
        self.batch_size = batch_size
        self.samples_per_epoch = len(source) if num_samples is None else num_samples
        self.steps_per_epoch = -(-self.samples_per_epoch // batch_size)
        self.bad = BadReport(max_bad_share, total=len(source), known=source.bad)
        self._slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._num_workers = 0 if cache_decoded else num_workers
        self._order = BatchOrder(
            [one.part_sizes for one in opened],
            weights=weights,
            batch_size=batch_size,
            seed=seed,
            sampling=sampling,
            shuffle=shuffle,
        )
        self._maker = _BatchMaker(source, transform, tokenizer, seed, first_caption_prob)
        if cache_decoded:
            self._maker = _CachedBatchMaker(self._maker, self.bad)

    def _requests(self, start_step: int) -> Iterator[_Request]:
        for step in itertools.count(start_step):
            yield _Request(step * self.batch_size + self._slice.start, self._order.rows(step)[self._slice])

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches of this rank from `start_step` on, without end.

        A batch whose rows were all bad is empty. Bad samples are counted in `bad` as their batches come.

        Raises:
            TooManyBadSamplesError: more than `max_bad_share` of the samples are bad.
            RuntimeError: a worker process died.
        """
        if start_step < 0:
            raise ValueError(f"start_step is 0 or more, got {start_step}")
        for batch in run_workers(self._maker, self._requests(start_step), self._num_workers):
            self.bad.add(self._slice.stop - self._slice.start, batch.bad)
            yield batch


def run_workers(dataset: Dataset[Any], requests: Iterator[Any], num_workers: int) -> Iterator[Any]:
    """`dataset[request]` for each request, in order, made in `num_workers` processes (0: in this one)."""
    if num_workers == 0:
        return (dataset[request] for request in requests)
    return iter(
        DataLoader(
            dataset,
            sampler=requests,
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator(),  # else torch's global random numbers would depend on the number of workers
        )
    )


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


def make_pixels(sample: Sample, transform: Preprocess | TrainTransform, seed: int, position: int) -> Tensor:
    """A sample's picture as uint8 [3, H, W], as it is drawn at `position` of training.

    A TrainTransform's crop is resized by torch's uint8 kernels, which differ from PIL's by a few levels at most and are several
    times faster; a Preprocess gives the reference's pixels exactly.
    """
    if isinstance(transform, Preprocess):
        return transform.to_uint8(decode(sample.image, key=sample.key))
    rng = sample_rng(seed, position)
    size_px = transform.image_size_px
    # no crop is so small that halving the picture would take pixels away that its resize needs
    least_share = (transform.scale[0] * min(transform.ratio[0], 1 / transform.ratio[1])) ** 0.5
    array_HWC = decode_array(sample.image, key=sample.key, min_side_px=int(size_px / least_share))
    left, top, width, height = transform.draw_crop(array_HWC.shape[1], array_HWC.shape[0], rng)
    crop_HWC = torch.from_numpy(array_HWC[top : top + height, left : left + width])
    pixels = interpolate(crop_HWC.permute(2, 0, 1)[None], size=(size_px, size_px), mode=transform.interpolation, antialias=True)[
        0
    ]
    return pixels.flip(-1) if transform.flip and rng.random() < transform.flip else pixels


def text_ids(texts: Sequence[str]) -> Tensor:
    """[N] int64, equal where two texts are equal, on every rank and in every run: 64 bits of a hash."""
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return torch.from_numpy(np.frombuffer(digests, dtype="<i8").astype(np.int64))


def _open_all(sources: Any) -> tuple[list[Source], list[float] | None]:
    """The opened sources, and their weights where they have any."""
    specs = [sources] if isinstance(sources, (str, os.PathLike, DataSource)) or hasattr(sources, "part_sizes") else list(sources)
    if not specs:
        raise ValueError("no source of samples: name at least one shard, table or folder")
    opened: list[Source] = [spec if hasattr(spec, "part_sizes") else open_source(spec) for spec in specs]
    weights = [spec.weight if isinstance(spec, DataSource) else None for spec in specs]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        missing = [
            str(spec.path if isinstance(spec, DataSource) else spec) for spec, w in zip(specs, weights, strict=True) if w is None
        ]
        raise ValueError(f"either every source has a weight or none; these have none: {', '.join(missing)}")
    return opened, given or None
