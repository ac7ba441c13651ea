"""LoRA: a matrix of low rank is learned beside one that stands still (arXiv 2106.09685, section 4.1).

Here beside queries, keys and values of every block of an image tower, as CLIP-LoRA has it (arXiv 2405.18541; its program divides
alpha by the root of R, adapts the text tower too, and has dropout).

Shape legend: B batch, T tokens, W width, R rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wordsight.nn.tuning import transformer_blocks


class LoRAQueriesKeysValues(nn.Module):
    """In place of an attention's fused `qkv`: y = (W + alpha / R * up down) x + b, for q, k and v each.

    While it learns, x goes through the small matrices; where no gradient is asked for they are put together with W first, which
    is the same but for rounding.

    Args:
        qkv: W and b, which should stand still.
        rank: R.
        alpha: what the learned matrix is multiplied by, times R.

    Attributes:
        down: [3, R, W], uniform as a linear layer starts.
        up: [3, W, R], 0 at first, so that nothing is changed.
    """

    def __init__(self, qkv: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        width = qkv.in_features
        like = {"dtype": qkv.weight.dtype, "device": qkv.weight.device}
        self.qkv, self.factor = qkv, alpha / rank
        self.down = nn.Parameter(torch.empty(3, rank, width).uniform_(-1, 1).mul_(width**-0.5).to(**like))  # type: ignore[call-overload]
        self.up = nn.Parameter(torch.zeros(3, width, rank, **like))  # type: ignore[call-overload]

    @property
    def weight(self) -> Tensor:
        """All of it as one matrix: [3 W, W]."""
        return self.qkv.weight + self.factor * (self.up @ self.down).flatten(0, 1)

    @property
    def bias(self) -> Tensor:
        """[3 W]."""
        return self.qkv.bias

    def forward(self, x_BTW: Tensor) -> Tensor:
        """[B, T, W] -> [B, T, 3 W]."""
        if not torch.is_grad_enabled():
            return F.linear(x_BTW, self.weight, self.bias)
        low_BT3R = F.linear(x_BTW, self.down.flatten(0, 1)).unflatten(-1, self.down.shape[:2])
        change_BT3W = torch.einsum("...ir,iwr->...iw", low_BT3R, self.up)
        return self.qkv(x_BTW) + self.factor * change_BT3W.flatten(-2)


def add_lora(tower: nn.Module, rank: int, alpha: float) -> None:
    """Put LoRA beside queries, keys and values of every block of a vision transformer, in place.

    Raises:
        ValueError: another tower, a rank that is no whole number of 1 to the width, or an alpha that is no number above 0.
    """
    blocks = transformer_blocks(tower, "LoRA")
    width = blocks[0].attn.width
    if not isinstance(rank, int) or not 1 <= rank <= width:
        raise ValueError(f"rank must be a whole number of 1 to the tower's width {width}, got {rank!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a number above 0, got {alpha}")
    for block in blocks:
        # an attention asks its `qkv` for its output, or for its weight and bias
        block.attn.qkv = LoRAQueriesKeysValues(block.attn.qkv, rank, alpha)  # type: ignore[assignment]
