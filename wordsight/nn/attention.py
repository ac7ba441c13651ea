"""Multi-head self-attention (Attention Is All You Need, arXiv 1706.03762) that can compute only the rows that are used.

Shape legend: B batch, T tokens, W width, H heads, D width of a head, R rows asked for (1).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with one fused projection for queries, keys and values.

    Args:
        width: W, a multiple of `num_heads`.
        num_heads: H.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"width {width} cannot be divided over {num_heads} heads; choose a number of heads that divides it")
        self.width = width
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        # what torch.nn.MultiheadAttention, and so the published vision towers, start from; text towers draw their own
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_BTW: Tensor, *, is_causal: bool = False, visible_BT: Tensor | None = None) -> Tensor:
        """softmax(q k' / sqrt(D)) v for every token.

        Args:
            x_BTW: [B, T, W].
            is_causal: whether token t sees only tokens 0..t.
            visible_BT: bool [B, T], the tokens that are seen at all, at least one a sample; all of them if None. Not together
                with `is_causal`.

        Returns:
            [B, T, W].
        """
        q_BHTD, k_BHTD, v_BHTD = self.qkv(x_BTW).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask_B11T = None if visible_BT is None else visible_BT[:, None, None, :]
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask_B11T, is_causal=is_causal)
        return self.proj(out_BHTD.transpose(1, 2).flatten(2))

    def forward_row(self, x_BTW: Tensor, row_BRW: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        """The same for one token a sample: keys and values of all tokens, the query of that one only.

        Args:
            x_BTW: [B, T, W].
            row_BRW: [B, 1, W], the token of each sample whose output is wanted.
            visible_BT: bool [B, T], the tokens that it sees; all of them if None.

        Returns:
            [B, 1, W].
        """
        q_weight, kv_weight = self.qkv.weight.split([self.width, 2 * self.width])
        q_bias, kv_bias = self.qkv.bias.split([self.width, 2 * self.width])
        q_BHRD = F.linear(row_BRW, q_weight, q_bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_BHTD, v_BHTD = (
            F.linear(x_BTW, kv_weight, kv_bias).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mask_B11T = None if visible_BT is None else visible_BT[:, None, None, :]
        out_BHRD = F.scaled_dot_product_attention(q_BHRD, k_BHTD, v_BHTD, attn_mask=mask_B11T)
        return self.proj(out_BHRD.transpose(1, 2).flatten(2))
