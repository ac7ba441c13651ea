"""AdaptFormer: a bottleneck beside the MLP of every block (arXiv 2205.13535), as LIFT has it (arXiv 2309.10019).

LIFT's bottleneck reads the residual stream through a norm of its own, and its scale learns from 1 on.

Shape legend: B batch, T tokens, W width, H hidden width, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wordsight.nn.tuning import transformer_blocks


class AdaptFormer(nn.Module):
    """scale (relu(norm(x) down' + b) up' + b'); 0 at first.

    Attributes:
        norm: layer norm.
        down: W -> H.
        up: H -> W, 0 at first.
        scale: [1].
    """

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, hidden_width)
        self.up = nn.Linear(hidden_width, width)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """[.., W] -> [.., W]."""
        return self.scale * self.up(F.relu(self.down(self.norm(x))))


class AdaptedMLP(nn.Module):
    """In place of a block's MLP, and of the norm before it: mlp(norm(x)) + adapter(x)."""

    def __init__(self, norm: nn.Module, mlp: nn.Module, adapter: AdaptFormer) -> None:
        super().__init__()
        self.norm, self.mlp, self.adapter = norm, mlp, adapter

    def forward(self, x: Tensor) -> Tensor:
        """[.., W] -> [.., W]."""
        return self.mlp(self.norm(x)) + self.adapter(x)


def adapter_width(num_classes: int, num_layers: int) -> int:
    """LIFT's rule: 2^floor(log2(C / 2 L)), at least 1; so adapters have about as many weights as the head."""
    return 1 << max(0, math.floor(math.log2(num_classes / (2 * num_layers))))


def add_adaptformer(tower: nn.Module, num_classes: int, hidden_width: int | None = None) -> None:
    """Put an AdaptFormer beside the MLP of every block of a vision transformer, in place.

    Args:
        tower: a vision transformer.
        num_classes: C, for LIFT's rule.
        hidden_width: H; None: by LIFT's rule.

    Raises:
        ValueError: another tower, or a hidden width that is no whole number of at least 1.
    """
    blocks = transformer_blocks(tower, "AdaptFormer")
    hidden_width = adapter_width(num_classes, len(blocks)) if hidden_width is None else hidden_width
    if not isinstance(hidden_width, int) or hidden_width < 1:
        raise ValueError(f"adapter_dim must be a whole number of at least 1, or None for LIFT's rule, got {hidden_width!r}")
    for block in blocks:
        adapter = AdaptFormer(block.attn.width, hidden_width).to(block.norm2.weight)
        block.mlp = AdaptedMLP(block.norm2, block.mlp, adapter)  # type: ignore[assignment]
        block.norm2 = nn.Identity()  # type: ignore[assignment]
