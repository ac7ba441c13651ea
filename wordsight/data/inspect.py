"""Looking at a data set: what each sample is, figures over all of them, a contact sheet."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wordsight.data.errors import BadSampleError
from wordsight.types import BadSample

if TYPE_CHECKING:
    from PIL import Image

    from wordsight.data.sources import Source

CONTEXT_LENGTH = 77
TOKEN_BINS = (0, 5, 10, 15, 20, 30, 50, CONTEXT_LENGTH - 2)  # the last one is all that CLIP reads
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True, slots=True)
class Facts:
    """What one sample is.

    Attributes:
        key: its name.
        num_bytes, file_format, width_px, height_px: of the encoded picture, by its header.
        captions, label: as the source gives them.
        digest: hash of the encoded picture.
        error: why it can't be used; None where it can.
    """

    key: str
    num_bytes: int = 0
    file_format: str = ""
    width_px: int = 0
    height_px: int = 0
    captions: tuple[str, ...] = ()
    label: str | None = None
    digest: bytes = b""
    error: str | None = None


class FactReader:
    """Facts of a source's samples, in whatever process.

    Args:
        source: whose samples.
        full: decode every picture (finds damage behind a good header); else only its header is read.
    """

    def __init__(self, source: Source, *, full: bool) -> None:
        self.source, self.full = source, full

    def __getitem__(self, positions: Sequence[int]) -> list[Facts]:
        return [self._read(position) for position in positions]

    def _read(self, position: int) -> Facts:
        from PIL import Image

        from wordsight.data.decode import decode

        key = f"sample {position}"
        try:
            sample = self.source[position]
            key, data = sample.key, sample.image
            if isinstance(data, Image.Image):
                data = _encode(data)
            if self.full or not data:
                decode(data, key=key)
            try:
                with Image.open(io.BytesIO(data)) as image:
                    file_format, (width_px, height_px) = image.format or "", image.size
            except Exception:
                decode(data, key=key)  # says why, in its own words
                raise
        except BadSampleError as error:
            return Facts(error.key, error=error.reason)
        except Exception as error:
            return Facts(key, error=f"can't be read: {error}")
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return Facts(key, len(data), file_format, width_px, height_px, tuple(sample.captions), sample.label, digest)


def read_facts(
    source: Source, *, full: bool, num_workers: int = 0, positions: Sequence[int] | None = None, block: int = 64
) -> Iterator[Facts]:
    """Facts of the samples at `positions` (default: all), in order."""
    from wordsight.data.loader import run_workers

    wanted = range(len(source)) if positions is None else positions
    requests = (wanted[start : start + block] for start in range(0, len(wanted), block))
    reader: Any = FactReader(source, full=full)
    for block_of_facts in run_workers(reader, requests, num_workers):
        yield from block_of_facts


def summarize(facts: Iterable[Facts], known_bad: Sequence[BadSample] = ()) -> dict[str, Any]:
    """Figures over samples, as plain JSON values.

    Args:
        facts: of the samples.
        known_bad: what was found damaged while the source was indexed.

    Returns:
        `samples`, `readable`, `bytes`, `formats`; `width_px`, `height_px`, `aspect`, `captions_per_sample`, `caption_words`,
        `caption_tokens` (percentiles); `caption_tokens_histogram` (upper bound or "more" -> captions); `captions`,
        `without_caption`, `repeated_captions`, `cut_captions` (longer than CLIP reads); `labels` (label -> samples); `duplicates`
        (pictures that are byte by byte an earlier one: name, and name of the first); `bad` (name, reason).
    """
    from wordsight.data.tokenize import ClipTokenizer

    tokenizer = ClipTokenizer.clip()
    bad = [{"name": one.key, "reason": one.reason} for one in known_bad]
    formats: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    first_of: dict[bytes, str] = {}
    texts: Counter[bytes] = Counter()
    duplicates = []
    columns: dict[str, list[float]] = {
        name: [] for name in ("bytes", "width_px", "height_px", "captions", "caption_words", "caption_tokens")
    }
    num_samples = 0
    for one in facts:
        num_samples += 1
        if one.error is not None:
            bad.append({"name": one.key, "reason": one.error})
            continue
        formats[one.file_format] += 1
        if one.label is not None:
            labels[one.label] += 1
        if first_of.setdefault(one.digest, one.key) is not one.key:
            duplicates.append({"name": one.key, "first": first_of[one.digest]})
        for name, value in (("bytes", one.num_bytes), ("width_px", one.width_px), ("height_px", one.height_px)):
            columns[name].append(value)
        columns["captions"].append(len(one.captions))
        for caption in one.captions:
            columns["caption_words"].append(len(caption.split()))
            columns["caption_tokens"].append(len(tokenizer.encode(caption)))
            texts[hashlib.blake2b(caption.encode("utf-8", "replace"), digest_size=16).digest()] += 1
    values = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    tokens = values["caption_tokens"]
    return {
        "samples": num_samples,
        "readable": len(values["bytes"]),
        "bytes": int(values["bytes"].sum()),
        "formats": dict(formats.most_common()),
        "width_px": percentiles(values["width_px"]),
        "height_px": percentiles(values["height_px"]),
        "aspect": percentiles(values["width_px"] / np.maximum(values["height_px"], 1)),
        "captions": len(tokens),
        "captions_per_sample": percentiles(values["captions"]),
        "without_caption": int((values["captions"] == 0).sum()),
        "caption_words": percentiles(values["caption_words"]),
        "caption_tokens": percentiles(tokens),
        "caption_tokens_histogram": histogram(tokens),
        "cut_captions": int((tokens > CONTEXT_LENGTH - 2).sum()),
        "repeated_captions": len(tokens) - len(texts),
        "labels": dict(labels.most_common()),
        "duplicates": duplicates,
        "bad": bad,
    }


def percentiles(values: np.ndarray) -> dict[str, float]:
    """min, p5, p25, p50, p75, p95 and max; nothing of nothing."""
    if not len(values):
        return {}
    names = ["min", *(f"p{p}" for p in PERCENTILES[1:-1]), "max"]
    return {name: round(float(value), 4) for name, value in zip(names, np.percentile(values, PERCENTILES), strict=True)}


def histogram(values: np.ndarray) -> dict[str, int]:
    """How many values lie up to each bound of TOKEN_BINS and above the one before it, and how many above the last."""
    counts, _ = np.histogram(values, [-1, *(bound + 0.5 for bound in TOKEN_BINS), np.inf])
    return dict(zip([*map(str, TOKEN_BINS), "more"], map(int, counts), strict=True))


def contact_sheet(source: Source, *, columns: int = 8, rows: int = 6, side_px: int = 128) -> Image.Image:
    """Pictures from all over a source, evenly spaced, each with the beginning of its first caption; bad ones as a red cross.

    Args:
        source: whose pictures.
        columns, rows: of the sheet.
        side_px: of each picture's square.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    from wordsight.data.decode import decode

    count = min(columns * rows, len(source))
    line_px, gap_px = 14, 8
    columns = min(columns, max(1, count))
    cell_px = side_px + gap_px, side_px + line_px + gap_px
    sheet = Image.new("RGB", (columns * cell_px[0] + gap_px, -(-count // columns) * cell_px[1] + gap_px), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for place in range(count):
        left, top = (place % columns) * cell_px[0] + gap_px, (place // columns) * cell_px[1] + gap_px
        try:
            sample = source[place * len(source) // count]
            picture = ImageOps.contain(decode(sample.image, key=sample.key), (side_px, side_px))
            sheet.paste(picture, (left + (side_px - picture.width) // 2, top + (side_px - picture.height) // 2))
            text = next(iter(sample.captions), sample.label or sample.key)
        except BadSampleError as error:
            draw.line((left, top, left + side_px, top + side_px), "red", 3)
            draw.line((left, top + side_px, left + side_px, top), "red", 3)
            text = error.key
        draw.text((left, top + side_px), _shortened(text, font, side_px), "black", font)
    return sheet


def _shortened(text: str, font: Any, width_px: int) -> str:
    text = " ".join(text[:100].split())
    while text and font.getlength(text) > width_px:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
