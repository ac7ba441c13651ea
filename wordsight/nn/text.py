"""CLIP's causal text transformer (arXiv 2103.00020, section 2.4), computed only as far as the batch's longest caption.

Shape legend: N texts, L context length, T tokens that are computed, W width, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wordsight.nn.transformer import Block, Transformer


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text transformer's architecture.

    Attributes:
        vocab_size: tokens; the highest id is the end-of-text token.
        context_length: L, the longest input.
        width: W.
        num_layers: blocks.
        num_heads: heads; CLIP has one per 64 of width.
        mlp_ratio: hidden width of the MLP over W.
        stochastic_depth: the last block's rate of being skipped in training.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    stochastic_depth: float = 0.0


class TextTransformer(nn.Module):
    """Tokens through a causal transformer; the end token's output, normalised and projected, is the embedding.

    The end token is the first place of the highest id in the row, as in the published models. What stands behind it cannot reach
    it through a causal mask, so nothing behind the batch's last end token is computed: exact, whatever the padding.

    Args:
        config: the architecture.
        embed_dim: D.
        activation: of the MLPs.
    """

    def __init__(self, config: TextConfig, embed_dim: int, activation: str) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = Transformer(
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            mlp_width=round(config.width * config.mlp_ratio),
            activation=activation,
            stochastic_depth=config.stochastic_depth,
        )
        self.norm_final = nn.LayerNorm(config.width)
        self.projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self._init_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed texts.

        Args:
            tokens: int64 [N, <= L], padded in any way behind each row's end token.

        Returns:
            [N, D], not normalised.
        """
        end_N = tokens.argmax(dim=1)
        # the only wait for the device; a compiled tower, whose shapes are fixed when it is traced, computes them all
        num_tokens = tokens.shape[1] if torch.compiler.is_compiling() else int(end_N.max()) + 1
        tokens_NT = tokens[:, :num_tokens]
        x_NTW = self.token_embedding(tokens_NT) + self.position_embedding[:num_tokens]
        return self.norm_final(self.blocks(x_NTW, end_N, is_causal=True)) @ self.projection

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.blocks.activation_checkpointing = enabled

    def _init_weights(self) -> None:
        """Draw the weights as the published text towers did: residual branches scaled down by the depth (GPT-2)."""
        width = self.config.width
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        nn.init.normal_(self.projection, std=width**-0.5)
        residual_std = width**-0.5 * (2 * self.config.num_layers) ** -0.5
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=residual_std)
