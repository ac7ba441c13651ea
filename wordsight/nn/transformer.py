"""Pre-norm transformer blocks: attention and MLP on a residual stream (ViT, arXiv 2010.11929; GPT-2 for text).

Stochastic depth is arXiv 1603.09382, activation checkpointing arXiv 1604.06174, QuickGELU is x * sigmoid(1.702 x).
Shape legend: B batch, T tokens, W width, R rows asked for (1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wordsight.nn.attention import Attention
from wordsight.nn.random import uniform

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of the published CLIP models; differs from GELU by up to .02."""

    def forward(self, x: Tensor) -> Tensor:
        # the same through silu, which keeps one tensor for the backward pass where the formula as written keeps two
        return F.silu(1.702 * x) * (1 / 1.702)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),  # what JAX calls gelu; differs from GELU by up to .0005
}


def make_activation(name: str) -> nn.Module:
    """The activation of that name; an unknown one is a ValueError."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def drop_path(branch: Tensor, draw_B: Tensor, rate: float) -> Tensor:
    """Stochastic depth: zero the samples of a branch whose draw, uniform in [0, 1), is below `rate`; scale the rest up."""
    keep_B = (draw_B >= rate).to(branch.dtype) / (1.0 - rate)
    return branch * keep_B.view(-1, *[1] * (branch.ndim - 1))


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden_width: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.activation = make_activation(activation)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, activation: str, drop_rate: float = 0.0, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_width, activation)
        self.drop_rate = drop_rate
        self.random_stream = 0

    def forward(self, x_BTW: Tensor, is_causal: bool = False) -> Tensor:
        """[B, T, W] -> [B, T, W]."""
        return self._add_branches(x_BTW, self.attn(self.norm1(x_BTW), is_causal=is_causal))

    def forward_row(self, x_BTW: Tensor, row_B: Tensor, is_causal: bool = False) -> Tensor:
        """The block's output for token `row_B[b]` of each sample only: [B, T, W], int64 [B] -> [B, W]."""
        index_BRW = row_B[:, None, None].expand(-1, 1, x_BTW.shape[-1])
        normed_BTW = self.norm1(x_BTW)
        visible_BT = torch.arange(x_BTW.shape[1], device=x_BTW.device) <= row_B[:, None] if is_causal else None
        attended_BRW = self.attn.forward_row(normed_BTW, normed_BTW.gather(1, index_BRW), visible_BT)
        return self._add_branches(x_BTW.gather(1, index_BRW), attended_BRW).squeeze(1)

    def _add_branches(self, x: Tensor, attended: Tensor) -> Tensor:
        """Attention's output, then the MLP's, onto the residual stream."""
        if not self.training or self.drop_rate == 0.0:
            x = x + attended
            return x + self.mlp(self.norm2(x))
        draw_B2 = uniform(len(x), 2, stream=self.random_stream, device=x.device)
        x = x + drop_path(attended, draw_B2[:, 0], self.drop_rate)
        return x + drop_path(self.mlp(self.norm2(x)), draw_B2[:, 1], self.drop_rate)


class Transformer(nn.ModuleList):
    """A stack of blocks, whose last one computes only the token that the tower goes on with.

    Keys and values of the last block need every token, but its queries and MLP only that one: exact, and 10/12 of a block less.

    Args:
        width: W.
        num_layers: how many blocks, at least 1.
        num_heads: heads of each.
        mlp_width: hidden width of each MLP.
        activation: "quick_gelu", "gelu" or "gelu_tanh".
        stochastic_depth: the last block's rate; it grows linearly from 0 at the first.
        norm_eps: of the layer norms.

    Raises:
        ValueError: on no layers, or a rate outside [0, 1).
    """

    def __init__(
        self,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        activation: str,
        stochastic_depth: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"a transformer needs at least 1 layer, got {num_layers}")
        rates = depth_rates(stochastic_depth, num_layers)
        super().__init__([Block(width, num_heads, mlp_width, activation, rate, norm_eps) for rate in rates])
        self.activation_checkpointing = False

    def forward(self, x_BTW: Tensor, row_B: Tensor, *, is_causal: bool = False) -> Tensor:
        """The stack's output at one token of each sample.

        Args:
            x_BTW: [B, T, W].
            row_B: int64 [B], which token.
            is_causal: whether token t sees only tokens 0..t.

        Returns:
            [B, W].
        """
        *blocks, last = self
        for block in blocks:
            x_BTW = self._run(block, x_BTW, is_causal)
        assert isinstance(last, Block)
        return self._run(last.forward_row, x_BTW, row_B, is_causal)

    def forward_tokens(self, x_BTW: Tensor, *, is_causal: bool = False) -> Tensor:
        """The stack's output at every token: [B, T, W] -> [B, T, W]."""
        for block in self:
            x_BTW = self._run(block, x_BTW, is_causal)
        return x_BTW

    def _run(self, function: Callable[..., Tensor], *args: Tensor | bool) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True)
        return function(*args)


def depth_rates(rate: float, num_layers: int) -> list[float]:
    """Stochastic-depth rates that grow linearly from 0 at the first layer to `rate` at the last (arXiv 1603.09382, section 3)."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"stochastic_depth must lie in [0, 1), got {rate}")
    return [rate * i / max(num_layers - 1, 1) for i in range(num_layers)]


@torch.no_grad()
def init_glorot(module: nn.Module) -> None:
    """Draw the attentions and MLPs in a module anew as big_vision does: each matrix alone by Glorot's rule, MLP biases near 0."""
    for part in module.modules():
        if isinstance(part, Attention):
            for weight in (*part.qkv.weight.chunk(3), part.proj.weight):
                nn.init.xavier_uniform_(weight)
        elif isinstance(part, MLP):
            for linear in (part.fc1, part.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)


def init_lecun(layer: nn.Conv2d | nn.Linear) -> None:
    """Flax's default for a layer: a normal cut off at two standard deviations, of variance 1 / fan-in in all, and no bias."""
    fan_in = layer.weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # what the cut leaves of it
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
