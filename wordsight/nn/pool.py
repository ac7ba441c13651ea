"""Pools by attention: over CLIP's feature maps the map's mean asks, in SigLIP a learned probe does.

CLIP, arXiv 2103.00020, section 2.4; MAP, "multihead attention pooling", arXiv 1810.00825, section 3.3, and 2106.04560.

Shape legend: B batch, T tokens (in CLIP's 1 + places), W width, H heads, D width of a head, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wordsight.nn.attention import Attention
from wordsight.nn.transformer import MLP


class AttentionPool(nn.Module):
    """One multi-head attention query, the mean of the map, over the mean and all places.

    Only the mean's output is used, so only its query exists; and with one query the key and value projections commute with the
    weighting: q' (K x) = (K' q)' x, and the softmax weights sum to 1. So K and V are applied once a sample and not once a place,
    which is exact and takes a (1 + places)-th of the work of projecting every place.

    Args:
        width: W, channels of the map.
        num_heads: H, divides W.
        grid: places down and across.
        embed_dim: E.
    """

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int], embed_dim: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"width {width} cannot be divided over {num_heads} heads; choose a number of heads that divides it")
        self.num_heads = num_heads
        self.position_embedding = nn.Parameter(torch.randn(1 + grid[0] * grid[1], width) / width**0.5)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, embed_dim)
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, map_BWhw: Tensor) -> Tensor:
        """[B, W, h, w] -> [B, E]."""
        return self.proj(self.pooled(map_BWhw))

    def pooled(self, map_BWhw: Tensor) -> Tensor:
        """What the last projection reads: [B, W, h, w] -> [B, W]."""
        places_BTW = map_BWhw.flatten(2).transpose(1, 2)
        x_BTW = torch.cat([places_BTW.mean(1, keepdim=True), places_BTW], dim=1) + self.position_embedding
        heads = (self.num_heads, -1)
        q_BHD = self.q(x_BTW[:, 0]).unflatten(-1, heads)
        q_BHD = q_BHD * q_BHD.shape[-1] ** -0.5
        folded_BHW = torch.einsum("bhd,hdw->bhw", q_BHD, self.k.weight.unflatten(0, heads))
        scores_BHT = folded_BHW @ x_BTW.transpose(1, 2) + (q_BHD * self.k.bias.unflatten(0, heads)).sum(-1, keepdim=True)
        weights_BHT = scores_BHT.softmax(-1, dtype=torch.promote_types(scores_BHT.dtype, torch.float32)).to(x_BTW.dtype)
        mixed_BHW = weights_BHT @ x_BTW
        out_BHD = torch.einsum("bhw,hdw->bhd", mixed_BHW, self.v.weight.unflatten(0, heads)) + self.v.bias.unflatten(0, heads)
        return out_BHD.flatten(1)


class MAPPool(nn.Module):
    """A learned probe asks all tokens; then x + mlp(norm(x)).

    Args:
        width: W.
        num_heads: H, divides W.
        mlp_width: hidden width of the MLP.
        activation: of the MLP.
        norm_eps: of the layer norm.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, activation: str, norm_eps: float = 1e-5) -> None:
        super().__init__()
        bound = (6 / (1 + width)) ** 0.5  # Glorot's, from one number to W
        self.probe = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        self.attn = Attention(width, num_heads)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_width, activation)

    def forward(self, x_BTW: Tensor) -> Tensor:
        """[B, T, W] -> [B, W]."""
        probe_B1W = self.probe.to(x_BTW.dtype).expand(len(x_BTW), 1, -1)
        pooled_BW = self.attn.forward_row(x_BTW, probe_B1W)[:, 0]
        return pooled_BW + self.mlp(self.norm(pooled_BW))
