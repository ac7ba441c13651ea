"""UniCL: contrast in image-text-label space, where every text of a picture's class is right for it (arXiv 2204.03610).

A sample is a picture, a text and a label. Samples of a classification set share their class's label, and their texts are made of
the class's name; a captioned picture has a label of its own. One batch holds both kinds.

Shape legend: B batch, N texts, L context length, S image side in pixels, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wordsight.embed import DualEncoderMixin
from wordsight.losses.contrastive import check_range, info_nce, pair_arguments
from wordsight.losses.ring import Ring
from wordsight.nn.random import number_streams
from wordsight.nn.towers import ImageConfig, TextTowerConfig, build_image_tower, build_text_tower
from wordsight.nn.transformer import Activation, make_activation
from wordsight.types import Term


@dataclass(frozen=True, kw_only=True)
class UniCLConfig:
    """A UniCL's architecture and loss.

    Attributes:
        embed_dim: D.
        image: the image tower's architecture; its type chooses the tower.
        text: the text tower's architecture.
        activation: "gelu" or "quick_gelu", in both towers.
        init_log_scale: where log_scale starts, log of the inverse temperature.
        max_log_scale: log_scale is clamped here.
        label_smoothing: the share of each target that is spread over the whole batch.
    """

    embed_dim: int
    image: ImageConfig
    text: TextTowerConfig
    activation: Activation = "gelu"
    init_log_scale: float = math.log(1 / 0.07)
    max_log_scale: float = math.log(100)
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_range("label_smoothing", self.label_smoothing, 0.0, 1.0)
        make_activation(self.activation)


class UniCL(DualEncoderMixin, nn.Module):
    """Two towers, a learnable temperature, symmetric InfoNCE whose targets are all samples of one label.

    Attributes:
        config: the architecture.
        image_tower: float pixels [B, 3, S, S] -> [B, D].
        text_tower: tokens [N, L] -> [N, D].
        log_scale: scalar parameter; its exponential multiplies cosine similarities.
        logit_bias: None.
    """

    def __init__(self, config: UniCLConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = build_image_tower(config.image, config.embed_dim, config.activation)
        self.text_tower = build_text_tower(config.text, config.embed_dim, config.activation)
        self.log_scale = nn.Parameter(torch.tensor(config.init_log_scale))
        self.logit_bias = None
        number_streams(self)

    def loss_from_embeddings(self, embeddings: Mapping[str, Tensor], ring: Ring | None = None) -> dict[str, Term]:
        """The loss of the whole (global) batch from its embeddings: one term, "contrastive", whose count is the pairs.

        With P(i) the samples of i's label and z the logits, the mean over i of -1/|P(i)| sum_{k in P(i)} log softmax_k(z_i), and
        of the same with pictures and texts exchanged, halved, where the paper adds the two.

        Raises:
            ValueError: the batch says no labels.
        """
        image_BD = embeddings["image"]
        log_scale = self.log_scale.clamp(max=self.config.max_log_scale)
        arguments = pair_arguments(embeddings, "labels")
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
