"""CLIP: an image tower and a text tower trained to agree on pairs (arXiv 2103.00020).

Shape legend: B batch, N texts, L context length, S image side in pixels, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wordsight.embed import DualEncoderMixin
from wordsight.losses.contrastive import info_nce, pair_arguments
from wordsight.losses.ring import Ring
from wordsight.nn.random import number_streams
from wordsight.nn.towers import ImageConfig, TextTowerConfig, build_image_tower, build_text_tower
from wordsight.nn.transformer import Activation, make_activation
from wordsight.types import Term


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """A CLIP's architecture and loss.

    Attributes:
        embed_dim: D.
        image: the image tower's architecture; its type chooses the tower.
        text: the text tower's architecture.
        activation: "quick_gelu" (the published weights) or "gelu", in both towers.
        init_log_scale: where log_scale starts, log of the inverse temperature.
        max_log_scale: log_scale is clamped here.
        duplicates: "plain": only row i's own text is right for image i; "multi_positive": every text is that equals it or that
            belongs to the same picture, with the target spread evenly.
        label_smoothing: the share of each target that is spread over the whole batch.
    """

    embed_dim: int
    image: ImageConfig
    text: TextTowerConfig
    activation: Activation = "quick_gelu"
    init_log_scale: float = math.log(1 / 0.07)
    max_log_scale: float = math.log(100)
    duplicates: Literal["plain", "multi_positive"] = "plain"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.duplicates not in ("plain", "multi_positive"):
            raise ValueError(f"duplicates must be 'plain' or 'multi_positive', got {self.duplicates!r}")
        make_activation(self.activation)


class CLIP(DualEncoderMixin, nn.Module):
    """Two towers, a learnable temperature, symmetric InfoNCE.

    Attributes:
        config: the architecture.
        image_tower: float pixels [B, 3, S, S] -> [B, D].
        text_tower: tokens [N, L] -> [N, D].
        log_scale: scalar parameter; its exponential multiplies cosine similarities.
        logit_bias: None (SigLIP-like systems have one).
        tokenizer: texts -> tokens; set by whoever makes or loads the model.
        preprocessor: PIL image -> pixels; set by whoever makes or loads the model.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = build_image_tower(config.image, config.embed_dim, config.activation)
        self.text_tower = build_text_tower(config.text, config.embed_dim, config.activation)
        self.log_scale = nn.Parameter(torch.tensor(config.init_log_scale))
        self.logit_bias = None
        number_streams(self)

    def loss_from_embeddings(self, embeddings: Mapping[str, Tensor], ring: Ring | None = None) -> dict[str, Term]:
        """The loss of the whole (global) batch from its embeddings: one term, "contrastive", whose count is the pairs."""
        image_BD = embeddings["image"]
        # at the bound itself clamp lets gradients through, and clamp_() keeps the parameter from passing it
        log_scale = self.log_scale.clamp(max=self.config.max_log_scale)
        arguments = pair_arguments(embeddings, self.config.duplicates)
        loss = info_nce(
            image_BD, embeddings["text"], log_scale, label_smoothing=self.config.label_smoothing, ring=ring, **arguments
        )
        return self.contrastive_term(loss, image_BD)

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that the loss itself uses: the scale."""
        return [self.log_scale]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring log_scale back under its bound; call after each update, so that its gradient never dies above it."""
        self.log_scale.clamp_(max=self.config.max_log_scale)
