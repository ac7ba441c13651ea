"""CLIP's causal text transformer (arXiv 2103.00020, section 2.4), computed only as far as the longest caption, and SigLIP's.

SigLIP's (arXiv 2303.15343) sees all places in both directions, padding too, and is read at the last one.

Shape legend: N texts, L context length, T tokens that are computed, W width, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from wordsight.nn.transformer import Block, Transformer, init_glorot, init_lecun


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
        end_N, num_tokens = self._ends(tokens)
        return self._encode(self.token_embedding(tokens[:, :num_tokens]), end_N)

    def forward_embedded(self, x_NTW: Tensor, tokens: Tensor) -> Tensor:
        """The same with token embeddings given instead of looked up, as prompt learning needs it.

        Args:
            x_NTW: [N, <= L, W], a vector in place of each token; positions are added here.
            tokens: int64 [N, <= L]; only where the highest id stands counts.

        Returns:
            [N, D], not normalised.
        """
        end_N, num_tokens = self._ends(tokens)
        return self._encode(x_NTW[:, :num_tokens], end_N)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.blocks.activation_checkpointing = enabled

    @staticmethod
    def _ends(tokens: Tensor) -> tuple[Tensor, int]:
        """Where each row's end token stands, and how many tokens are computed."""
        end_N = tokens.argmax(dim=1)
        # the only wait for the device; a compiled tower, whose shapes are fixed when it is traced, computes them all
        return end_N, tokens.shape[1] if torch.compiler.is_compiling() else int(end_N.max()) + 1

    def _encode(self, x_NTW: Tensor, end_N: Tensor) -> Tensor:
        x_NTW = x_NTW + self.position_embedding[: x_NTW.shape[1]]
        return self.norm_final(self.blocks(x_NTW, end_N, is_causal=True)) @ self.projection

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


@dataclass(frozen=True, kw_only=True)
class SigLIPTextConfig:
    """The architecture of SigLIP's text transformer.

    Attributes:
        vocab_size: tokens.
        context_length: L, the length of every row.
        width: W.
        num_layers: blocks.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over W.
        stochastic_depth: the last block's rate of being skipped in training.
        pad_id: what fills a row behind its text. It is seen like any other token: with another one outputs are others.
        norm_eps: of the layer norms.
    """

    vocab_size: int = 32_000
    context_length: int = 64
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    stochastic_depth: float = 0.0
    pad_id: int = 1
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id must be in [0, {self.vocab_size}), got {self.pad_id}")


class SigLIPText(nn.Module):
    """Tokens through a transformer without a mask; the last place's output, normalised, through a linear layer is the embedding.

    Padding is a part of the text here, as in training: a row is filled up to the context length, however long it comes, so that
    how far a batch is padded changes nothing. (transformers and open_clip read a shorter row at its own last place, where these
    models were never trained.) Weights start as in big_vision's code.

    Args:
        config: the architecture.
        embed_dim: D.
        activation: of the MLPs.
    """

    def __init__(self, config: SigLIPTextConfig, embed_dim: int, activation: str) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = Transformer(
            width=width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            mlp_width=round(width * config.mlp_ratio),
            activation=activation,
            stochastic_depth=config.stochastic_depth,
            norm_eps=config.norm_eps,
        )
        self.norm_final = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=width**-0.5)
        nn.init.normal_(self.position_embedding, std=width**-0.5)
        init_glorot(self.blocks)
        init_lecun(self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed texts.

        Args:
            tokens: int64 [N, <= L], padded with `pad_id` behind each row's end token.

        Returns:
            [N, D], not normalised.
        """
        missing = self.config.context_length - tokens.shape[1]
        return self._encode(self.token_embedding(functional.pad(tokens, (0, missing), value=self.config.pad_id)))

    def forward_embedded(self, x_NTW: Tensor, tokens: Tensor) -> Tensor:
        """The same with token embeddings given instead of looked up, as prompt learning needs it.

        Args:
            x_NTW: [N, <= L, W], a vector in place of each token, padding too; positions are added here.
            tokens: int64 [N, <= L], as other towers want them; nothing is read from them here.

        Returns:
            [N, D], not normalised.
        """
        padding_W = self.token_embedding.weight[self.config.pad_id]
        missing = self.config.context_length - x_NTW.shape[1]
        return self._encode(torch.cat([x_NTW, padding_W.expand(len(x_NTW), missing, -1)], dim=1))

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.blocks.activation_checkpointing = enabled

    def _encode(self, x_NLW: Tensor) -> Tensor:
        last_N = torch.full((len(x_NLW),), x_NLW.shape[1] - 1, dtype=torch.int64, device=x_NLW.device)
        return self.head(self.norm_final(self.blocks(x_NLW + self.position_embedding, last_N)))
