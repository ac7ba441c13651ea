"""ALIGN: an EfficientNet and a BERT trained to agree on noisy pairs by the million (arXiv 2102.05918).

Shape legend: B batch, N texts, L context length, S image side in pixels, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from wordsight.embed import DualEncoderMixin
from wordsight.losses.contrastive import check_range, info_nce, pair_arguments
from wordsight.nn.random import number_streams
from wordsight.nn.towers import ImageConfig, TextTowerConfig, build_image_tower, build_text_tower
from wordsight.nn.transformer import Activation, make_activation
from wordsight.types import Term

if TYPE_CHECKING:
    from wordsight.data.transform import Preprocess
    from wordsight.losses.ring import Ring


@dataclass(frozen=True, kw_only=True)
class ALIGNConfig:
    """An ALIGN's architecture and loss.

    Attributes:
        embed_dim: D; with an EfficientNet that has no projection (the paper's), its number of features.
        image: the image tower's architecture, in the paper EfficientNet-L2.
        text: the text tower's architecture, in the paper BERT-Large.
        activation: of towers that do not say their own.
        init_temperature: where the temperature starts, which cosines are divided by.
        min_temperature: the temperature is clamped here.
        label_smoothing: the share of each target that is spread over the whole batch.
        duplicates: as in `CLIPConfig`.
    """

    embed_dim: int
    image: ImageConfig
    text: TextTowerConfig
    activation: Activation = "gelu"
    init_temperature: float = 1.0
    min_temperature: float = 0.01
    label_smoothing: float = 0.1
    duplicates: Literal["plain", "multi_positive"] = "plain"

    def __post_init__(self) -> None:
        if not 0 < self.min_temperature <= self.init_temperature:
            raise ValueError(
                f"the temperature must start above 0 and not under its bound, got init_temperature={self.init_temperature}, "
                f"min_temperature={self.min_temperature}"
            )
        if self.duplicates not in ("plain", "multi_positive"):
            raise ValueError(f"duplicates must be 'plain' or 'multi_positive', got {self.duplicates!r}")
        check_range("label_smoothing", self.label_smoothing, 0.0, 1.0)
        make_activation(self.activation)


class ALIGN(DualEncoderMixin, nn.Module):
    """Two towers, a learnable temperature, symmetric InfoNCE with smoothed targets.

    Attributes:
        config: the architecture.
        image_tower: float pixels [B, 3, S, S] -> [B, D].
        text_tower: tokens [N, L] -> [N, D].
        temperature: scalar parameter that cosine similarities are divided by.
        logit_bias: None.
    """

    def __init__(self, config: ALIGNConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = build_image_tower(config.image, config.embed_dim, config.activation)
        self.text_tower = build_text_tower(config.text, config.embed_dim, config.activation)
        self.temperature = nn.Parameter(torch.tensor(config.init_temperature))
        self.logit_bias = None
        number_streams(self)

    @property
    def log_scale(self) -> Tensor:  # type: ignore[override]  # a parameter elsewhere
        """-log temperature, under its bound: what other systems learn in its place."""
        # at the bound itself clamp lets gradients through, and clamp_() keeps the parameter from passing it
        return -self.temperature.clamp(min=self.config.min_temperature).log()

    @classmethod
    def default_preprocessor(cls, config: Any) -> Preprocess:
        """Both sides resized, pixels from -1 to 1."""
        from wordsight.data.transform import Preprocess

        side = config.image.image_size_px
        return Preprocess(image_size_px=side, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)

    def loss_from_embeddings(self, embeddings: Mapping[str, Tensor], ring: Ring | None = None) -> dict[str, Term]:
        """The loss of the whole (global) batch from its embeddings: one term, "contrastive", whose count is the pairs.

        -1/2B sum_i sum_j t_ij (log softmax_j(u_i v_j / T) + log softmax_j(u_j v_i / T)): equations 1 and 2, halved where the
        paper adds them, with targets t = (1 - s) identity + s / B for a label smoothing of s.
        """
        image_BD = embeddings["image"]
        smoothing = self.config.label_smoothing
        arguments = pair_arguments(embeddings, self.config.duplicates)
        loss = info_nce(image_BD, embeddings["text"], self.log_scale, label_smoothing=smoothing, ring=ring, **arguments)
        return self.contrastive_term(loss, image_BD)

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that the loss itself uses: the temperature."""
        return [self.temperature]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the temperature back over its bound; call after each update, so that its gradient never dies under it."""
        self.temperature.clamp_(min=self.config.min_temperature)
