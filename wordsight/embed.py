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
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize as unit_rows
from tqdm import tqdm

from wordsight.data.texts import text_batches
from wordsight.system import PairScorer

if TYPE_CHECKING:
    from PIL import Image

    from wordsight.data.tokenize import TextTokenizer
    from wordsight.data.transform import Preprocess
    from wordsight.types import Batch, Term

In = TypeVar("In")
Out = TypeVar("Out")
PASSED_ON = ("label_ids", "weights", "negatives_given")  # of a batch, to its loss
BATCHES_AHEAD = 2  # decoded while the model computes


class DualEncoderMixin:
    """What a dual encoder gains from its towers: encoding, embedding of pictures and texts, what its loss needs of a batch.

    Mixed into an nn.Module that has `config` (with `image` and `text`), `image_tower`, `text_tower`, `log_scale` and
    `logit_bias`: `class CLIP(DualEncoderMixin, nn.Module)`.

    Attributes:
        tokenizer: texts -> tokens; set by whoever makes or loads the model.
        preprocessor: PIL image -> pixels; set by whoever makes or loads the model.
        provenance: where the weights are from; set by whoever makes or loads the model.
    """

    if TYPE_CHECKING:
        config: Any
        image_tower: Any
        text_tower: Any
        log_scale: nn.Parameter
        logit_bias: Tensor | None
        loss_from_embeddings: Callable[..., dict[str, Term]]
    tokenizer: TextTokenizer | None = None
    preprocessor: Preprocess | None = None
    provenance: dict[str, Any] | None = None

    @classmethod
    def default_preprocessor(cls, config: Any) -> Preprocess:
        """The preprocessing of a fresh model of this config, or of a checkpoint that says none: CLIP's."""
        from wordsight.data.transform import Preprocess

        return Preprocess(image_size_px=config.image.image_size_px)

    @classmethod
    def default_tokenizer(cls, config: Any) -> TextTokenizer | None:
        """The tokenizer of a fresh model of this config, or of a checkpoint without one: CLIP's, if the vocabulary has its
        size.
        """
        from wordsight.data.tokenize import CLIP_VOCABULARY, ClipTokenizer

        return ClipTokenizer.clip(config.text.context_length) if config.text.vocab_size == CLIP_VOCABULARY else None

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed images.

        Args:
            pixels: float [B, 3, S, S], normalised by the model's preprocessing.
            normalize: whether rows get length 1.

        Returns:
            [B, D].

        Raises:
            ValueError: on integer pixels or another size than the model's.
        """
        side = self.config.image.image_size_px
        if not pixels.is_floating_point() or pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
            raise ValueError(
                f"pixels are {pixels.dtype} {tuple(pixels.shape)}, this model takes normalised floats (B, 3, {side}, {side}); "
                "make them with model.preprocess(pil_image)"
            )
        features_BD = self.image_tower(pixels)
        return unit_rows(features_BD, dim=-1) if normalize else features_BD

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed texts.

        Args:
            tokens: int64 [N, <= L], as the model's tokenizer gives them.
            normalize: whether rows get length 1.

        Returns:
            [N, D].

        Raises:
            ValueError: on another shape, or rows longer than the model's context.
        """
        longest = self.config.text.context_length
        if tokens.is_floating_point() or tokens.ndim != 2 or not 0 < tokens.shape[1] <= longest:
            raise ValueError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}, this model takes integers (N, at most {longest}); "
                "make them with model.tokenize(texts)"
            )
        features_ND = self.text_tower(tokens)
        return unit_rows(features_ND, dim=-1) if normalize else features_ND

    def loss(self, batch: Batch) -> dict[str, Term]:
        """The loss over the batch; see `loss_from_embeddings`."""
        return self.loss_from_embeddings(self.embeddings(batch))

    def embeddings(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss needs of each sample.

        Returns:
            image [B, D] and text [B, D] (or [B, C, D] with C captions an image), L2-normalised; text_ids and image_ids, which
            show duplicates; and where the batch has them label_ids [B], weights [B], negatives [B, K, D] and negatives_given [B,
            K].
        """
        tokens_BCL = batch.tokens if batch.tokens.ndim == 3 else batch.tokens[:, None]
        texts = [tokens_BCL] if batch.negatives is None else [tokens_BCL, batch.negatives]
        longest = max(tokens.shape[-1] for tokens in texts)
        padded = [functional.pad(tokens, (0, longest - tokens.shape[-1]), value=self._pad_id()) for tokens in texts]
        # a row's texts lie together, as `nn.random` wants them
        rows_BTL = torch.cat(padded, dim=1)
        encoded_BTD = self.encode_text(rows_BTL.flatten(0, 1)).unflatten(0, rows_BTL.shape[:2])
        captions = tokens_BCL.shape[1]
        found = {
            "image": self.encode_image(batch.pixels),
            "text": encoded_BTD[:, :captions] if batch.tokens.ndim == 3 else encoded_BTD[:, 0],
            "text_ids": batch.text_ids,
            "image_ids": batch.image_ids,
        }
        if batch.negatives is not None:
            found["negatives"] = encoded_BTD[:, captions:]
        return found | {name: value for name, value in batch.tensors().items() if name in PASSED_ON}

    @staticmethod
    def contrastive_term(loss: Tensor, image: Tensor) -> dict[str, Term]:
        """A mean loss over the pairs as the one term "contrastive", whose count is the images [B, ...] of this process.

        In a ring a process without rows has the loss of all too: its count is 1.
        """
        from wordsight.types import Term

        count = max(len(image), 1)
        return {"contrastive": Term(sum=loss * count, count=count)}

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Trade compute for memory in both towers; results and random numbers stay the same."""
        self.image_tower.set_activation_checkpointing(enabled)
        self.text_tower.set_activation_checkpointing(enabled)

    def _pad_id(self) -> int:
        return getattr(self.config.text, "pad_id", 0) if self.tokenizer is None else self.tokenizer.pad_id

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
        reduced_decode: bool = False,
    ) -> Tensor:
        """Embed pictures, decoding the next batches while the model computes.

        Args:
            images: paths or PIL images of any size and mode; one alone is taken as a list of one.
            batch_size: pictures that the model sees at once; it changes the speed, not the result.
            progress: show a bar.
            num_threads: threads that decode; default one a core, at most 8.
            reduced_decode: decode large JPEGs at a reduced scale, faster and a little different (`decode.reduced_uint8`).

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
            read = partial(_read, preprocessor, reduced_decode)
            pixels = _ahead(pool, read, enumerate(images), BATCHES_AHEAD * batch_size)
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
        batches, rows_N = text_batches(texts, batch_size)
        parts: list[Tensor] = []
        with _evaluating(self) as (device, _), _bar(progress, "texts", sum(map(len, batches))) as bar:
            for batch in batches:
                parts.append(_kept(self, self.encode_text(tokenizer(batch).to(device))))
                bar.update(len(batch))
            if not parts:
                parts.append(self._no_rows(device))
        return torch.cat(parts)[rows_N]

    def _no_rows(self, device: torch.device) -> Tensor:
        """[0, D], with the D that the model has."""
        return _kept(self, self.encode_text(self._get_tokenizer()([""]).to(device)))[:0]

    def _get_tokenizer(self) -> TextTokenizer:
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


def _read(preprocessor: Preprocess, reduced: bool, item: tuple[int, str | os.PathLike[str] | Image.Image]) -> Tensor:
    """A path or PIL image -> uint8 [3, H, W]; runs in a thread."""
    from PIL import Image

    from wordsight.data.decode import decode, reduced_uint8
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
        return reduced_uint8(content, preprocessor) if reduced else preprocessor.to_uint8(decode(content))
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
    return vectors.float().cpu() if isinstance(model, PairScorer) else unit_rows(vectors.float(), dim=-1).cpu()


@contextmanager
def _evaluating(model: DualEncoderMixin) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Evaluation mode without gradients, with the model's device and dtype; each part's training mode is put back afterwards."""
    assert isinstance(model, nn.Module), "DualEncoderMixin is mixed into an nn.Module"
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
