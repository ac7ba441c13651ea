"""The sigmoid loss of pictures that look different to every text: Llip, arXiv 2405.00740.

A picture has K keys and values, a text a query and a feature. For the pair (i, j), head h of text j weighs picture i's tokens by
a_ijhk = softmax_k(q_jh k_ikh), the weighted values of all heads together go through the output matrix O, and the length of the
result is made 1: z_ij = unit([sum_k a_ijhk v_ikh]_h O). The similarity is z_ij f_j, and the loss SigLIP's.

As written that is D^2 multiplications a pair for O alone. O need not be applied to pairs: z f_j = sum_hk a_ijhk v_ikh (O f_j)_h
needs O once a text, and |z|^2 = a_ij G_i a_ij' needs G_i, the inner products of what O makes of picture i's S = K H parts. That
is S^2 a pair and S^2 D a picture, which with many texts is less: for Llip's B/16 (S = 256, D = 512) at 1,000 texts a third.

Shape legend: B R pictures, T texts, K tokens of a picture, H heads, d width of a head, D = H d, S = H K parts, E = 2 D, C
captions an image, M further negatives, r t sides of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wordsight.losses.contrastive import Keys, PairRows
from wordsight.losses.ring import Block, Ring
from wordsight.losses.tiles import Pairs, pair_log_probs, refuse_higher_derivatives

TILE_NUMBERS = 1 << 20  # pairs of a tile times their S weights: 4 MB of float32, of which a dozen are alive at once
GRAM_NUMBERS = 1 << 22  # inner products of the pictures of a tile
LEAST_LENGTH = 1e-12  # of a mixed vector that is divided by its length


def mixture_similarities(image: Tensor, text: Tensor, output: Tensor, num_heads: int) -> Tensor:
    """z_ij f_j of all pairs as the file's head defines it, with memory O(B T (K H + D)): the definition.

    Args:
        image: [B, K, 2 D], keys and values of each token.
        text: [T, 2 D], query (divided by its temperature) and feature (of length 1, for a cosine).
        output: O, [D, D]; a mixed row vector is multiplied by it from the right.
        num_heads: H.

    Returns:
        [B, T].
    """
    keys_BKHd, values_BKHd, query_THd, feature_TD = _parts(image, text, output, num_heads)
    weights_BTHK = torch.einsum("bkhd,thd->bthk", keys_BKHd, query_THd).softmax(-1)
    mixed_BTD = torch.einsum("bthk,bkhd->bthd", weights_BTHK, values_BKHd).flatten(2) @ output
    return (F.normalize(mixed_BTD, dim=-1, eps=LEAST_LENGTH) * feature_TD).sum(-1)


def mixture_scores(image: Tensor, text: Tensor, output: Tensor, num_heads: int, *, by_gram: bool) -> Tensor:
    """The same as it is computed in tiles, by one of the two ways to the lengths.

    Args and Returns as `mixture_similarities`. By inner products memory is O(B S^2 + B T S), otherwise O(B T (S + D)).
    """
    return _meet(*_hold(image, output, num_heads, by_gram), *_ask(text, output, num_heads))


def gram_pays(num_parts: int, width: int, num_texts: int) -> bool:
    """Whether lengths by inner products of S parts, S^2 (1 + D / T) multiplications a pair, take fewer than D^2."""
    return num_parts**2 * (num_texts + width) < width**2 * num_texts


def mixture_sigmoid(
    image: Tensor,
    text: Tensor,
    output: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    num_heads: int,
    tile: int | None = None,
    keys: Keys | None = None,
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    ring: Ring | None = None,
) -> Tensor:
    """-1/B sum_ij log sigmoid(y_ij (exp(log_scale) z_ij f_j + bias)), where y is 1 for right pairs and -1 for the others.

    Everything is computed in float32 (or wider, if the embeddings are), under autocast too.

    Args:
        image: [B, K, 2 D], keys and values of each token.
        text: [B, 2 D], query and feature of each text, the feature of length 1; or [B, C, 2 D].
        output: [D, D].
        log_scale: scalar.
        bias: scalar, added to each logit.
        num_heads: H, divides D.
        tile: 0 is the definition, with higher derivatives; a number is the side of the tiles in which it is computed piece by
            piece, forward and again backward, with memory O(B K D + tile^2 (S + D)), or O(B K D + tile^2 S + tile S^2) where
            that computes less; None chooses the tiles.
        keys, weights: as in `contrastive.sigmoid`.
        negatives: [M, 2 D], texts that are right for no image.
        ring: as in `contrastive.info_nce`. The gradient at `output` is then this process's share of it times the number of
            processes, whose average over processes is that of one process with the whole batch.

    Returns:
        Scalar, nats an image.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: a second derivative of the tiled version.
    """
    _check_shapes(image, text, output, num_heads)
    rows = PairRows(image, text, keys, negatives, weights, tile, ring)
    with torch.autocast(image.device.type, enabled=False):
        if tile == 0:
            wide = [tensor.to(rows.dtype) for tensor in (image, rows.text_TD, output)]
            similarities_BT = mixture_similarities(wide[0], wide[1], wide[2], num_heads)
            logits_BT = log_scale.to(rows.dtype).exp() * similarities_BT + bias.to(rows.dtype)
            sums_B = -pair_log_probs(logits_BT, rows.right()).sum(1)
        else:
            pairs = rows.pairs()
            way = _Way.choose(tile, num_heads, image.shape[1] * num_heads, len(output), sum(pairs.sizes) // len(pairs.sizes))
            sums_B = _MixtureCrossEntropy.apply(image, rows.text_TD, output, log_scale, bias, pairs, way)
        return rows.mean(sums_B)


@dataclass(frozen=True)
class _Way:
    """How the tiles are computed.

    Attributes:
        num_heads: H.
        by_gram: whether lengths come from inner products of a picture's parts, or from mixed vectors.
        rows: pictures of a tile.
        columns: texts of a tile.
    """

    num_heads: int
    by_gram: bool
    rows: int
    columns: int

    @classmethod
    def choose(cls, tile: int | None, num_heads: int, num_parts: int, width: int, num_texts: int) -> _Way:
        """The cheaper way, in tiles of `tile` or of what fits."""
        by_gram = gram_pays(num_parts, width, num_texts)
        if tile is not None:
            return cls(num_heads, by_gram, tile, tile)
        pairs = max(1, TILE_NUMBERS // (num_parts if by_gram else num_parts + width))
        rows = max(1, min(math.isqrt(pairs), GRAM_NUMBERS // num_parts**2 if by_gram else pairs))
        return cls(num_heads, by_gram, rows, max(1, pairs // rows))


class _MixtureCrossEntropy(torch.autograd.Function):
    """The sum of every row's binary cross entropies. Each tile's gradient is autograd's, of the tile computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        image_RKE: Tensor,
        text_TE: Tensor,
        output_DD: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        pairs: Pairs,
        way: _Way,
    ) -> Tensor:
        """[R]."""
        scale, shift, output = log_scale.to(pairs.dtype).exp(), bias.to(pairs.dtype), output_DD.to(pairs.dtype)
        sums_R = torch.zeros(len(image_RKE), dtype=pairs.dtype, device=image_RKE.device)

        def visit(block: Block, owner: int) -> None:
            query_HTd, asked_HTd = _ask(block[0].to(pairs.dtype), output, way.num_heads)
            for rows in _pieces(len(image_RKE), way.rows):
                held = _hold(image_RKE[rows].to(pairs.dtype), output, way.num_heads, way.by_gram)
                for columns in _pieces(len(query_HTd[0]), way.columns):
                    logits_rt = scale * _meet(*held, query_HTd[:, columns], asked_HTd[:, columns]) + shift
                    sums_R[rows] -= pair_log_probs(logits_rt, pairs.right(block, owner, rows, columns)).sum(1)

        pairs.around(visit)
        ctx.pairs, ctx.way = pairs, way
        ctx.save_for_backward(output_DD, log_scale, bias)
        return sums_R

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_higher_derivatives()
        output_DD, log_scale, bias = ctx.saved_tensors
        pairs, way, up_R = ctx.pairs, ctx.way, upstream[0]
        image_RKE, dtype = pairs.image_RD, pairs.dtype
        scale, shift = log_scale.to(dtype).exp(), bias.to(dtype)
        at_image_RKE = torch.zeros_like(image_RKE, dtype=dtype)
        output = _leaf(output_DD, dtype)
        at_output_DD, at_log_scale, at_bias = torch.zeros_like(output), torch.zeros_like(scale), torch.zeros_like(shift)

        def visit(block: Block, owner: int) -> Tensor:
            text_TE = _leaf(block[0], dtype)
            with torch.enable_grad():
                asking = _ask(text_TE, output, way.num_heads)
            at_asking = [torch.zeros_like(tensor) for tensor in asking]
            for rows in _pieces(len(image_RKE), way.rows):
                image_rKE = _leaf(image_RKE[rows], dtype)
                with torch.enable_grad():
                    held = _hold(image_rKE, output, way.num_heads, way.by_gram)
                held_leaves = [_leaf(tensor, dtype) for tensor in held]
                at_held = [torch.zeros_like(tensor) for tensor in held]
                for columns in _pieces(len(text_TE), way.columns):
                    leaves = held_leaves + [_leaf(tensor[:, columns], dtype) for tensor in asking]
                    with torch.enable_grad():
                        scores_rt = _meet(*leaves)
                    scaled_rt = scores_rt.detach() * scale
                    at_logits_rt = torch.sigmoid(scaled_rt + shift)
                    right_rt = pairs.right(block, owner, rows, columns)
                    if right_rt is not None:
                        at_logits_rt -= right_rt.to(dtype)
                    at_logits_rt *= up_R[rows, None]
                    at_bias.add_(at_logits_rt.sum())
                    at_log_scale.add_((at_logits_rt * scaled_rt).sum())
                    found = torch.autograd.grad(scores_rt, leaves, at_logits_rt * scale)
                    for total, part in zip(at_held, found[:3], strict=True):
                        total += part
                    for total, part in zip(at_asking, found[3:], strict=True):
                        total[:, columns] += part
                at_image_rKE, at_output = torch.autograd.grad(held, [image_rKE, output], at_held)
                at_image_RKE[rows] += at_image_rKE
                at_output_DD.add_(at_output)
            at_text_TE, at_output = torch.autograd.grad(asking, [text_TE, output], at_asking)
            at_output_DD.add_(at_output)
            return at_text_TE

        with torch.autocast(image_RKE.device.type, enabled=False):
            at_text_TE = pairs.around(visit)
        assert at_text_TE is not None
        return (
            at_image_RKE.to(image_RKE.dtype),
            at_text_TE.to(pairs.text_TD.dtype),
            at_output_DD.to(output_DD.dtype),
            at_log_scale.to(log_scale.dtype),
            at_bias.to(bias.dtype),
            None,
            None,
        )


def _parts(image: Tensor, text: Tensor, output: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values [B, K, H, d], queries [T, H, d], features [T, D]."""
    keys_BKD, values_BKD = image.chunk(2, dim=-1)
    query_TD, feature_TD = text.chunk(2, dim=-1)
    heads = (num_heads, -1)
    return keys_BKD.unflatten(-1, heads), values_BKD.unflatten(-1, heads), query_TD.unflatten(-1, heads), feature_TD


def _hold(image_rKE: Tensor, output_DD: Tensor, num_heads: int, by_gram: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What pairs need of pictures: keys and values [H, r, K, d], and for the lengths either the inner products of what `output`
    makes of the values, [r, S, S], or `output` itself.
    """
    keys_HrKd, values_HrKd = image_rKE.unflatten(-1, (2, num_heads, -1)).permute(2, 3, 0, 1, 4).contiguous().unbind()
    if not by_gram:
        return keys_HrKd, values_HrKd, output_DD.view_as(output_DD)
    made_rSD = torch.einsum("hrkd,hde->rhke", values_HrKd, output_DD.unflatten(0, (num_heads, -1))).flatten(1, 2)
    return keys_HrKd, values_HrKd, made_rSD @ made_rSD.mT


def _ask(text_TE: Tensor, output_DD: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """What pairs need of texts: queries, and features taken back through `output`; [H, T, d] each."""
    query_TD, feature_TD = text_TE.chunk(2, dim=-1)
    both = (query_TD.unflatten(-1, (num_heads, -1)), (feature_TD @ output_DD.T).unflatten(-1, (num_heads, -1)))
    return both[0].transpose(0, 1).contiguous(), both[1].transpose(0, 1).contiguous()


def _meet(keys_HrKd: Tensor, values_HrKd: Tensor, lengths: Tensor, query_Htd: Tensor, asked_Htd: Tensor) -> Tensor:
    """z_ij f_j of a tile: [r, t]. `lengths` is the third thing that `_hold` gives."""
    pictures, tokens = keys_HrKd.shape[1:3]
    weights_HrKt = (keys_HrKd.flatten(1, 2) @ query_Htd.mT).unflatten(1, (pictures, tokens)).softmax(2)
    if lengths.ndim == 3:
        inner_HrKt = (values_HrKd.flatten(1, 2) @ asked_Htd.mT).unflatten(1, (pictures, tokens))
        inner_rt = (weights_HrKt * inner_HrKt).sum((0, 2))
        weights_rSt = weights_HrKt.transpose(0, 1).flatten(1, 2)
        squared_rt = ((lengths @ weights_rSt) * weights_rSt).sum(1)
    else:
        mixed_Hrtd = weights_HrKt.mT @ values_HrKd
        inner_rt = (mixed_Hrtd * asked_Htd[:, None]).sum((0, 3))
        squared_rt = (mixed_Hrtd.permute(1, 2, 0, 3).flatten(2) @ lengths).square().sum(-1)
    return inner_rt / squared_rt.clamp_min(LEAST_LENGTH**2).sqrt()


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_()


def _pieces(length: int, side: int) -> Iterator[slice]:
    return (slice(start, min(start + side, length)) for start in range(0, length, side))


def _check_shapes(image: Tensor, text: Tensor, output: Tensor, num_heads: int) -> None:
    width = output.shape[-1]
    if (
        image.ndim != 3
        or text.ndim not in (2, 3)
        or len(image) != len(text)
        or not image.shape[-1] == text.shape[-1] == 2 * width
    ):
        raise ValueError(
            f"image is {tuple(image.shape)}, text {tuple(text.shape)} and output {tuple(output.shape)}: they must be "
            "[B, K, 2 D], [B, 2 D] (or [B, C, 2 D] with C captions an image) and [D, D], with the same B and D"
        )
    if output.shape != (width, width) or num_heads < 1 or width % num_heads:
        raise ValueError(f"output is {tuple(output.shape)}: it must be [D, D], and {num_heads} heads must divide D")
    if not image.shape[1]:
        raise ValueError("a picture needs at least 1 token")
