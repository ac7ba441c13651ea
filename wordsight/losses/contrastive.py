"""Contrastive losses between two sets of embeddings: InfoNCE and sigmoid, plain or in tiles, in one process or around a ring.

InfoNCE: CPC, arXiv 1807.03748; CLIP, arXiv 2103.00020, figure 3. Sigmoid: SigLIP, arXiv 2303.15343, algorithm 1. Several right
texts for an
image: arXiv 2004.11362, equation 2; UniCL, arXiv 2204.03610.

Shape legend: B pairs, C captions an image, T texts, M further negatives, D embedding width, K kinds of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wordsight.losses.ring import Ring
from wordsight.losses.tiles import Pairs, SigmoidCrossEntropy, SoftmaxCrossEntropy, agree, pair_log_probs

TILE = 512
PLAIN_PAIRS = 1 << 20  # up to so many pairs the plain version is as fast, and 4 MB is no memory

Keys = tuple[Tensor, Tensor]


def info_nce(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    *,
    tile: int | None = None,
    keys: Keys | None = None,
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ring: Ring | None = None,
) -> Tensor:
    """Symmetric InfoNCE: the mean over pairs of -log softmax(exp(log_scale) image text') at the right ones, both ways, halved.

    Logits and softmax are float32 (or wider, if the embeddings are) under autocast too. With every pair equally likely the loss
    is log B.

    Args:
        image: [B, D], L2-normalised.
        text: [B, D], L2-normalised, row i belongs to row i of `image`; or [B, C, D], all C of which do.
        log_scale: scalar, log of the inverse temperature.
        tile: 0 computes the [B, T] matrix (the definition, with higher derivatives); a number is the side of the tiles, in which
            it is computed piece by piece, in the forward and again in the backward pass, with memory O(B D); None takes the plain
            version up to 2^20 pairs and tiles of 512 above.
        keys: (int64 [K, B] of the images, int64 [K, T] of the texts, or [K, B, C]): text j is right for image i where any of the
            K kinds agrees, and each row's target is spread evenly over its right columns (each column's over its right rows). If
            None, an image's own texts are. `duplicate_keys` and a batch's `label_ids[None]` are such keys.
        negatives: [M, D], L2-normalised texts that are right for no image: they stand in every image's denominator.
        weights: [B], not negative: how much each pair counts in both means. A pair of weight 0 asks for nothing; its picture
            and texts still stand among the answers of the others. If all are 0, the loss is.
        label_smoothing: the share of each target that is spread evenly over everything, right ones included.
        ring: the processes whose batches make one; each calls this with its own rows, as many as it has, and gets the loss of
            all. No process ever holds another's rows for longer than it computes on them. The gradients are those of the sum of
            the processes' (equal) losses: averaged over processes, as DDP and FSDP do, they are exactly those of one process with
            the whole batch, for the embeddings, their towers and log_scale alike.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: shapes that do not fit, or an image without any right text.
        RuntimeError: a second derivative of the tiled version.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    _check_shapes(image, text)
    rows = PairRows(image, text, keys, negatives, weights, tile, ring)
    with torch.autocast(image.device.type, enabled=False):
        if rows.plain:
            logits_BT = log_scale.to(rows.dtype).exp() * image.to(rows.dtype) @ rows.text_TD.to(rows.dtype).T
            right_BT = rows.right().to(rows.dtype)
            to_text_B = _cross_entropy(logits_BT, right_BT, label_smoothing)
            right_ones = ~rows.wrong_T
            to_image_T = _cross_entropy(logits_BT.T[right_ones], right_BT.T[right_ones], label_smoothing)
        else:
            pairs = rows.pairs()
            to_text_B, to_image_T = SoftmaxCrossEntropy.apply(image, rows.text_TD, log_scale, pairs, float(label_smoothing))
            to_image_T = to_image_T[: rows.num_right]
        return (rows.mean(to_text_B) + rows.mean(to_image_T)) / 2


def sigmoid(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    tile: int | None = None,
    keys: Keys | None = None,
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    ring: Ring | None = None,
) -> Tensor:
    """SigLIP's loss, which asks of each pair alone whether it is right.

    It is -1/B sum_ij log sigmoid(z_ij (exp(log_scale) image_i text_j + bias)), where z is 1 for right pairs and -1 for the
    others. Precision, `tile`, `keys`, `negatives` and `ring` are as in `info_nce`. With scale and bias 0 the loss is T log 2.

    Args:
        image: [B, D], L2-normalised.
        text: [B, D] or [B, C, D], L2-normalised.
        log_scale: scalar, log of what cosines are multiplied by; SigLIP starts at log 10.
        bias: scalar, added to each logit; SigLIP starts at -10.
        tile: as in `info_nce`.
        keys: as in `info_nce`; every right pair is a positive of its own.
        negatives: [M, D].
        weights: [B], not negative: how much the pairs of each image count; the sum is over w_i l_ij, divided by the sum of w_i.
            An image of weight 0 is left out; its texts are still wrong for the others. If all are 0, the loss is.
        ring: as in `info_nce`.

    Returns:
        Scalar, nats an image.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: a second derivative of the tiled version.
    """
    _check_shapes(image, text)
    rows = PairRows(image, text, keys, negatives, weights, tile, ring)
    with torch.autocast(image.device.type, enabled=False):
        if rows.plain:
            logits_BT = log_scale.to(rows.dtype).exp() * image.to(rows.dtype) @ rows.text_TD.to(rows.dtype).T + bias.to(
                rows.dtype
            )
            return rows.mean(-pair_log_probs(logits_BT, rows.right()).sum(1))
        shares_B = rows.shares(len(image), rows.dtype)
        return rows.of_all(SigmoidCrossEntropy.apply(image, rows.text_TD, log_scale, bias, rows.pairs(), shares_B))


def duplicate_keys(text_ids: Tensor, image_ids: Tensor) -> Keys:
    """Keys by which a batch's repeated texts and pictures are right for each other.

    Text j is right for image i if it is the same text as one of image i's own, or if its own image is the same picture as image
    i.

    Args:
        text_ids: int64 [B] or [B, C], equal exactly where two texts are the same.
        image_ids: int64 [B], equal exactly where two images are the same.
    """
    text_ids_BC = text_ids if text_ids.ndim == 2 else text_ids[:, None]
    own_of_text_BC = image_ids[:, None].expand_as(text_ids_BC)
    num_captions = text_ids_BC.shape[1]
    of_image_KB = torch.stack([image_ids, *text_ids_BC.unbind(1)])
    of_text_KT = torch.stack([own_of_text_BC.flatten(), *[text_ids_BC.flatten()] * num_captions])
    return of_image_KB, of_text_KT


def pair_arguments(embeddings: Mapping[str, Tensor], positives: Literal["plain", "multi_positive", "labels"]) -> dict[str, Any]:
    """What a batch's embeddings say of `keys`, `negatives` and `weights`, as both losses take them.

    Args:
        embeddings: of `DualEncoderMixin.embeddings`.
        positives: which texts are right for an image: its own ("plain"), also those that equal one of its own or belong to the
            same picture ("multi_positive"), or all of its class ("labels", UniCL).

    Raises:
        ValueError: "labels" without labels.
    """
    text = embeddings["text"]
    keys = None
    if positives == "multi_positive":
        keys = duplicate_keys(embeddings["text_ids"], embeddings["image_ids"])
    elif positives == "labels":
        if "label_ids" not in embeddings:
            raise ValueError("the loss contrasts class labels and the batch has none: its source must say them")
        labels_B = embeddings["label_ids"]
        keys = labels_B[None], labels_B.repeat_interleave(text.shape[1] if text.ndim == 3 else 1)[None]
    negatives = None
    if "negatives" in embeddings:
        negatives = embeddings["negatives"][embeddings["negatives_given"]]
    return {"keys": keys, "negatives": negatives, "weights": embeddings.get("weights")}


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise a ValueError unless low <= value < high."""
    if not low <= value < high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}), got {value}")


class PairRows:
    """The arguments that losses over pairs share, checked and in one form: images against a flat list of texts, negatives last.

    Attributes:
        image: [B, ...], as given.
        text_TD: [T, D], the images' own texts and the negatives.
        num_right: how many of them are own texts.
        wrong_T: bool, the negatives.
        dtype: what is computed in.
        plain: whether the plain version is meant.
        ring: the processes.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        keys: Keys | None,
        negatives: Tensor | None,
        weights: Tensor | None,
        tile: int | None,
        ring: Ring | None,
    ) -> None:
        _check_others(image, text, negatives, weights)
        if tile is not None and tile < 0:
            raise ValueError(f"tile is the side of a tile, 0 for the plain version or None to choose; got {tile}")
        self.ring = Ring.of_one() if ring is None else ring
        if tile == 0 and self.ring.size > 1:
            raise ValueError("tile=0 holds the whole matrix, which no process of a ring has: leave tile out, or give its side")
        self.image, self.weights, self.tile = image, weights, tile
        self.captions = text.shape[1] if text.ndim == 3 else 1
        own_TD = text.flatten(0, 1) if text.ndim == 3 else text
        self.num_right = len(own_TD)
        self.text_TD = own_TD if negatives is None else torch.cat([own_TD, negatives.to(own_TD.dtype)])
        self.dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        self.wrong_T = torch.arange(len(self.text_TD), device=image.device) >= self.num_right
        self.image_keys_BK, self.text_keys_TK = self._make_keys(keys)
        self.plain = tile == 0 or (tile is None and self.ring.size == 1 and len(image) * len(self.text_TD) <= PLAIN_PAIRS)

    def _make_keys(self, keys: Keys | None) -> tuple[Tensor, Tensor]:
        """[B, K] and [T, K]; K = 0 where row i and column i belong together and nothing else does."""
        rows, device = len(self.image), self.image.device
        if keys is None:
            if self.captions == 1:
                return torch.empty(rows, 0, dtype=torch.int64, device=device), self.text_TD.new_empty(
                    len(self.text_TD), 0, dtype=torch.int64
                )
            first = sum(shape[0] for shape in self.ring.shapes(self.image)[: self.ring.rank])
            own = torch.arange(first, first + rows, device=device)
            keys = own[None], own.repeat_interleave(self.captions)[None]
        image_keys_KB, text_keys_KT = keys[0], keys[1].flatten(1)
        if (
            image_keys_KB.ndim != 2
            or image_keys_KB.shape[1] != rows
            or text_keys_KT.shape != (len(image_keys_KB), self.num_right)
        ):
            raise ValueError(
                f"keys are {tuple(keys[0].shape)} for images and {tuple(keys[1].shape)} for texts; {rows} images and "
                f"{self.num_right} texts need [K, {rows}] and [K, {self.num_right}]"
            )
        of_negatives = text_keys_KT.new_zeros(len(text_keys_KT), len(self.text_TD) - self.num_right)
        return image_keys_KB.T.contiguous(), torch.cat([text_keys_KT, of_negatives], dim=1).T.contiguous()

    def right(self) -> Tensor:
        """Which pairs are right: bool [B, T]."""
        if self.image_keys_BK.shape[1]:
            return agree(self.image_keys_BK, self.text_keys_TK, self.wrong_T)
        return torch.eye(len(self.image), len(self.text_TD), dtype=torch.bool, device=self.image.device)

    def pairs(self) -> Pairs:
        """The same for the tiled version."""
        sizes = [shape[0] for shape in self.ring.shapes(self.text_TD)]
        return Pairs(
            self.image.detach(),
            self.text_TD.detach(),
            self.image_keys_BK,
            self.text_keys_TK,
            self.wrong_T,
            self.tile or TILE,
            self.ring,
            sizes,
        )

    def mean(self, values: Tensor) -> Tensor:
        """The weighted mean over all processes' rows or texts, with the gradient of the sum of the processes' equal means.

        Where all weights are 0 it is 0.
        """
        return self.of_all((self.shares(len(values), values.dtype) * values).sum())

    def shares(self, count: int, dtype: torch.dtype) -> Tensor:
        """What each of `count` rows or texts has of that mean times the processes: [count]."""
        if self.weights is None:
            weights = torch.ones(count, dtype=dtype, device=self.image.device)
        else:
            weights = self.weights.to(dtype).repeat_interleave(count // max(len(self.weights), 1))
        return weights * (self.ring.size / self.ring.add(weights.sum()).clamp_min(torch.finfo(dtype).tiny))

    def of_all(self, total: Tensor) -> Tensor:
        """The mean from this process's sum of shares."""
        return total if self.ring.size == 1 else total + (self.ring.add(total) / self.ring.size - total.detach())


def _check_shapes(image: Tensor, text: Tensor) -> None:
    if image.ndim != 2 or text.ndim not in (2, 3) or len(image) != len(text) or image.shape[1] != text.shape[-1]:
        raise ValueError(
            f"image is {tuple(image.shape)} and text {tuple(text.shape)}: they must be [B, D] and [B, D] (or [B, C, D] with C "
            "captions an image), with the same B and D"
        )


def _check_others(image: Tensor, text: Tensor, negatives: Tensor | None, weights: Tensor | None) -> None:
    if not (image.is_floating_point() and text.is_floating_point()):
        raise ValueError(f"image is {image.dtype} and text {text.dtype}: embeddings are floating point")
    if negatives is not None and (negatives.ndim != 2 or negatives.shape[1] != text.shape[-1]):
        raise ValueError(f"negatives are {tuple(negatives.shape)}, they must be [M, {text.shape[-1]}]")
    if weights is not None and weights.shape != (len(image),):
        raise ValueError(f"weights are {tuple(weights.shape)}, they must be one a pair, [{len(image)}]")


def _cross_entropy(logits_RT: Tensor, right_RT: Tensor, label_smoothing: float) -> Tensor:
    """Of each row, with the target spread evenly over the right columns: [R]."""
    count_R = right_RT.sum(1, keepdim=True)
    if bool((count_R == 0).any()):
        raise ValueError(
            f"no text of the batch is right for image {int((count_R == 0).nonzero()[0, 0])}: its keys agree with none"
        )
    return F.cross_entropy(logits_RT, right_RT / count_R, reduction="none", label_smoothing=label_smoothing)
