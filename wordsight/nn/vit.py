"""The vision transformer of CLIP (arXiv 2103.00020, section 2.4; ViT, arXiv 2010.11929), with FLIP's patch dropout (2212.00794).

Pooled by a probe instead of a class token it is SigLIP's (arXiv 2303.15343; arXiv 2106.04560, section 3.2).

Shape legend: B batch, S image side in pixels, N patches, K patches kept, T tokens (N, and 1 with a class token), W width, D
embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wordsight.nn.pool import MAPPool
from wordsight.nn.random import uniform
from wordsight.nn.transformer import Transformer, init_glorot, init_lecun

POOLS = ("class", "map")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer's architecture.

    Attributes:
        image_size_px: side of the square input.
        patch_size_px: side of a patch; divides the image's side, the rest is cut off.
        width: W.
        num_layers: blocks.
        num_heads: heads; CLIP has one per 64 of width.
        mlp_ratio: hidden width of the MLP over W.
        patch_dropout: share of patches that a training step leaves out (FLIP: .5 to .75).
        stochastic_depth: the last block's rate of being skipped in training.
        patch_bias: whether patches are embedded with a bias (not in CLIP, but in classifiers such as ViT's own).
        norm_pre: whether tokens are normed before the first block (in CLIP, not in ViT's own).
        norm_eps: of the layer norms.
        pool: "class": a class token goes through the blocks with the patches, and its output is taken; "map": a learned probe
            asks all patches behind the last block (SigLIP).
        project: whether a matrix takes the pooled output to the embedding; without it they are the same.
    """

    image_size_px: int = 224
    patch_size_px: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    patch_dropout: float = 0.0
    stochastic_depth: float = 0.0
    patch_bias: bool = False
    norm_pre: bool = True
    norm_eps: float = 1e-5
    pool: Literal["class", "map"] = "class"
    project: bool = True

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        if not 0 < self.patch_size_px <= self.image_size_px:
            raise ValueError(f"patch_size_px {self.patch_size_px} does not fit in image_size_px {self.image_size_px}")
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"patch_dropout must lie in [0, 1), got {self.patch_dropout}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return (self.image_size_px // self.patch_size_px,) * 2

    @property
    def num_features(self) -> int:
        """What comes out of the last block: W."""
        return self.width


class VisionTransformer(nn.Module):
    """Patches through a transformer; a class token's output, or a probe's answer, projected, is the embedding.

    A class token's output is normed behind the last block; for a probe all tokens are, and then asked. Weights start as in CLIP's
    code with a class token, and as in big_vision's with a probe.

    Args:
        config: the architecture.
        embed_dim: D.
        activation: of the MLPs.

    Raises:
        ValueError: there is no projection, and D is not the width.
    """

    def __init__(self, config: ViTConfig, embed_dim: int, activation: str) -> None:
        super().__init__()
        if not config.project and embed_dim != config.width:
            raise ValueError(
                f"a vision transformer of width {config.width} without a projection can't give {embed_dim}: set embed_dim="
                f"{config.width}, or project=true"
            )
        self.config = config
        self.random_stream = 0
        width, (grid_h, grid_w) = config.width, config.grid
        scale = width**-0.5
        self.patch_embed = nn.Conv2d(3, width, config.patch_size_px, config.patch_size_px, bias=config.patch_bias)
        has_class = config.pool == "class"
        self.class_token = nn.Parameter(scale * torch.randn(width)) if has_class else None
        self.position_embedding = nn.Parameter(scale * torch.randn(has_class + grid_h * grid_w, width))
        self.norm_pre = nn.LayerNorm(width, eps=config.norm_eps) if config.norm_pre else nn.Identity()
        self.blocks = Transformer(
            width=width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            mlp_width=round(width * config.mlp_ratio),
            activation=activation,
            stochastic_depth=config.stochastic_depth,
            norm_eps=config.norm_eps,
        )
        self.norm_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.projection = nn.Parameter(scale * torch.randn(width, embed_dim)) if config.project else None
        if has_class:
            self.pool = None
        else:
            mlp_width = round(width * config.mlp_ratio)
            self.pool = MAPPool(width, config.num_heads, mlp_width, activation, config.norm_eps)
            init_glorot(self)
            init_lecun(self.patch_embed)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: float [B, 3, S, S], normalised.

        Returns:
            [B, D], not normalised.
        """
        features_BW = self.features(pixels)
        return features_BW if self.projection is None else features_BW @ self.projection

    def features(self, pixels: Tensor) -> Tensor:
        """What the projection reads, as the paper's linear probes do: [B, 3, S, S] -> [B, W]."""
        x_BTW = self._embed(pixels)
        if self.pool is None:
            class_row_B = torch.zeros(x_BTW.shape[0], dtype=torch.int64, device=x_BTW.device)
            return self.norm_post(self.blocks(x_BTW, class_row_B))
        return self.pool(self.norm_post(self.blocks.forward_tokens(x_BTW)))

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        """Every token's output, before norm and projection: [B, 3, S, S] -> [B, T, W], a class token first."""
        return self.blocks.forward_tokens(self._embed(pixels))

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.blocks.activation_checkpointing = enabled

    def _embed(self, pixels: Tensor) -> Tensor:
        class_places = 0 if self.class_token is None else 1
        patches_BNW = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.position_embedding[class_places:]
        if self.training and self.config.patch_dropout > 0.0:
            draw_BN = uniform(*patches_BNW.shape[:2], stream=self.random_stream, device=patches_BNW.device)
            patches_BNW = drop_patches(patches_BNW, draw_BN, self.config.patch_dropout)
        if self.class_token is None:
            return self.norm_pre(patches_BNW)
        class_B1W = (self.class_token + self.position_embedding[0]).to(patches_BNW.dtype).expand(patches_BNW.shape[0], 1, -1)
        return self.norm_pre(torch.cat([class_B1W, patches_BNW], dim=1))


def drop_patches(patches_BNW: Tensor, draw_BN: Tensor, rate: float) -> Tensor:
    """Keep each sample's K = max(1, floor(N (1 - rate))) patches of lowest draw: [B, N, W], [B, N] -> [B, K, W] (FLIP)."""
    num_patches, width = patches_BNW.shape[1:]
    num_kept = max(1, int(num_patches * (1.0 - rate)))
    kept_BK = draw_BN.argsort(dim=1)[:, :num_kept]
    return patches_BNW.gather(1, kept_BK[:, :, None].expand(-1, -1, width))
