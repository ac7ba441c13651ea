"""Softmax and sigmoid over all pairs of a batch in tiles: neither forward nor backward ever holds the [B, B] matrix.

The softmax's forward pass goes over the tiles once and keeps a log-sum-exp for each row and each column; its backward pass
computes each tile again. That is four matrix products of B^2 D each, one more than with a matrix that is kept; memory is
O(B D + tile^2). Ideas: online softmax (arXiv 1805.02867), recomputation for attention (arXiv 2112.05682) and for this loss
(arXiv 2410.17243); here both directions share one pass.

Over a ring of processes the rows stay and the columns travel: a block of texts visits every process, its columns' sums and in the
backward pass its gradient a hop behind it.

Shape legend: R rows (images) of this process, T columns (texts) of the block at hand, D embedding width, K kinds of keys, r t
sides of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wordsight.losses.ring import Block, Ring

LSE, RIGHT, COUNT, EVERY = range(4)  # what is known of a row or column: log-sum-exp, sum and number of right logits, sum of all


@dataclass(frozen=True)
class Pairs:
    """All pairs between the rows of this process and the columns of all processes.

    Attributes:
        image_RD: the rows.
        text_TD: this process's columns; column j belongs to row j unless there are keys.
        image_keys_RK: int64; a pair is right where any kind of key agrees. K = 0: only row j and column j are.
        text_keys_TK: the same of the columns.
        wrong_T: bool, columns that are right for no row.
        tile: side of a tile.
        ring: the processes.
        sizes: columns of every process.
    """

    image_RD: Tensor
    text_TD: Tensor
    image_keys_RK: Tensor
    text_keys_TK: Tensor
    wrong_T: Tensor
    tile: int
    ring: Ring
    sizes: list[int]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or wider where the embeddings are."""
        return torch.promote_types(torch.promote_types(self.image_RD.dtype, self.text_TD.dtype), torch.float32)

    def around(
        self, visit: Callable[..., Tensor | None], *extra: Tensor, merge: Callable[..., Tensor] = Tensor.add_
    ) -> Tensor | None:
        """`Ring.around` for the columns, with more that is known of them; `visit` gets (columns, their owner)."""
        return self.ring.around([self.text_TD, self.text_keys_TK, self.wrong_T, *extra], self.sizes, visit, merge)

    def tiles(
        self, block: Block, owner: int, scale: Tensor
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor | None]]:
        """(rows, columns, images [r, D], texts [t, D], logits [r, t], right pairs [r, t] or None) of every tile."""
        text_TD = block[0]
        for top in range(0, len(self.image_RD), self.tile):
            rows = slice(top, top + self.tile)
            image_rD = self.image_RD[rows].to(self.dtype)
            scaled_rD = image_rD * scale
            for left in range(0, len(text_TD), self.tile):
                columns = slice(left, left + self.tile)
                text_tD = text_TD[columns].to(self.dtype)
                logits_rt = scaled_rD @ text_tD.T
                yield rows, columns, image_rD, text_tD, logits_rt, self.right(block, owner, rows, columns)

    def right(self, block: Block, owner: int, rows: slice, columns: slice) -> Tensor | None:
        """Which pairs of a tile are right: bool [r, t], or None where it is plain that none is."""
        text_TD, text_keys_TK, wrong_T = block[:3]
        if self.image_keys_RK.shape[1]:
            return agree(self.image_keys_RK[rows], text_keys_TK[columns], wrong_T[columns])
        if owner != self.ring.rank or rows.start >= columns.stop or columns.start >= rows.stop:
            return None
        places_r = torch.arange(len(self.image_RD), device=text_TD.device)[rows]
        return places_r[:, None] == torch.arange(len(text_TD), device=text_TD.device)[columns]

    def gradients(self, log_scale: Tensor, of_tile: Callable[..., Tensor], *extra: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those at the rows, the own columns and log_scale.

        Args:
            log_scale: scalar.
            of_tile: (rows, columns, logits, right pairs, the block) -> the gradient at the tile's logits.
            extra: more of the columns that travels with them.
        """
        scale = log_scale.to(self.dtype).exp()
        at_image_RD = torch.zeros_like(self.image_RD, dtype=self.dtype)

        def visit(block: Block, owner: int) -> Tensor:
            at_text_TD = torch.zeros_like(block[0], dtype=self.dtype)
            for rows, columns, image_rD, text_tD, logits_rt, right_rt in self.tiles(block, owner, scale):
                at_logits_rt = of_tile(rows, columns, logits_rt, right_rt, block)
                at_image_RD[rows].addmm_(at_logits_rt, text_tD)
                at_text_TD[columns].addmm_(at_logits_rt.T, image_rD)
            return at_text_TD

        at_text_TD = self.around(visit, *extra)
        assert at_text_TD is not None
        at_image_RD *= scale
        at_text_TD *= scale
        # the sum over pairs of gradient times logit, without another [R, D]
        at_log_scale = torch.einsum("rd,rd->r", at_image_RD, self.image_RD.to(self.dtype)).sum()
        return (
            at_image_RD.to(self.image_RD.dtype),
            at_text_TD.to(self.text_TD.dtype),
            at_log_scale.to(log_scale.dtype).reshape(log_scale.shape),
        )


def agree(image_keys_RK: Tensor, text_keys_TK: Tensor, wrong_T: Tensor) -> Tensor:
    """Which pairs are right: bool [R, T], true where any kind of key agrees and the text is not wrong for all."""
    right_RT = torch.zeros(len(image_keys_RK), len(text_keys_TK), dtype=torch.bool, device=image_keys_RK.device)
    for image_key_R, text_key_T in zip(image_keys_RK.unbind(1), text_keys_TK.unbind(1), strict=True):
        right_RT |= image_key_R[:, None] == text_key_T
    return right_RT & ~wrong_T


class SoftmaxCrossEntropy(torch.autograd.Function):
    """Cross entropy of every row over all columns, and of every column over all rows."""

    @staticmethod
    def forward(
        ctx: Any, image_RD: Tensor, text_TD: Tensor, log_scale: Tensor, pairs: Pairs, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """[R] and [T]; columns that are right for no row get what would be their log-sum-exp."""
        scale = log_scale.to(pairs.dtype).exp()
        rows_R4 = _nothing_known(image_RD, pairs.dtype)

        def visit(block: Block, owner: int) -> Tensor:
            columns_T4 = _nothing_known(block[0], pairs.dtype)
            for rows, columns, _, _, logits_rt, right_rt in pairs.tiles(block, owner, scale):
                lse_r, lse_t = _log_sums(logits_rt)
                rows_R4[rows] = _merge(rows_R4[rows], _summary(lse_r, logits_rt, right_rt, 1, smoothing))
                columns_T4[columns] = _merge(columns_T4[columns], _summary(lse_t, logits_rt, right_rt, 0, smoothing))
            return columns_T4

        columns_T4 = pairs.around(visit, merge=_merge)
        assert columns_T4 is not None
        if pairs.image_keys_RK.shape[1] and bool((rows_R4[:, COUNT] == 0).any()):
            row = int((rows_R4[:, COUNT] == 0).nonzero()[0])
            raise ValueError(f"no text of the batch is right for image {row}: its keys agree with none")
        num_rows, num_columns = pairs.ring.add(torch.tensor([len(image_RD), len(text_TD)], device=image_RD.device)).tolist()
        ctx.pairs, ctx.smoothing, ctx.numbers = pairs, smoothing, (num_rows, num_columns)
        ctx.save_for_backward(log_scale, rows_R4, columns_T4)
        return _losses(rows_R4, smoothing, num_columns), _losses(columns_T4, smoothing, num_rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_higher_derivatives()
        log_scale, rows_R4, columns_T4 = ctx.saved_tensors
        smoothing, (num_rows, num_columns) = ctx.smoothing, ctx.numbers
        of_rows_R3 = _upstream(upstream[0], rows_R4, smoothing)
        of_columns_T3 = _upstream(upstream[1], columns_T4, smoothing)

        def of_tile(rows: slice, columns: slice, logits_rt: Tensor, right_rt: Tensor | None, block: Block) -> Tensor:
            (lse_r, up_r, right_r), (lse_t, up_t, right_t) = of_rows_R3[rows].unbind(1), block[3][columns].unbind(1)
            at_logits_rt = _softmax_gradient(logits_rt, lse_r, up_r, lse_t, up_t)
            if right_rt is not None:
                at_logits_rt -= right_rt * (right_r[:, None] + right_t)
            if smoothing:
                at_logits_rt -= smoothing * (up_r[:, None] / num_columns + up_t / num_rows)
            return at_logits_rt

        return (*ctx.pairs.gradients(log_scale, of_tile, of_columns_T3), None, None)


class SigmoidCrossEntropy(torch.autograd.Function):
    """The weighted sum over rows of their binary cross entropies: is this column right for it?

    No pair needs to know of another, so one process computes loss and gradients from each tile at once: three matrix products,
    as with a matrix that is kept. Around a ring, where each process's gradient from above counts for its own rows, and in a
    second backward pass, tiles are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, image_RD: Tensor, text_TD: Tensor, log_scale: Tensor, bias: Tensor, pairs: Pairs, weights_R: Tensor
    ) -> Tensor:
        """Scalar."""
        scale, shift = log_scale.to(pairs.dtype).exp(), bias.to(pairs.dtype)
        sums_R = torch.zeros(len(image_RD), dtype=pairs.dtype, device=image_RD.device)
        ctx.pairs, ctx.gradients = pairs, None
        ctx.save_for_backward(log_scale, bias, weights_R)
        if pairs.ring.size == 1 and any(ctx.needs_input_grad):
            ctx.gradients = _sigmoid_gradients(pairs, log_scale, bias, weights_R, sums_R)
        else:

            def visit(block: Block, owner: int) -> None:
                for rows, _, _, _, logits_rt, right_rt in pairs.tiles(block, owner, scale):
                    sums_R[rows] -= pair_log_probs(logits_rt.add_(shift), right_rt).sum(1)

            pairs.around(visit)
        return weights_R @ sums_R

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_higher_derivatives()
        log_scale, bias, weights_R = ctx.saved_tensors
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            found = _sigmoid_gradients(ctx.pairs, log_scale, bias, weights_R * upstream[0])
        else:
            for gradient in found:
                gradient *= upstream[0]
        return (*found, None, None)


def _sigmoid_gradients(
    pairs: Pairs, log_scale: Tensor, bias: Tensor, weights_R: Tensor, sums_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of the weighted sum at the rows, the own columns, log_scale and bias; the rows' losses are added to `sums_R`."""
    shift = bias.to(pairs.dtype)
    at_bias = torch.zeros_like(shift)

    def of_tile(rows: slice, columns: slice, logits_rt: Tensor, right_rt: Tensor | None, block: Block) -> Tensor:
        logits_rt += shift
        if sums_R is not None:
            sums_R[rows] -= pair_log_probs(logits_rt, right_rt).sum(1)
        at_logits_rt = logits_rt.sigmoid_()
        if right_rt is not None:
            at_logits_rt -= right_rt.to(at_logits_rt.dtype)
        at_logits_rt *= weights_R[rows, None]
        at_bias.add_(at_logits_rt.sum())
        return at_logits_rt

    return (*pairs.gradients(log_scale, of_tile), at_bias.to(bias.dtype))


def pair_log_probs(logits_RT: Tensor, right_RT: Tensor | None) -> Tensor:
    """log sigmoid(logit) of the right pairs, log sigmoid(-logit) of the others (None: of all): [R, T]."""
    # not softplus, which is cut off at 20 with an error of 2e-9
    return F.logsigmoid(-logits_RT if right_RT is None else torch.where(right_RT, logits_RT, -logits_RT))


def _nothing_known(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The summary of no logits: [n, 4]."""
    known = torch.zeros(len(vectors), 4, dtype=dtype, device=vectors.device)
    known[:, LSE] = -torch.inf
    return known


def _log_sums(logits_rt: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of a tile's rows and columns: [r], [t]. One exponential serves both, unless a row or column would
    underflow.
    """
    peak = logits_rt.amax()
    above_rt = (logits_rt - peak).exp_()
    sums_r, sums_t = above_rt.sum(1), above_rt.sum(0)
    # what is below the smallest number is then at most 1e-20 of a sum
    if bool(torch.minimum(sums_r.amin(), sums_t.amin()) > 1e20 * torch.finfo(logits_rt.dtype).tiny):
        return sums_r.log_() + peak, sums_t.log_() + peak
    return logits_rt.logsumexp(1), logits_rt.logsumexp(0)


def _softmax_gradient(logits_rt: Tensor, lse_r: Tensor, up_r: Tensor, lse_t: Tensor, up_t: Tensor) -> Tensor:
    """up_r exp(logits - lse_r) + up_t exp(logits - lse_t), in the memory of the logits where one exponential serves both."""
    peak = torch.maximum(lse_r.amax(), lse_t.amax())
    if bool(peak - torch.minimum(lse_r.amin(), lse_t.amin()) < 40):  # a share that underflows to 0 is then below exp(-47)
        shares_rt = (up_r * (peak - lse_r).exp())[:, None] + up_t * (peak - lse_t).exp()
        return logits_rt.sub_(peak).exp_().mul_(shares_rt)
    return (logits_rt - lse_r[:, None]).exp_().mul_(up_r[:, None]) + logits_rt.sub_(lse_t).exp_().mul_(up_t)


def _summary(lse: Tensor, logits_rt: Tensor, right_rt: Tensor | None, dim: int, smoothing: float) -> Tensor:
    """What a tile tells of its rows (dim 1) or columns (dim 0): [n, 4]."""
    known = logits_rt.new_zeros(len(lse), 4)
    known[:, LSE] = lse
    if right_rt is not None:
        known[:, RIGHT] = (logits_rt * right_rt).sum(dim)
        known[:, COUNT] = right_rt.sum(dim)
    if smoothing:
        known[:, EVERY] = logits_rt.sum(dim)
    return known


def _merge(some: Tensor, more: Tensor) -> Tensor:
    """What two parts of the same rows or columns tell together."""
    both = some + more
    both[:, LSE] = torch.logaddexp(some[:, LSE], more[:, LSE])
    return both


def _losses(known: Tensor, smoothing: float, num_others: int) -> Tensor:
    """Cross entropy with targets (1 - smoothing) / count at the right ones and smoothing / others everywhere: [n]."""
    lse, right, count, every = known.unbind(1)
    return lse - (1 - smoothing) * right / count.clamp_min(1) - smoothing * every / num_others


def _upstream(upstream: Tensor, known: Tensor, smoothing: float) -> Tensor:
    """[n, 3]: log-sum-exp, the gradient from above, what of it goes to each right logit."""
    return torch.stack([known[:, LSE], upstream, (1 - smoothing) * upstream / known[:, COUNT].clamp_min(1)], dim=1)


def refuse_higher_derivatives() -> None:
    """Raise in a backward pass that is asked for a graph of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the tiled loss computes its matrix again in the backward pass and has no higher derivatives: pass tile=0 for the "
            "plain version, which has them"
        )
