"""Reading a source once, in order, for evaluation: every sample exactly once, bad ones named.

Shape legend: B pictures of a batch, H height, W width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from wordsight.data.errors import BadReport, BadSampleError
from wordsight.types import BadSample, Sample

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from wordsight.data.remote import ReadReport
    from wordsight.data.sources import Source


@dataclass(frozen=True, slots=True)
class Read:
    """Consecutive samples of a source with their pictures.

    Attributes:
        samples: the B samples that could be read.
        pixels: [B, 3, H, W] as `preprocess` gives them: float32, normalised; of the samples in `decoded` alone.
        positions: the B samples' places in the source.
        bad: the samples in between that could not be read.
        digests: with `known`, the `picture_digest` of each of the B.
        decoded: which of the B have pixels: all but those that were `known`.
    """

    samples: tuple[Sample, ...]
    pixels: Tensor
    positions: tuple[int, ...]
    bad: tuple[BadSample, ...]
    digests: tuple[bytes, ...] = ()
    decoded: tuple[int, ...] = ()


def picture_digest(content: bytes | Image.Image) -> bytes:
    """16 bytes that stand for a picture: its encoded bytes, or all that becomes of a PIL image's pixels."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(content, bytes):
        digest.update(content)
        return digest.digest()
    digest.update(f"{content.mode} {content.size}".encode())
    pixels = content.tobytes()  # loads a file, and with it the palette
    turned, transparency = content.getexif().get(0x0112, 1), content.info.get("transparency")
    if content.palette is not None or turned != 1 or transparency is not None:
        digest.update(repr((content.getpalette(None), turned, transparency)).encode())
    digest.update(pixels)
    return digest.digest()


def picture_pixels(sample: Sample, preprocess: Callable[[Image.Image], Tensor], reduced: bool) -> Tensor:
    """A sample's picture for a model: uint8 [3, H, W] of a `Preprocess`, which normalises whole batches later, else floats.

    Raises:
        BadSampleError: it can't be decoded.
    """
    from wordsight.data.decode import decode, reduced_uint8

    if reduced:
        return reduced_uint8(sample.image, preprocess, key=sample.key)  # type: ignore[arg-type]
    make: Callable[[Image.Image], Tensor] = getattr(preprocess, "to_uint8", preprocess)
    return make(decode(sample.image, key=sample.key))


def _digest(sample: Sample) -> bytes:
    try:
        return picture_digest(sample.image)
    except Exception as error:  # a PIL image whose file is damaged, which it reads only now
        raise BadSampleError(sample.key, f"can't be decoded: {error}") from error


class _ReadMaker:
    """Reads and decodes the samples of a range, in whatever process."""

    def __init__(
        self,
        source: Source,
        preprocess: Callable[[Image.Image], Tensor],
        stride: int,
        reduced: bool,
        known: Container[bytes] | None,
    ) -> None:
        from wordsight.data.sources import remote_files

        self.source = source
        self.preprocess = preprocess
        self.stride = stride  # from one range of this process to its next
        self.reduced = reduced
        self.known = known
        self._remote = remote_files(source)

    def __getitem__(self, positions: range) -> tuple[Read, ReadReport]:
        from wordsight.data.remote import ReadReport

        read, reads = self._read(positions), ReadReport()
        for files in self._remote:
            reads.add(files.take_report())
        return read, reads

    def _read(self, positions: range) -> Read:
        import torch

        from wordsight.data.sources import read_ahead

        if self._remote:
            size = len(self.source)
            after = range(min(positions.start + self.stride, size), min(positions.stop + self.stride, size))
            read_ahead(self.source, [*positions, *after])

        samples: list[Sample] = []
        pixels: list[Tensor] = []
        kept: list[int] = []
        bad: list[BadSample] = []
        digests: list[bytes] = []
        decoded: list[int] = []
        for position in positions:
            try:
                sample = self.source[position]
                digest = None if self.known is None else _digest(sample)
                if digest is None or self.known is None or digest not in self.known:
                    # a Preprocess sends bytes between processes, a quarter of the floats
                    pixels.append(picture_pixels(sample, self.preprocess, self.reduced))
                    decoded.append(len(samples))
            except BadSampleError as error:
                bad.append(error.record)
                continue
            samples.append(sample)
            kept.append(position)
            if digest is not None:
                digests.append(digest)
        tensor = torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0)
        return Read(tuple(samples), tensor, tuple(kept), tuple(bad), tuple(digests), tuple(decoded))


def iterate(
    source: Source,
    preprocess: Callable[[Image.Image], Tensor],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad_share: float = 0.05,
    reduced_decode: bool = False,
    known: Container[bytes] | None = None,
) -> Iterator[Read]:
    """Every sample of a source once, in its order, in batches of at most `batch_size`.

    Args:
        source: what to read.
        preprocess: PIL RGB -> float [3, H, W], e.g. a `Preprocess`.
        batch_size: samples of a batch, bad ones included; the last batch may be smaller.
        num_workers: processes that decode; 0 decodes in this one.
        max_bad_share: the share of bad samples above which reading stops with an error.
        reduced_decode: decode large JPEGs at a reduced scale, which is faster and changes the pixels by less than 2 of 255 on
            average (`decode.reduced_uint8`); it needs a `Preprocess`. Published figures are measured without.
        known: digests (`picture_digest`) of pictures that are read and not decoded, as what is wanted of them is there already.

    Yields:
        `Read`; a batch without one readable sample has no samples.

    Warns:
        UserWarning: at the end, where reads from an object store had to be repeated or failed, with the files' names.

    Raises:
        TooManyBadSamplesError: too many bad samples; it lists the first ten.
        RuntimeError: a worker process died.
    """
    from wordsight.data.loader import run_workers
    from wordsight.data.remote import ReadReport
    from wordsight.data.transform import Preprocess

    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more, got {batch_size}")
    if reduced_decode and not isinstance(preprocess, Preprocess):
        raise ValueError(f"reduced_decode needs a Preprocess, whose size it knows, got {type(preprocess).__name__}")
    report = BadReport(max_bad_share, total=len(source))
    requests = (range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size))
    maker: Any = _ReadMaker(source, preprocess, batch_size * max(1, num_workers), reduced_decode, known)
    normalize = getattr(preprocess, "normalize", None)
    reads = ReadReport()
    for read, part in run_workers(maker, requests, num_workers):
        reads.add(part)
        report.add(len(read.samples) + len(read.bad), read.bad)
        pixels = normalize(read.pixels) if normalize is not None and len(read.pixels) else read.pixels
        yield replace(read, pixels=pixels)
    if not reads.smooth:
        warnings.warn(str(reads), stacklevel=2)
