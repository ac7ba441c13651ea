"""Tar shards from any source: WebDataset's layout, the same bytes for the same samples, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wordsight.data.errors import BadReport, BadSampleError
from wordsight.data.sources import Source
from wordsight.types import BadSample, Sample

FileFormat = Literal["keep", "webp", "jpg", "png"]
_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
Member = tuple[str, bytes]  # suffix, content


@dataclass(frozen=True)
class ShardOptions:
    """How samples become members of shards.

    Attributes:
        file_format: "keep" leaves the encoded pictures as they are; the others encode upright RGB anew.
        size_px: the longest that a picture's shorter side may be; None leaves it. Pictures are never enlarged.
        quality: of WebP and JPEG, 1 to 100.
        shard_size: samples in one shard.

    Raises:
        ValueError: an option out of range, or `size_px` with "keep".
    """

    file_format: FileFormat = "keep"
    size_px: int | None = None
    quality: int = 90
    shard_size: int = 1000

    def __post_init__(self) -> None:
        if self.file_format not in ("keep", "webp", "jpg", "png"):
            raise ValueError(f"the format must be keep, webp, jpg or png, got {self.file_format!r}")
        if self.size_px is not None and self.size_px < 1:
            raise ValueError(f"the size must be 1 px or more, got {self.size_px}")
        if self.size_px is not None and self.file_format == "keep":
            raise ValueError("resized pictures must be encoded anew: choose the format webp, jpg or png")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"the quality must be 1 to 100, got {self.quality}")
        if self.shard_size < 1:
            raise ValueError(f"a shard needs 1 sample or more, got {self.shard_size}")


class MemberMaker:
    """Members of samples, in whatever process."""

    def __init__(self, source: Source, options: ShardOptions) -> None:
        self.source, self.options = source, options

    def __getitem__(self, positions: range) -> list[list[Member] | BadSample]:
        made: list[list[Member] | BadSample] = []
        for position in positions:
            try:
                made.append(make_members(self.source[position], self.options))
            except BadSampleError as error:
                made.append(error.record)
        return made


def make_members(sample: Sample, options: ShardOptions) -> list[Member]:
    """A sample's members: picture, .txt with the first caption, .json with all captions, label, further columns and old name.

    Raises:
        BadSampleError: the picture can't be decoded.
    """
    from PIL import Image

    from wordsight.data.decode import decode

    rgb = decode(sample.image, key=sample.key)  # even where the bytes are kept: no bad sample gets into a shard
    if options.file_format == "keep" and isinstance(sample.image, bytes):
        file_format = Image.open(io.BytesIO(sample.image)).format or ""
        members = [(_SUFFIX.get(file_format) or "png", sample.image if file_format in _SUFFIX else _encode(rgb, "png", options))]
    else:
        suffix = "png" if options.file_format == "keep" else options.file_format
        scale = (options.size_px or min(rgb.size)) / min(rgb.size)
        if scale < 1:
            size = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
            rgb = rgb.resize(size, Image.Resampling.BICUBIC)
        members = [(suffix, _encode(rgb, suffix, options))]
    about: dict[str, Any] = {**sample.meta, "source": sample.key}
    if sample.label is not None:
        about["label"] = sample.label
    if sample.captions:
        members.append(("txt", sample.captions[0].encode("utf-8", "replace")))
    if len(sample.captions) > 1:
        about["captions"] = list(sample.captions)
    members.append(("json", json.dumps(about, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8", "replace")))
    return members


def _encode(rgb: Any, suffix: str, options: ShardOptions) -> bytes:
    buffer = io.BytesIO()
    if suffix == "webp":
        rgb.save(buffer, "WEBP", quality=options.quality, method=4)
    elif suffix == "jpg":
        rgb.save(buffer, "JPEG", quality=options.quality, subsampling=0 if options.quality >= 90 else 2)
    else:
        rgb.save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def build_shards(
    source: Source,
    folder: Path,
    options: ShardOptions,
    *,
    prefix: str = "shard",
    num_workers: int = 0,
    max_bad_share: float = 0.05,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[list[Path], BadReport]:
    """Write a source's samples as `folder/PREFIX-00000.tar` and on; the folder appears when all of them are written.

    Args:
        source: the samples; bad ones are left out.
        folder: must not exist, or be empty.
        options: picture format, sizes.
        prefix: of the shards' names.
        num_workers: processes that decode and encode; 0 does it in this one.
        max_bad_share: the share of bad samples above which nothing is written.
        advance: told how many samples were done, each time.

    Returns:
        The shards, and what was bad.

    Raises:
        ValueError: the folder holds something, or too many bad samples (`TooManyBadSamplesError`).
    """
    from wordsight.data.loader import run_workers

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: choose another folder")
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    report = BadReport(max_bad_share, total=len(source), known=source.bad)
    maker: Any = MemberMaker(source, options)
    requests = (range(start, min(start + 16, len(source))) for start in range(0, len(source), 16))
    shards: list[Path] = []
    tar: tarfile.TarFile | None = None
    number = 0
    try:
        for made in run_workers(maker, requests, num_workers):
            report.add(len(made), [one for one in made if isinstance(one, BadSample)])
            for members in made:
                if isinstance(members, BadSample):
                    continue
                if number % options.shard_size == 0:
                    tar = _next_shard(tar, staging / f"{prefix}-{len(shards):05d}.tar", shards)
                assert tar is not None
                for suffix, content in members:
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")  # time 0, no owner: the same samples give the same bytes
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
            advance(len(made))
        _close(tar)
        tar = None
        if not shards:
            raise ValueError(f"none of the {len(source)} samples could be read")
        if folder.exists():
            folder.rmdir()
        os.replace(staging, folder)
    finally:
        if tar is not None and tar.fileobj is not None:
            tar.fileobj.close()
        shutil.rmtree(staging, ignore_errors=True)
    return [folder / shard.name for shard in shards], report


def _next_shard(tar: tarfile.TarFile | None, path: Path, shards: list[Path]) -> tarfile.TarFile:
    _close(tar)
    shards.append(path)
    return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)


def _close(tar: tarfile.TarFile | None) -> None:
    """Finish a shard and bring it to the disk."""
    if tar is not None:
        tar.close()
        with open(str(tar.name), "rb+") as file:
            os.fsync(file.fileno())
