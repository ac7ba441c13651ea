"""Reading a source once, in order, for evaluation: every sample exactly once, bad ones named.

Shape legend: B pictures of a batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wordsight.data.errors import BadReport, BadSampleError
from wordsight.types import BadSample, Sample

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from wordsight.data.sources import Source


@dataclass(frozen=True, slots=True)
class Read:
    """Consecutive samples of a source with their pictures.

    Attributes:
        samples: the B samples that could be read.
        pixels: [B, 3, H, W] as `preprocess` gives them: float32, normalised.
        positions: the B samples' places in the source.
        bad: the samples in between that could not be read.
    """

    samples: tuple[Sample, ...]
    pixels: Tensor
    positions: tuple[int, ...]
    bad: tuple[BadSample, ...]


class _ReadMaker:
    """Reads and decodes the samples of a range, in whatever process."""

    def __init__(self, source: Source, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.source = source
        self.preprocess = preprocess
        # a Preprocess sends bytes between processes, a quarter of the floats, and normalises whole batches
        self.make: Callable[[Image.Image], Tensor] = getattr(preprocess, "to_uint8", preprocess)

    def __getitem__(self, positions: range) -> Read:
        import torch

        from wordsight.data.decode import decode

        samples: list[Sample] = []
        pixels: list[Tensor] = []
        kept: list[int] = []
        bad: list[BadSample] = []
        for position in positions:
            try:
                sample = self.source[position]
                pixels.append(self.make(decode(sample.image, key=sample.key)))
            except BadSampleError as error:
                bad.append(error.record)
                continue
            samples.append(sample)
            kept.append(position)
        return Read(tuple(samples), torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0), tuple(kept), tuple(bad))


def iterate(
    source: Source,
    preprocess: Callable[[Image.Image], Tensor],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad_share: float = 0.05,
) -> Iterator[Read]:
    """Every sample of a source once, in its order, in batches of at most `batch_size`.

    Args:
        source: what to read.
        preprocess: PIL RGB -> float [3, H, W], e.g. a `Preprocess`.
        batch_size: samples of a batch, bad ones included; the last batch may be smaller.
        num_workers: processes that decode; 0 decodes in this one.
        max_bad_share: the share of bad samples above which reading stops with an error.

    Yields:
        `Read`; a batch without one readable sample has no samples.

    Raises:
        TooManyBadSamplesError: too many bad samples; it lists the first ten.
        RuntimeError: a worker process died.
    """
    from wordsight.data.loader import run_workers

    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more, got {batch_size}")
    report = BadReport(max_bad_share, total=len(source))
    requests = (range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size))
    maker: Any = _ReadMaker(source, preprocess)
    normalize = getattr(preprocess, "normalize", None)
    for read in run_workers(maker, requests, num_workers):
        report.add(len(read.samples) + len(read.bad), read.bad)
        pixels = normalize(read.pixels) if normalize is not None and read.samples else read.pixels
        yield Read(read.samples, pixels, read.positions, read.bad)
