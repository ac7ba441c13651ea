"""Small pictures, shards and a tokenizer for the tests of the data room."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth picture in colours of its own."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """A tar of (name, content), or of (header, content) for members that are no plain files."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(number: int, *, first: int = 0, image: bytes | None = None) -> list[tuple[str, bytes]]:
    """Samples as img2dataset writes them."""
    found = []
    for i in range(first, first + number):
        meta = {"caption": f"caption {i}", "key": f"{i:05d}", "status": "success", "width": 40}
        found += [
            (f"{i:05d}.jpg", encoded(picture(i)) if image is None else image),
            (f"{i:05d}.json", json.dumps(meta).encode()),
            (f"{i:05d}.txt", f"caption {i}".encode()),
        ]
    return found


def write_shards(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """Shards of so many samples each."""
    paths, first = [], 0
    for i, size in enumerate(sizes):
        paths.append(write_tar(folder / f"{i:03d}.tar", members(size, first=first)))
        first += size
    return paths


class Letters:
    """A tokenizer: the characters' code points."""

    context_length = 16

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [[ord(c) for c in text[: self.context_length].ljust(self.context_length, "\0")] for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self.context_length)
