"""Llip: a picture has several vectors, and every text mixes its own view of it from them (arXiv 2405.00740).

An image tower gives K tokens, each with a key and a value. A text has a query beside its feature, and multi-head
cross-attention of the one query over the K tokens makes the vector that this text compares itself with; the loss
is SigLIP's, in `losses/llip.py`.

Shape legend: B batch, N texts, C classes, L context length, S image side in pixels, P places of a map or patches, K tokens of a
picture, W their width, D embedding width, E = 2 D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit_rows

from wordsight.embed import DualEncoderMixin
from wordsight.losses.contrastive import pair_arguments
from wordsight.losses.llip import gram_pays, mixture_scores, mixture_sigmoid
from wordsight.losses.ring import Ring
from wordsight.nn.convnet import ConvNet, ConvNetConfig
from wordsight.nn.random import number_streams, uniform
from wordsight.nn.resnet import ModifiedResNet, ResNetConfig
from wordsight.nn.towers import ImageConfig, TextTowerConfig, build_text_tower
from wordsight.nn.transformer import Activation, Transformer, make_activation
from wordsight.nn.vit import ViTConfig, drop_patches
from wordsight.types import Term

TILE_TEXTS = 64  # texts that a tile of an evaluation has at least, for the choice of how it is computed


@dataclass(frozen=True, kw_only=True)
class LlipConfig:
    """A Llip's architecture and loss.

    Attributes:
        embed_dim: D.
        image: the image tower's architecture: a vision transformer, which gets K tokens in place of its class token, or a ResNet
            or ConvNet, whose last map K learned weightings of its places pool. How the tower itself would pool is not used.
        text: the text tower's architecture.
        num_tokens: K.
        num_heads: of the cross-attention; divides D.
        temperature: what the cross-attention's logits are divided by (the paper's tau).
        mixture_norm: layer norms of keys, values and queries, as the largest of the published models have.
        activation: "quick_gelu" (the published weights) or "gelu", in both towers.
        init_log_scale: where log_scale starts.
        init_bias: where the bias of all logits starts.
        max_log_scale: log_scale is clamped here.
        duplicates: "plain": only row i's own text is right for image i; "multi_positive": every text is that equals it or that
            belongs to the same picture.
    """

    embed_dim: int
    image: ImageConfig
    text: TextTowerConfig
    num_tokens: int = 32
    num_heads: int = 8
    temperature: float = 5.0
    mixture_norm: bool = False
    activation: Activation = "quick_gelu"
    init_log_scale: float = math.log(1 / 0.07)
    init_bias: float = -10.0
    max_log_scale: float = math.log(100)
    duplicates: Literal["plain", "multi_positive"] = "plain"

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}")
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide embed_dim {self.embed_dim}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.duplicates not in ("plain", "multi_positive"):
            raise ValueError(f"duplicates must be 'plain' or 'multi_positive', got {self.duplicates!r}")
        make_activation(self.activation)


class MixtureViT(nn.Module):
    """A vision transformer with K learned tokens in place of its class token; their outputs, normed.

    Args:
        config: the architecture; its pool and projection are not used.
        num_tokens: K.
        activation: of the MLPs.

    Attributes:
        width: W.
    """

    def __init__(self, config: ViTConfig, num_tokens: int, activation: str) -> None:
        super().__init__()
        self.config = config
        self.random_stream = 0
        self.width = width = config.width
        num_patches = config.grid[0] * config.grid[1]
        self.patch_embed = nn.Conv2d(3, width, config.patch_size_px, config.patch_size_px, bias=config.patch_bias)
        self.tokens = nn.Parameter(width**-0.5 * torch.randn(num_tokens, width))
        self.position_embedding = nn.Parameter(width**-0.5 * torch.randn(num_tokens + num_patches, width))
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

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, K, W]."""
        num_tokens = len(self.tokens)
        patches_BPW = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.position_embedding[num_tokens:]
        if self.training and self.config.patch_dropout > 0.0:
            draw_BP = uniform(*patches_BPW.shape[:2], stream=self.random_stream, device=patches_BPW.device)
            patches_BPW = drop_patches(patches_BPW, draw_BP, self.config.patch_dropout)
        tokens_KW = (self.tokens + self.position_embedding[:num_tokens]).to(patches_BPW.dtype)
        x_BTW = self.norm_pre(torch.cat([tokens_KW.expand(len(patches_BPW), -1, -1), patches_BPW], dim=1))
        return self.norm_post(self.blocks.forward_tokens(x_BTW)[:, :num_tokens])

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.blocks.activation_checkpointing = enabled


class MapTokens(nn.Module):
    """K tokens of a convolutional tower's last map: batch norm of every channel at every place, then K weightings of the places.

    The weightings start as an even share each of the places in order (with K = P one place each, with K < P their mean over P / K
    or so). With one place a token, equal weights of all tokens and the values' projections side by side this is just the
    ConvNet's own flat pool and projection.

    Args:
        config: the tower's architecture.
        num_tokens: K, at most P.

    Attributes:
        width: W, the map's channels.

    Raises:
        ValueError: more tokens than places.
    """

    def __init__(self, config: ConvNetConfig | ResNetConfig, num_tokens: int) -> None:
        super().__init__()
        num_places = config.grid[0] * config.grid[1]
        if num_tokens > num_places:
            raise ValueError(f"num_tokens is {num_tokens}, and the tower's last map has only {num_places} places")
        self.trunk: ConvNet | ModifiedResNet
        if isinstance(config, ConvNetConfig):
            self.trunk, self.width = ConvNet(config, 1), config.widths[-1]
            self.trunk.norm, self.trunk.projection = None, None  # type: ignore[assignment]  # its pool, not used
        else:
            self.trunk, self.width = ModifiedResNet(config, 1), 32 * config.width
            self.trunk.attnpool = None  # type: ignore[assignment]  # its pool, not used
        self.norm = nn.BatchNorm1d(self.width * num_places)
        owner_P = torch.arange(num_places) * num_tokens // num_places
        share_KP = nn.functional.one_hot(owner_P, num_tokens).T.float()
        self.pool = nn.Parameter(share_KP / share_KP.sum(1, keepdim=True))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, K, W]."""
        map_BWP = self.trunk.forward_map(pixels).flatten(2)
        normed_BWP = self.norm(map_BWP.flatten(1)).view(map_BWP.shape)
        return self.pool.to(normed_BWP.dtype) @ normed_BWP.transpose(1, 2)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the stages in the backward pass, not keeping their activations."""
        self.trunk.set_activation_checkpointing(enabled)


class MixtureTower(nn.Module):
    """A tower's K tokens, each projected by a matrix of its own to a key and a value.

    Args:
        tokens: float pixels [B, 3, S, S] -> [B, K, W].
        width: W.
        num_tokens: K.
        embed_dim: D.
        norm: whether keys and values are normed.
    """

    def __init__(self, tokens: MixtureViT | MapTokens, num_tokens: int, embed_dim: int, norm: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.projection = nn.Parameter(tokens.width**-0.5 * torch.randn(num_tokens, tokens.width, 2 * embed_dim))
        self.key_norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()
        self.value_norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> keys and values, [B, K, 2 D]."""
        both_BKE = (self.tokens(pixels).transpose(0, 1) @ self.projection).transpose(0, 1)
        keys_BKD, values_BKD = both_BKE.chunk(2, dim=-1)
        return torch.cat([self.key_norm(keys_BKD), self.value_norm(values_BKD)], dim=-1)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Trade compute for memory in what makes the tokens."""
        self.tokens.set_activation_checkpointing(enabled)


class Llip(DualEncoderMixin, nn.Module):
    """Two towers, cross-attention between their outputs, a learnable scale and bias, the sigmoid loss.

    Its score of a pair is no inner product: `similarities` computes it (`wordsight.system.PairScorer`).

    Attributes:
        config: the architecture.
        image_tower: float pixels [B, 3, S, S] -> keys and values [B, K, 2 D].
        text_tower: tokens [N, L] -> query and feature [N, 2 D].
        query_norm: of the queries; nothing without `mixture_norm`.
        output: [D, D], what mixed values are multiplied by.
        log_scale: scalar parameter; its exponential multiplies similarities.
        logit_bias: scalar parameter, added to each logit.
    """

    logit_bias: nn.Parameter

    def __init__(self, config: LlipConfig) -> None:
        super().__init__()
        self.config = config
        tokens = _build_tokens(config)
        self.image_tower = MixtureTower(tokens, config.num_tokens, config.embed_dim, config.mixture_norm)
        self.text_tower = build_text_tower(config.text, 2 * config.embed_dim, config.activation)
        self.query_norm = nn.LayerNorm(config.embed_dim) if config.mixture_norm else nn.Identity()
        self.output = nn.Parameter(config.embed_dim**-0.5 * torch.randn(config.embed_dim, config.embed_dim))
        self.log_scale = nn.Parameter(torch.tensor(config.init_log_scale))
        self.logit_bias = nn.Parameter(torch.tensor(config.init_bias))
        number_streams(self)

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        """What texts see of images.

        Args:
            pixels: float [B, 3, S, S], normalised by the model's preprocessing.
            normalize: makes no difference: a mixture has length 1, not what it is mixed from.

        Returns:
            [B, K, 2 D], a key and a value of each token.
        """
        return super().encode_image(pixels, normalize=False)

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """What texts ask images for, and what they compare the answer with.

        Args:
            tokens: int64 [N, <= L], as the model's tokenizer gives them.
            normalize: whether the features get length 1.

        Returns:
            [N, 2 D], the query (divided by the temperature) and the feature of each text.
        """
        query_ND, feature_ND = super().encode_text(tokens, normalize=False).chunk(2, dim=-1)
        query_ND = self.query_norm(query_ND) / self.config.temperature
        return torch.cat([query_ND, unit_rows(feature_ND, dim=-1) if normalize else feature_ND], dim=-1)

    def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines of each text's feature and the vector that it mixes from each image; see `PairScorer`.

        Of a class with several prompts the mean query asks, and the mean feature is compared, as in the published evaluation.

        Args:
            images: float32 [n, K, 2 D].
            texts: float32 [C, 2 D], of any length.

        Returns:
            [n, C].
        """
        width, heads = self.config.embed_dim, self.config.num_heads
        query_CD, feature_CD = texts.chunk(2, dim=-1)
        asking_CE = torch.cat([query_CD, unit_rows(feature_CD, dim=-1)], dim=-1)
        output_DD = self.output.to(images.dtype)
        # by the sizes of the model alone: the same for a tile of few texts, so that a score is the same in any tile
        by_gram = gram_pays(self.config.num_tokens * heads, width, TILE_TEXTS)
        return mixture_scores(images, asking_CE, output_DD, heads, by_gram=by_gram)

    def loss_from_embeddings(self, embeddings: Mapping[str, Tensor], ring: Ring | None = None) -> dict[str, Term]:
        """The loss of the whole (global) batch from its embeddings: one term, "contrastive", whose count is the images."""
        image_BKE = embeddings["image"]
        # at the bound itself clamp lets gradients through, and clamp_() keeps the parameter from passing it
        log_scale = self.log_scale.clamp(max=self.config.max_log_scale)
        loss = mixture_sigmoid(
            image_BKE,
            embeddings["text"],
            self.output,
            log_scale,
            self.logit_bias,
            num_heads=self.config.num_heads,
            ring=ring,
            **pair_arguments(embeddings, self.config.duplicates),
        )
        return self.contrastive_term(loss, image_BKE)

    def expected_initial_loss(self, rows: int) -> float:
        """The loss of `rows` pairs where every similarity is 0: log(1 + exp(-bias)) + (rows - 1) log(1 + exp(bias))."""
        bias = self.logit_bias.detach().double()
        return float(nn.functional.softplus(-bias) + (rows - 1) * nn.functional.softplus(bias))

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that the loss itself uses: the scale, the bias and the output matrix, which acts on pairs."""
        return [self.log_scale, self.logit_bias, self.output]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring log_scale back under its bound; call after each update, so that its gradient never dies above it."""
        self.log_scale.clamp_(max=self.config.max_log_scale)


def _build_tokens(config: LlipConfig) -> MixtureViT | MapTokens:
    """What gives a picture's tokens."""
    match config.image:
        case ViTConfig():
            return MixtureViT(config.image, config.num_tokens, config.activation)
        case ConvNetConfig() | ResNetConfig():
            return MapTokens(config.image, config.num_tokens)
    raise ValueError(f"Llip takes its tokens from a vision transformer, a ConvNet or a ResNet, not {type(config.image).__name__}")
