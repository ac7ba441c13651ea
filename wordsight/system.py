"""The protocols by which rooms know a model: by what it can do, never by its name.

Shape legend: B batch, N texts, L text length in tokens, D embedding width, K vectors of one picture, C texts of a tile, H height,
W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image
    from torch import Tensor, nn

    from wordsight.losses.ring import Ring
    from wordsight.types import Batch, Term


@runtime_checkable
class System(Protocol):
    """Something that can be trained: an nn.Module whose loss is visible in its own file."""

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Named terms of the training loss on one batch (normalised float pixels)."""
        ...


@runtime_checkable
class ContrastiveSystem(System, Protocol):
    """A system whose loss couples the samples of a batch, so that it can't be accumulated naively.

    The loop calls `embeddings` on micro-batches (twice, with the same random numbers), puts them together and calls
    `loss_from_embeddings` once, with a ring of the processes, or on what all of them have gathered.
    """

    def embeddings(self, batch: Batch) -> dict[str, Tensor]:
        """Per-sample tensors, each [B, ...], that `loss_from_embeddings` needs; ids without gradient may be among them."""
        ...

    def loss_from_embeddings(self, embeddings: Mapping[str, Tensor], ring: Ring | None = None) -> dict[str, Term]:
        """The loss terms of the whole (global) batch.

        Args:
            embeddings: of the whole batch; with a ring, of this process's rows.
            ring: the processes whose rows make the batch. The terms are then those of all of it, and their gradients those of the
                sum over processes, see `losses.contrastive.info_nce`.
        """
        ...

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that `loss_from_embeddings` itself uses (scale, bias), outside of the towers."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """A dual encoder: images and texts in one space."""

    log_scale: Tensor
    logit_bias: Tensor | None

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        """[B, 3, H, W] normalised float pixels -> [B, D], L2-normalised unless `normalize=False`; PairScorer: [B, K, D]."""
        ...

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """[N, L] int64 tokens -> [N, D], L2-normalised unless `normalize=False`."""
        ...

    def preprocess(self, image: Image.Image) -> Tensor:
        """A PIL image of any size and mode -> float [3, H, W], as the model wants it."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L]."""
        ...

    def embed_images(self, images: Iterable[str | Path | Image.Image], *, batch_size: int = 64, progress: bool = False) -> Tensor:
        """Paths or PIL images -> [N, D] float32 on the CPU, L2-normalised, without gradients."""
        ...

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256, progress: bool = False) -> Tensor:
        """Texts -> [N, D] float32 on the CPU, L2-normalised, without gradients."""
        ...


@runtime_checkable
class PairScorer(Protocol):
    """An Embedder whose score of a picture and a text is no plain inner product (the text asks the picture's K vectors).

    An Embedder without this method is scored by inner products of unit vectors. One that has it says itself what is kept of a
    picture and of a text and how the two meet:

    - `encode_image` gives [B, D] or [B, K, D] (any shape after the first axis), `encode_text` [N, D]. Evaluators and `embed_*`
      keep both as float32 on the CPU and as they are: they normalise nothing.
    - A class with several prompts is the plain mean of what is kept of its texts; it may be shorter than one prompt alone, so
      `similarities` must not depend on the length of a text's vector (or must want that it does).
    """

    def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores of a tile: n pictures against C texts.

        It is called without gradients, in evaluation mode, with tensors on the model's device. A tile is so small that
        n x C x (numbers kept of a picture) float32 values fit in 128 MiB (`wordsight.evaluate.scoring`), so plain broadcasting
        will do. The rank of a text must depend on its pair alone, never on its neighbours in the tile.

        Args:
            images: float32 [n, D] or [n, K, D], rows of what `encode_image` gave.
            texts: float32 [C, D], rows of what `encode_text` gave, or means of them.

        Returns:
            [n, C] similarities in [-1, 1], before scale and bias: logits are exp(log_scale) * similarity + logit_bias.
        """
        ...


class Evaluator(Protocol):
    """A protocol of measurement: the same object runs in training and from the command line."""

    def run(self, model: Any, data: Any) -> dict[str, Any]:
        """Named Metrics; a model without the capability that this needs is an error that names the method."""
        ...
