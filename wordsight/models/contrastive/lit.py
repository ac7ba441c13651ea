"""LiT: locked-image tuning - published towers that stand still, and what learns to read them (arXiv 2111.07991).

Either tower may be locked, or both: then only the heads on top of them learn.

Shape legend: B batch, N texts, L context length, S image side in pixels, F a trunk's features, D embedding width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from wordsight.embed import DualEncoderMixin
from wordsight.losses.contrastive import info_nce, pair_arguments
from wordsight.nn.dropout import Dropout
from wordsight.nn.random import number_streams
from wordsight.nn.towers import ImageConfig, TextTowerConfig, build_image_tower, build_text_tower
from wordsight.nn.transformer import Activation, make_activation
from wordsight.types import Term

if TYPE_CHECKING:
    from wordsight.losses.ring import Ring

Head = Literal["none", "linear", "normed", "mlp"]
HEADS = ("none", "linear", "normed", "mlp")


@dataclass(frozen=True, kw_only=True)
class LiTConfig:
    """Two trunks, which of them are locked, and the heads on top.

    Attributes:
        embed_dim: D; a trunk without a head must have as many features.
        image: the image trunk's architecture, which ends in its features (`project=False`).
        text: the text trunk's architecture, likewise.
        activation: of trunks that do not say their own.
        lock_image: whether the image trunk stands still: no gradients, evaluation mode for ever (batch norm, dropout).
        lock_text: likewise for the text trunk.
        image_head: what stands on the image trunk: nothing ("none"); a linear layer ("linear"); layer norm, dropout, linear
            ("normed"); layer norm, linear, GELU, dropout, linear ("mlp").
        text_head: likewise on the text trunk.
        head_width: hidden width of an "mlp" head.
        head_dropout: rate of dropout on what enters the last layer of a "normed" or "mlp" head.
        cache_rows: how many features of each locked trunk are kept in training, so that a picture or text that comes again with
            the same pixels or tokens is not computed again; 0: none.
        init_log_scale: where log_scale starts, log of the inverse temperature.
        max_log_scale: log_scale is clamped here.
        duplicates: as in `CLIPConfig`.
    """

    embed_dim: int
    image: ImageConfig
    text: TextTowerConfig
    activation: Activation = "gelu"
    lock_image: bool = True
    lock_text: bool = False
    image_head: Head = "none"
    text_head: Head = "linear"
    head_width: int = 512
    head_dropout: float = 0.0
    cache_rows: int = 0
    init_log_scale: float = math.log(10)
    max_log_scale: float = math.log(100)
    duplicates: Literal["plain", "multi_positive"] = "plain"

    def __post_init__(self) -> None:
        for side in ("image", "text"):
            head, trunk = getattr(self, f"{side}_head"), getattr(self, side)
            if head not in HEADS:
                raise ValueError(f"{side}_head must be one of {', '.join(HEADS)}, got {head!r}")
            if getattr(trunk, "project", True):
                raise ValueError(
                    f"LiT's trunks end in their features, and this {type(trunk).__name__} projects them: set {side}.project=false"
                )
            if head == "none" and trunk.num_features != self.embed_dim:
                raise ValueError(
                    f"the {side} trunk has {trunk.num_features} features and no head to make them {self.embed_dim}: set "
                    f"embed_dim={trunk.num_features}, or {side}_head=linear"
                )
        if self.lock_image and self.lock_text and self.image_head == self.text_head == "none":
            raise ValueError("both towers are locked and neither has a head: nothing could learn")
        if self.cache_rows < 0:
            raise ValueError(f"cache_rows must be at least 0, got {self.cache_rows}")
        if not 0.0 <= self.head_dropout < 1.0:
            raise ValueError(f"head_dropout must lie in [0, 1), got {self.head_dropout}")
        if self.duplicates not in ("plain", "multi_positive"):
            raise ValueError(f"duplicates must be 'plain' or 'multi_positive', got {self.duplicates!r}")
        make_activation(self.activation)


class HeadedTower(nn.Module):
    """A trunk, which may be locked, and a head.

    A locked trunk's parameters have requires_grad False, it stays in evaluation mode whatever `train()` says, and nothing of it
    is kept for a backward pass. Training neither moves its batch norms' statistics nor takes them anew.

    Attributes:
        trunk: pixels or tokens -> [.., F].
        head: [.., F] -> [.., D].
        locked: whether the trunk stands still.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, *, locked: bool, cache_rows: int = 0) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self.locked, self.cache_rows = locked, cache_rows
        self._cache: dict[bytes, Tensor] = {}
        if locked:
            trunk.requires_grad_(False)
            for module in trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    # who looks for statistics to update leaves these out; they go on being used
                    module.track_running_stats = False
            trunk.eval()

    def train(self, mode: bool = True) -> HeadedTower:
        """Training or evaluation mode of what is not locked."""
        super().train(mode)
        if self.locked:
            self.trunk.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] or tokens [N, L] -> [.., D], not normalised."""
        return self.head(self.features(x))

    def forward_embedded(self, x_NTW: Tensor, tokens: Tensor) -> Tensor:
        """A text tower with token embeddings [N, <= L, W] given instead of looked up -> [N, D], not normalised.

        Gradients reach the embeddings through a locked trunk too; nothing is taken from the cache.
        """
        return self.head(self.trunk.forward_embedded(x_NTW, tokens))  # type: ignore[operator]

    def features(self, x: Tensor) -> Tensor:
        """What the trunk makes of pixels or tokens: [.., F]."""
        if not self.locked:
            return self.trunk(x)
        with torch.no_grad():
            keeping = self.training and self.cache_rows > 0 and not torch.compiler.is_compiling()
            return self._cached(x) if keeping else self.trunk(x)

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        """Every token's output, or the places of the last map, of an image trunk: [B, 3, S, S] -> [B, T, W]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.locked):
            return self.trunk.forward_tokens(pixels)  # type: ignore[operator]

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the trunk's blocks in the backward pass, where it has one."""
        self.trunk.set_activation_checkpointing(enabled)  # type: ignore[operator]

    def _cached(self, x: Tensor) -> Tensor:
        """The features row by row from the cache, which is filled one row at a time.

        A row's numbers then do not depend on those that it came with, and a run goes on bit by bit though its cache is empty.
        """
        keys = [hashlib.blake2b(row.contiguous().view(torch.uint8).numpy(), digest_size=16).digest() for row in x.cpu()]
        found: dict[bytes, Tensor] = {}
        for i, key in enumerate(keys):
            if key not in found:
                found[key] = self._cache[key] if key in self._cache else self.trunk(x[i : i + 1])[0]
        self._cache |= found
        while len(self._cache) > self.cache_rows:
            del self._cache[next(iter(self._cache))]  # the oldest
        return torch.stack([found[key] for key in keys])


def make_head(kind: Head, num_features: int, embed_dim: int, hidden_width: int, dropout: float) -> nn.Module:
    """The head of that kind: [.., F] -> [.., D]."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(num_features, embed_dim)
    if kind == "normed":
        return nn.Sequential(nn.LayerNorm(num_features), Dropout(dropout), nn.Linear(num_features, embed_dim))
    return nn.Sequential(
        nn.LayerNorm(num_features),
        nn.Linear(num_features, hidden_width),
        nn.GELU(),
        Dropout(dropout),
        nn.Linear(hidden_width, embed_dim),
    )


def _num_features(trunk: Any) -> int:
    """F of a trunk's config, which `LiTConfig` has made sure that it says."""
    features: int = trunk.num_features
    return features


class LiT(DualEncoderMixin, nn.Module):
    """Two towers of trunk and head, a learnable temperature, symmetric InfoNCE.

    Attributes:
        config: the architecture.
        image_tower: float pixels [B, 3, S, S] -> [B, D].
        text_tower: tokens [N, L] -> [N, D].
        log_scale: scalar parameter; its exponential multiplies cosine similarities.
        logit_bias: None.
    """

    def __init__(self, config: LiTConfig) -> None:
        super().__init__()
        self.config = config
        image_features, text_features = _num_features(config.image), _num_features(config.text)
        image_trunk = build_image_tower(config.image, image_features, config.activation)
        text_trunk = build_text_tower(config.text, text_features, config.activation)
        options: dict[str, Any] = {"cache_rows": config.cache_rows}
        sizes = (config.embed_dim, config.head_width, config.head_dropout)
        image_head = make_head(config.image_head, image_features, *sizes)
        text_head = make_head(config.text_head, text_features, *sizes)
        self.image_tower = HeadedTower(image_trunk, image_head, locked=config.lock_image, **options)
        self.text_tower = HeadedTower(text_trunk, text_head, locked=config.lock_text, **options)
        self.log_scale = nn.Parameter(torch.tensor(config.init_log_scale))
        self.logit_bias = None
        number_streams(self)

    def loss_from_embeddings(self, embeddings: Mapping[str, Tensor], ring: Ring | None = None) -> dict[str, Term]:
        """The loss of the whole (global) batch from its embeddings: one term, "contrastive", whose count is the pairs."""
        image_BD = embeddings["image"]
        log_scale = self.log_scale.clamp(max=self.config.max_log_scale)
        arguments = pair_arguments(embeddings, self.config.duplicates)
        loss = info_nce(image_BD, embeddings["text"], log_scale, ring=ring, **arguments)
        return self.contrastive_term(loss, image_BD)

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that the loss itself uses: the scale."""
        return [self.log_scale]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring log_scale back under its bound; call after each update, so that its gradient never dies above it."""
        self.log_scale.clamp_(max=self.config.max_log_scale)
