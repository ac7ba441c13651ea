"""The records that rooms exchange: Sample, BadSample, Batch, Term, Metric.

Shape legend: B batch, H height, W width, L text length in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its texts, as a source gives it: not decoded yet.

    Attributes:
        key: unique name that points at the picture, e.g. ``shard-000.tar/cat.jpg`` or a path.
        image: the encoded file (bytes), or a decoded PIL image.
        captions: the texts that describe the picture; the first one is its main caption.
        label: the class name, where the source has one.
        meta: whatever else the source says (a JSON member, further columns).
    """

    key: str
    image: bytes | Image.Image
    captions: tuple[str, ...] = ()
    label: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that could not be read: its name and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples ready for a system.

    Attributes:
        pixels: [B, 3, H, W], uint8 (0-255) as it leaves the loader, float (normalised) as it enters a system.
        tokens: [B, L] int64, padded to the tokenizer's context length or to the longest caption; [B, C, L] with C captions a
            picture.
        text_ids: [B] int64 ([B, C] with C captions), equal exactly where two captions are the same text.
        image_ids: [B] int64, equal exactly where two rows are the same picture.
        keys: the B samples' names.
        bad: the samples that were drawn for this batch and could not be read (they are not among the B).
        label_ids: [B] int64, equal exactly where two rows have the same class label; a row without one has an id of its own.
        weights: [B] float32, how much each row counts in the loss.
        negatives: [B, K, L] int64, tokens of texts that are known to be wrong for the row's picture.
        negatives_given: [B, K] bool, false where a row has fewer than K of them.
    """

    pixels: Tensor
    tokens: Tensor
    text_ids: Tensor
    image_ids: Tensor
    keys: tuple[str, ...]
    bad: tuple[BadSample, ...] = ()
    label_ids: Tensor | None = None
    weights: Tensor | None = None
    negatives: Tensor | None = None
    negatives_given: Tensor | None = None

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name; each has a row a sample."""
        import torch

        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def split(self, size: int, *, least: int = 1) -> Sequence[Batch]:
        """Consecutive parts of `size` rows, the last of what is left; their rows in order are this batch's.

        A last part of fewer than `least` rows joins the one before it, which is larger then.
        """
        if size < 1:
            raise ValueError(f"a part needs at least 1 row, got {size}")
        starts = list(range(0, len(self), size))
        if len(starts) > 1 and len(self) - starts[-1] < least:
            starts.pop()
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(self)], strict=True):
            rows: dict[str, Any] = {name: value[start:stop] for name, value in self.tensors().items()}
            parts.append(replace(self, keys=self.keys[start:stop], bad=(), **rows))
        return parts


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a training loss: the loop minimises the sum over terms of weight * sum / count.

    `count` is this term's own denominator (pairs, tokens, pixels), so that it can be reduced over ranks and
    micro-batches before the division, and N processes give the gradients of one.
    """

    sum: Tensor
    count: float | Tensor
    weight: float = 1.0

    @property
    def value(self) -> Tensor:
        """sum / count, unweighted."""
        return self.sum / self.count


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured figure, with what a reader needs to trust it.

    Attributes:
        value: the figure, in `unit`.
        count: how many items it was measured on.
        ci95: its 95% confidence interval (low, high).
        unit: e.g. "fraction", "rank", "nats".
        chance: what guessing would give, where that has a meaning.
    """

    value: float
    count: int
    ci95: tuple[float, float]
    unit: str = "fraction"
    chance: float | None = None
