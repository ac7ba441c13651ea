"""BERT: a bidirectional text transformer whose blocks end in their norms (arXiv 1810.04805), and the poolings of its descendants.

Shape legend: N texts, L context length, T tokens that are computed, W width, F features after the pool, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wordsight.nn.attention import Attention
from wordsight.nn.dropout import Dropout
from wordsight.nn.transformer import MLP, make_activation

POOLS = ("cls", "mean", "pooler")


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """A BERT's architecture.

    Attributes:
        vocab_size: tokens.
        context_length: L, the longest input.
        width: W.
        num_layers: blocks.
        num_heads: heads; BERT has one per 64 of width.
        mlp_ratio: hidden width of the MLP over W.
        activation: of the MLPs.
        num_types: rows of the segment embedding; a text is segment 0.
        pad_id: what fills a row behind its text, where no token looks, nor the pool.
        norm_eps: of the layer norms.
        pool: "cls": the first token's output (ALIGN); "mean": the mean over the tokens before the padding (sentence embeddings);
            "pooler": the first token's output through a linear layer and tanh (BERT's own).
        project: whether a linear layer with bias takes the pooled features to the embedding; without it they are the embedding.
        dropout: rate of dropout on the embedded tokens and on what each branch adds, in training; BERT has .1. Attention weights
            are not dropped.
    """

    vocab_size: int = 30522
    context_length: int = 512
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    num_types: int = 2
    pad_id: int = 0
    norm_eps: float = 1e-12
    pool: Literal["cls", "mean", "pooler"] = "cls"
    project: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        if self.num_layers < 1:
            raise ValueError(f"a BERT needs at least 1 layer, got {self.num_layers}")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id must be in [0, {self.vocab_size}), got {self.pad_id}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        make_activation(self.activation)

    @property
    def num_features(self) -> int:
        """F, the pooled features."""
        return self.width


class BertBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.num_heads)
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, round(config.width * config.mlp_ratio), config.activation)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.drop1, self.drop2 = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x_NTW: Tensor, visible_NT: Tensor) -> Tensor:
        """[N, T, W], bool [N, T] -> [N, T, W]."""
        x_NTW = self.norm1(x_NTW + self.drop1(self.attn(x_NTW, visible_BT=visible_NT)))
        return self.norm2(x_NTW + self.drop2(self.mlp(x_NTW)))


class Bert(nn.Module):
    """Tokens, places and segment added up and normed, blocks, a pool, a projection where there is one.

    Padding is seen by nobody, so what stands behind a batch's longest text is not computed: exact, whatever the padding.

    Args:
        config: the architecture.
        embed_dim: E.

    Raises:
        ValueError: there is no projection, and E is not the width.
    """

    def __init__(self, config: BertConfig, embed_dim: int) -> None:
        super().__init__()
        if not config.project and embed_dim != config.num_features:
            raise ValueError(
                f"a BERT of width {config.width} without a projection can't give {embed_dim}: set embed_dim={config.width}, or "
                "project=true"
            )
        self.config = config
        self.activation_checkpointing = False
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.type_embedding = nn.Parameter(torch.empty(config.num_types, width))
        self.norm_embed = nn.LayerNorm(width, eps=config.norm_eps)
        self.drop_embed = Dropout(config.dropout)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.num_layers))
        self.pooler = nn.Linear(width, width) if config.pool == "pooler" else None
        self.projection = nn.Linear(width, embed_dim) if config.project else None
        self._init_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed texts.

        Args:
            tokens: int64 [N, <= L], padded with `pad_id`.

        Returns:
            [N, E], not normalised.
        """
        return self._embedding(*self.forward_tokens(tokens))

    def forward_embedded(self, x_NTW: Tensor, tokens: Tensor) -> Tensor:
        """The same with token embeddings given instead of looked up, as prompt learning needs it.

        Args:
            x_NTW: [N, <= L, W], a vector in place of each token; segment and positions are added here.
            tokens: int64 [N, <= L]; only where `pad_id` follows behind the text counts.

        Returns:
            [N, E], not normalised.
        """
        visible_NT = self._visible(tokens)
        return self._embedding(self._run_blocks(x_NTW[:, : visible_NT.shape[1]], visible_NT), visible_NT)

    def forward_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Every token's output, and which are no padding, as far as the longest text: [N, <= L] -> [N, T, W], bool [N, T]."""
        visible_NT = self._visible(tokens)
        return self._run_blocks(self.token_embedding(tokens[:, : visible_NT.shape[1]]), visible_NT), visible_NT

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.activation_checkpointing = enabled

    def _visible(self, tokens: Tensor) -> Tensor:
        """Which tokens are no padding, as far as the longest text: [N, <= L] -> bool [N, T]."""
        place_L = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        # a row of nothing but padding (a process without samples sends one) must not divide nothing by nothing
        length_N = ((tokens != self.config.pad_id) * place_L).amax(1).clamp_min(1)
        # the only wait for the device; a compiled tower, whose shapes are fixed when it is traced, computes them all
        num_tokens = tokens.shape[1] if torch.compiler.is_compiling() else int(length_N.max())
        return place_L[:num_tokens] <= length_N[:, None]

    def _run_blocks(self, x_NTW: Tensor, visible_NT: Tensor) -> Tensor:
        """Token embeddings [N, T, W] -> every token's output [N, T, W]."""
        x_NTW = x_NTW + self.type_embedding[0] + self.position_embedding[: x_NTW.shape[1]]
        x_NTW = self.drop_embed(self.norm_embed(x_NTW))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_NTW = checkpoint(block, x_NTW, visible_NT, use_reentrant=False, preserve_rng_state=True)
            else:
                x_NTW = block(x_NTW, visible_NT)
        return x_NTW

    def _embedding(self, x_NTW: Tensor, visible_NT: Tensor) -> Tensor:
        features_NF = self._pool(x_NTW, visible_NT)
        return features_NF if self.projection is None else self.projection(features_NF)

    def _pool(self, x_NTW: Tensor, visible_NT: Tensor) -> Tensor:
        if self.config.pool == "mean":
            weights_NT1 = visible_NT.to(x_NTW.dtype)[:, :, None]
            return (x_NTW * weights_NT1).sum(1) / weights_NT1.sum(1)
        first_NW = x_NTW[:, 0]
        return first_NW if self.pooler is None else self.pooler(first_NW).tanh()

    def _init_weights(self) -> None:
        """All weights normal with a deviation of .02 (arXiv 1810.04805), the projection as Glorot's."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.projection is not None:
            nn.init.xavier_uniform_(self.projection.weight)
