"""Pictures and texts to vectors with any dual encoder: in batches, decoded ahead of the model, in the order given.

Shape legend: N pictures or texts, D embedding width, H height, W width, L text length in tokens.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from wordsight.system import PairScorer

if TYPE_CHECKING:
    from PIL import Image

    from wordsight.data.tokenize import ClipTokenizer
    from wordsight.data.transform import Preprocess

In = TypeVar("In")
Out = TypeVar("Out")
BATCHES_AHEAD = 2  # decoded while the model computes


class EmbedderMixin:
    """What a dual encoder gains from its own `encode_image`, `encode_text`, `tokenizer` and `preprocessor`.

    Mixed into an nn.Module: `class CLIP(EmbedderMixin, nn.Module)`.
    """

    if TYPE_CHECKING:
        tokenizer: ClipTokenizer | None
        preprocessor: Preprocess | None
        encode_image: Callable[..., Tensor]
        encode_text: Callable[..., Tensor]

    def preprocess(self, image: Image.Image) -> Tensor:
        """A PIL image of any size and mode -> normalised float32 [3, H, W], as this model wants it."""
        return self._get_preprocessor()(image)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L]."""
        return self._get_tokenizer()(texts)

    def embed_images(
        self,
        images: Iterable[str | os.PathLike[str] | Image.Image],
        *,
        batch_size: int = 64,
        progress: bool = False,
        num_threads: int | None = None,
    ) -> Tensor:
        """Embed pictures, decoding the next batches while the model computes.

        Args:
            images: paths or PIL images of any size and mode; one alone is taken as a list of one.
            batch_size: pictures that the model sees at once; it changes the speed, not the result.
            progress: show a bar.
            num_threads: threads that decode; default one a core, at most 8.

        Returns:
            float32 [N, D] on the CPU, L2-normalised, in the order of `images`.

        Raises:
            OSError: a picture can't be read; the message names it.
        """
        from PIL import Image

        preprocessor = self._get_preprocessor()
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        _check_batch_size(batch_size)
        num_threads = num_threads or min(8, os.cpu_count() or 1)
        total = len(images) if isinstance(images, Sized) else None
        parts: list[Tensor] = []
        with (
            _evaluating(self) as (device, dtype),
            ThreadPoolExecutor(num_threads, "wordsight-decode") as pool,
            _bar(progress, "pictures", total) as bar,
        ):
            pixels = _ahead(pool, partial(_read, preprocessor), enumerate(images), BATCHES_AHEAD * batch_size)
            while batch := list(islice(pixels, batch_size)):
                pixels_BCHW = preprocessor.normalize(torch.stack(batch).to(device)).to(dtype)
                parts.append(_kept(self, self.encode_image(pixels_BCHW)))
                bar.update(len(batch))
            if not parts:
                parts.append(self._no_rows(device))
        return torch.cat(parts)

    def embed_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised float pixels [B, 3, H, W] -> float32 [B, D] on the CPU, L2-normalised, without gradients."""
        with _evaluating(self) as (device, dtype):
            vectors_BD = _kept(self, self.encode_image(pixels_BCHW.to(device, dtype)))
        return vectors_BD.clone()  # outside of inference mode, so that it may be used in training

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256, progress: bool = False) -> Tensor:
        """Embed texts; equal ones are encoded once, and those of like length together, so that little padding is computed.

        Args:
            texts: any strings; one alone is taken as a list of one.
            batch_size: texts that the model sees at once; it changes the speed, not the result.
            progress: show a bar.

        Returns:
            float32 [N, D] on the CPU, L2-normalised, in the order of `texts`.

        Raises:
            ValueError: something in `texts` is not a string.
        """
        tokenizer = self._get_tokenizer()
        _check_batch_size(batch_size)
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"embed_texts takes strings, got {type(text).__name__}: {text!r:.80}")
        unique = sorted(dict.fromkeys(texts), key=len)
        parts: list[Tensor] = []
        with _evaluating(self) as (device, _), _bar(progress, "texts", len(unique)) as bar:
            for start in range(0, len(unique), batch_size):
                batch = unique[start : start + batch_size]
                parts.append(_kept(self, self.encode_text(tokenizer(batch).to(device))))
                bar.update(len(batch))
            if not parts:
                parts.append(self._no_rows(device))
        row_of = {text: row for row, text in enumerate(unique)}
        return torch.cat(parts)[torch.tensor([row_of[text] for text in texts], dtype=torch.int64)]

    def _no_rows(self, device: torch.device) -> Tensor:
        """[0, D], with the D that the model has."""
        return _kept(self, self.encode_text(self._get_tokenizer()([""]).to(device)))[:0]

    def _get_tokenizer(self) -> ClipTokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"this {type(self).__name__} has no tokenizer: make it with wordsight.load or .create, or set .tokenizer"
            )
        return self.tokenizer

    def _get_preprocessor(self) -> Preprocess:
        if self.preprocessor is None:
            raise ValueError(
                f"this {type(self).__name__} has no preprocessor: make it with wordsight.load or .create, or set .preprocessor"
            )
        return self.preprocessor


def _read(preprocessor: Preprocess, item: tuple[int, str | os.PathLike[str] | Image.Image]) -> Tensor:
    """A path or PIL image -> uint8 [3, H, W]; runs in a thread."""
    from PIL import Image

    from wordsight.data.decode import decode
    from wordsight.data.errors import BadSampleError

    position, image = item
    content: bytes | Image.Image
    if isinstance(image, Image.Image):
        name, content = f"picture {position} of the given ones", image
    elif isinstance(image, str | os.PathLike):
        name, content = os.fspath(image), Path(image).read_bytes()
    else:
        raise ValueError(f"embed_images takes paths and PIL images, got {type(image).__name__} at position {position}")
    try:
        return preprocessor.to_uint8(decode(content))
    except BadSampleError as error:
        raise OSError(f"{name} {error.reason}") from error


def _ahead(pool: ThreadPoolExecutor, work: Callable[[In], Out], items: Iterable[In], count: int) -> Iterator[Out]:
    """`work` of each item in order, at most `count` items ahead of who asks."""
    pending: deque[Future[Out]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _kept(model: object, vectors: Tensor) -> Tensor:
    """Rows of length 1 in float32 on the CPU, whatever the model computes in; as they are where the model scores pairs itself."""
    return vectors.float().cpu() if isinstance(model, PairScorer) else normalize(vectors.float(), dim=-1).cpu()


@contextmanager
def _evaluating(model: EmbedderMixin) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Evaluation mode without gradients, with the model's device and dtype; each part's training mode is put back afterwards."""
    assert isinstance(model, nn.Module), "EmbedderMixin is mixed into an nn.Module"
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    parameter = next(model.parameters())
    try:
        with torch.inference_mode():
            yield parameter.device, parameter.dtype
    finally:
        for module in training:
            module.training = True


def _bar(progress: bool, what: str, total: int | None) -> tqdm:
    return tqdm(total=total, desc=what, unit=what.removesuffix("s"), disable=not progress)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
