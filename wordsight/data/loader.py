"""Position in, batch out: the training loader.

The batch of step k is a pure function of (sources, seed, batch size, k): `BatchOrder` says which samples, and each row's
caption, crop and flip are drawn from (seed, position), position = k B + row. So workers and ranks hold no state, give the same
batches however many they are, and resuming at the exact sample is `batches(start_step)`.

- *sample seen*: one row drawn for a training batch, bad ones included.
- *epoch*: `samples_per_epoch` samples seen (default: the size of the sources), whatever the sampling. Draws go on over the end
  of a pass, so every batch is full.
- *step*: one global batch of `batch_size` rows drawn.

What a row is made of beside pixels and tokens (label, weight, several captions, hard negatives) is in `rows.py`.

Shape legend: B rows of this rank's slice, N samples, T captions of all samples, C captions of a row, K negatives of a row, M
negatives of all samples, H height, W width, L text length in tokens.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from wordsight.data.decode import REDUCED_MARGIN, decode, decode_divided, divisor, reduced_uint8
from wordsight.data.errors import BadReport, BadSampleError
from wordsight.data.negatives import NegativesTable
from wordsight.data.order import BatchOrder, Sampling, Shuffle, sample_rng
from wordsight.data.remote import ReadReport, RemoteConfig, RemoteFiles
from wordsight.data.rows import RowMaker, caption_index, has_weights, text_ids, texts_of
from wordsight.data.sources import ConcatSource, DataSource, Source, open_source, read_ahead, remote_files
from wordsight.data.transform import Preprocess, TrainTransform
from wordsight.types import BadSample, Batch, Sample

__all__ = ["Loader", "Tokenizer", "caption_index", "make_pixels", "run_workers", "text_ids", "texts_of"]


class Tokenizer(Protocol):
    """Texts -> int64 [N, L]."""

    def __call__(self, texts: list[str]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Request:
    """What a worker is asked for: which samples, drawn at which positions; and which ones it will be asked for next."""

    first_position: int
    rows: NDArray[np.int64]
    next_rows: NDArray[np.int64]

    @property
    def positions(self) -> NDArray[np.int64]:
        return np.arange(self.first_position, self.first_position + len(self.rows))


@dataclass(frozen=True, slots=True)
class _Made:
    """A batch, and what reading it from afar took."""

    batch: Batch
    reads: ReadReport

    def pin_memory(self) -> _Made:
        """For torch's DataLoader: the batch in memory that a GPU copies from directly."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self.batch.tensors().items()}
        return _Made(replace(self.batch, **pinned), self.reads)


class _BatchMaker(Dataset[_Made]):
    """Reads, decodes, transforms, tokenises and collates one rank's slice of one batch; it has no state that changes."""

    def __init__(self, source: Source, transform: Preprocess | TrainTransform, rows: RowMaker, seed: int, reduced: bool) -> None:
        self.source = source
        self.transform = transform
        self.rows = rows
        self.seed = seed
        self.reduced = reduced
        self._remote = remote_files(source)

    def __getitem__(self, request: _Request) -> _Made:
        return _Made(self.make(request), self.take_reads())

    def take_reads(self) -> ReadReport:
        """What reading from afar took since the last call."""
        report = ReadReport()
        for files in self._remote:
            report.add(files.take_report())
        return report

    def make(self, request: _Request) -> Batch:
        """The batch of a request."""
        size_px = self.transform.image_size_px
        pixels = torch.empty(len(request.rows), 3, size_px, size_px, dtype=torch.uint8)
        abouts = []
        keys: list[str] = []
        kept: list[int] = []
        bad: list[BadSample] = []
        if self._remote:
            read_ahead(self.source, [*request.rows.tolist(), *request.next_rows.tolist()])
        for row, (index, position) in enumerate(zip(request.rows.tolist(), request.positions.tolist(), strict=True)):
            try:
                sample = self.source[index]
                about = self.rows.about(sample, index)
                pixels[len(kept)] = make_pixels(sample, self.transform, self.seed, position, reduced=self.reduced)
            except BadSampleError as error:
                bad.append(error.record)
                continue
            abouts.append(about)
            keys.append(sample.key)
            kept.append(row)
        return Batch(
            pixels=pixels[: len(kept)],
            image_ids=torch.from_numpy(request.rows[kept]),
            keys=tuple(keys),
            bad=tuple(bad),
            **self.rows.collate(abouts, request.positions[kept]),
        )


class _CachedBatchMaker(_BatchMaker):
    """The same batches from memory: every picture decoded and every text tokenised once."""

    READ_AHEAD = 64  # samples

    def __init__(self, maker: _BatchMaker, report: BadReport) -> None:
        super().__init__(maker.source, maker.transform, maker.rows, maker.seed, maker.reduced)
        size_px = self.transform.image_size_px
        number = len(self.source)
        self._pixels_N3HW = torch.zeros(number, 3, size_px, size_px, dtype=torch.uint8)
        self._keys: list[str] = []
        self._bad: dict[int, BadSample] = {}
        abouts = []
        for index in range(number):
            if self._remote and index % self.READ_AHEAD == 0:
                read_ahead(self.source, range(index, min(index + 2 * self.READ_AHEAD, number)))
            key, about = "", None
            try:
                sample = self.source[index]
                about = self.rows.about(sample, index)
                # a Preprocess draws nothing
                self._pixels_N3HW[index] = make_pixels(sample, self.transform, self.seed, 0, reduced=self.reduced)
                key = sample.key
            except BadSampleError as error:
                self._bad[index], about = error.record, None
            self._keys.append(key)
            abouts.append(about)
            report.add(1, [self._bad[index]] if index in self._bad else [])
        self._kept = self.rows.keep(abouts)

    def make(self, request: _Request) -> Batch:
        """The batch of a request."""
        drawn = request.rows.tolist()
        good = np.array([index not in self._bad for index in drawn], dtype=bool)
        rows = request.rows[good]
        image_ids = torch.from_numpy(rows)
        return Batch(
            pixels=self._pixels_N3HW[image_ids],
            image_ids=image_ids,
            keys=tuple(self._keys[index] for index in rows.tolist()),
            bad=tuple(self._bad[index] for index in drawn if index in self._bad),
            **self._kept.collate(rows, request.positions[good]),
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
        captions_per_image: C different captions of each picture, tokens [B, C, L]; a sample with fewer repeats them. The first
            of them is drawn as `first_caption_prob` says. 1: tokens [B, L].
        num_negatives: K hard negatives a row, tokens [B, K, L], drawn from the sample's own (its "negatives"), the mined ones of
            its captions and its captions' negations, without those that are its captions; `negatives_given` is false where there
            are fewer. 0: the batch has none.
        negatives_table: the table of mined negatives, see `negatives.mine`; None: none.
        negation: make negatives of a sample's captions by `negation.negations`.
        weights: whether samples carry weights (the JSON's or the `weight_column`'s "weight"; 1 where there is none); None looks
            at the first sample of each source.
        reduced_decode: decode JPEGs at a half, a quarter or an eighth of their size where that changes the result by less than
            2 of 255, see `decode`; None: for random crops alone.
        remote: how URLs are read.
        pin_memory: put batches where a GPU copies from directly.

    Attributes:
        bad: what could not be read.
        reads: what reading from object stores took.
        source_names: what the log calls the sources.

    Raises:
        ValueError: an option out of range, or a source without samples.
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
        captions_per_image: int = 1,
        num_negatives: int = 0,
        negatives_table: str | os.PathLike[str] | None = None,
        negation: bool = False,
        weights: bool | None = None,
        reduced_decode: bool | None = None,
        remote: RemoteConfig = RemoteConfig(),
        pin_memory: bool = False,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size is the number of processes, 1 or more, got {world_size}")
        if batch_size < 1 or batch_size % world_size:
            nearest = max(world_size, round(batch_size / world_size) * world_size)
            raise ValueError(
                f"batch_size is the global batch, a multiple of the {world_size} processes, got {batch_size}: {nearest} would do"
            )
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
        if (negatives_table is not None or negation) and not num_negatives:
            raise ValueError("negatives_table and negation give hard negatives: say how many a row with num_negatives, 1 or more")
        self._files = RemoteFiles(remote)
        opened, shares, self.source_names = _open_all(sources, self._files)
        source = opened[0] if len(opened) == 1 else ConcatSource(opened)
        self.source = source
        self.reads = ReadReport()
        self.batch_size = batch_size
        self.samples_per_epoch = len(source) if num_samples is None else num_samples
        self.steps_per_epoch = -(-self.samples_per_epoch // batch_size)
        self.bad = BadReport(max_bad_share, total=len(source), known=source.bad)
        self._slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._num_workers = 0 if cache_decoded else num_workers
        self._pin_memory = pin_memory
        self._order, self._counting = (
            BatchOrder(
                [one.part_sizes for one in opened],
                weights=shares,
                batch_size=batch_size,
                seed=seed,
                sampling=sampling,
                shuffle=shuffle,
            )
            for _ in range(2)  # counting goes at its own pace
        )
        rows = RowMaker(
            tokenizer,
            seed=seed,
            first_caption_prob=first_caption_prob,
            captions_per_image=captions_per_image,
            num_negatives=num_negatives,
            mined=NegativesTable(Path(negatives_table)) if negatives_table is not None else None,
            negation=negation,
            weights=has_weights(opened) if weights is None else weights,
            weights_asked=weights is None,
        )
        if reduced_decode is None:
            reduced_decode = isinstance(transform, TrainTransform)
        self._maker = _BatchMaker(source, transform, rows, seed, reduced_decode)
        if cache_decoded:
            self._maker = _CachedBatchMaker(self._maker, self.bad)

    def seen(self, step: int) -> dict[str, int]:
        """Rows drawn of each source in the first `step` global batches, bad ones included: a function of the step alone."""
        return dict(zip(self.source_names, self._counting.counts(step).tolist(), strict=True))

    def _requests(self, start_step: int) -> Iterator[_Request]:
        ahead = max(1, self._num_workers)  # steps between two that one worker gets
        coming: deque[NDArray[np.int64]] = deque()
        for step in itertools.count(start_step):
            while len(coming) <= ahead:
                coming.append(self._order.rows(step + len(coming))[self._slice])
            yield _Request(step * self.batch_size + self._slice.start, coming.popleft(), coming[ahead - 1])

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches of this rank from `start_step` on, without end.

        A batch whose rows were all bad is empty. Bad samples are counted in `bad` as their batches come.

        Raises:
            TooManyBadSamplesError: more than `max_bad_share` of the samples are bad.
            RuntimeError: a worker process died.
        """
        if start_step < 0:
            raise ValueError(f"start_step is 0 or more, got {start_step}")
        self.reads.add(self._maker.take_reads())  # of the indexing
        for made in run_workers(self._maker, self._requests(start_step), self._num_workers, pin_memory=self._pin_memory):
            self.bad.add(self._slice.stop - self._slice.start, made.batch.bad)
            self.reads.add(made.reads)
            yield made.batch


def run_workers(dataset: Dataset[Any], requests: Iterator[Any], num_workers: int, *, pin_memory: bool = False) -> Iterator[Any]:
    """`dataset[request]` for each request, in order, made in `num_workers` processes (0: in this one).

    `pin_memory` is done by a thread of this process, where there are others.
    """
    if num_workers == 0:
        return (dataset[request] for request in requests)
    return iter(
        DataLoader(
            dataset,
            sampler=requests,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else torch's global random numbers would depend on the number of workers
        )
    )


def make_pixels(
    sample: Sample, transform: Preprocess | TrainTransform, seed: int, position: int, *, reduced: bool | None = None
) -> Tensor:
    """A sample's picture as uint8 [3, H, W], as it is drawn at `position` of training.

    A TrainTransform's crop is resized by torch's uint8 kernels, which differ from PIL's by a few levels at most and are several
    times faster; a Preprocess gives the reference's pixels exactly, unless `reduced` is true (see `reduced_uint8`).
    """
    if isinstance(transform, Preprocess):
        if reduced:
            return reduced_uint8(sample.image, transform, key=sample.key)
        return transform.to_uint8(decode(sample.image, key=sample.key))
    rng = sample_rng(seed, position)
    size_px = transform.image_size_px
    crop: tuple[int, int, int, int] | None = None

    def divide(width: int, height: int) -> int:
        nonlocal crop
        crop = transform.draw_crop(width, height, rng)
        return 1 if reduced is False else divisor(min(crop[2:]), REDUCED_MARGIN * size_px)

    array_HWC, (full_width, full_height), factor = decode_divided(sample.image, divide, key=sample.key)
    if crop is None:
        crop = transform.draw_crop(full_width, full_height, rng)
    left, top, width, height = (round(number / factor) for number in crop)
    crop_HWC = torch.from_numpy(array_HWC[top : top + height, left : left + width])
    crop_1CHW = crop_HWC.permute(2, 0, 1)[None]
    pixels = interpolate(crop_1CHW, size=(size_px, size_px), mode=transform.interpolation, antialias=True)[0]
    return pixels.flip(-1) if transform.flip and rng.random() < transform.flip else pixels


def _open_all(sources: Any, files: RemoteFiles) -> tuple[list[Source], list[float] | None, list[str]]:
    """The opened sources, their weights where they have any, and a name for each."""
    specs = [sources] if isinstance(sources, (str, os.PathLike, DataSource)) or hasattr(sources, "part_sizes") else list(sources)
    if not specs:
        raise ValueError("no source of samples: name at least one shard, table or folder")
    opened: list[Source] = [spec if hasattr(spec, "part_sizes") else open_source(spec, remote=files) for spec in specs]
    names = _source_names(specs)
    for name, source in zip(names, opened, strict=True):
        if len(source) == 0:
            raise ValueError(f"the source {name} holds no sample: leave it out")
    weights = [spec.weight if isinstance(spec, DataSource) else None for spec in specs]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        missing = [name for name, weight in zip(names, weights, strict=True) if weight is None]
        raise ValueError(f"either every source has a weight or none; these have none: {', '.join(missing)}")
    return opened, given or None, names


def _source_names(specs: Sequence[Any]) -> list[str]:
    """What the log calls each source: its name, or its path; the second of two equal ones gets a number."""
    names: list[str] = []
    for place, spec in enumerate(specs, start=1):
        name = f"source {place}"
        if isinstance(spec, DataSource) and spec.name is not None:
            name = spec.name
        elif isinstance(spec, (str, os.PathLike)):
            name = os.fspath(spec)
        elif isinstance(spec, DataSource):
            path = spec.path
            name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ",".join(os.fspath(one) for one in path[:2])
            if not isinstance(path, (str, os.PathLike)) and len(path) > 2:
                name += f" and {len(path) - 2} more"
        names.append(name if name not in names else f"{name} ({place})")
    return names
