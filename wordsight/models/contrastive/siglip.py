"""SigLIP: two towers trained by a sigmoid for every pair of a batch, right or wrong (arXiv 2303.15343).

SigLIP 2 (arXiv 2502.14786) at a fixed resolution has the same layout and only another vocabulary.

Shape legend: B batch, N texts, L context length, S image side in pixels, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from wordsight.embed import DualEncoderMixin
from wordsight.losses.contrastive import pair_arguments, sigmoid
from wordsight.nn.random import number_streams
from wordsight.nn.towers import ImageConfig, TextTowerConfig, build_image_tower, build_text_tower
from wordsight.nn.transformer import Activation, make_activation
from wordsight.types import Term

if TYPE_CHECKING:
    from wordsight.data.transform import Preprocess
    from wordsight.losses.ring import Ring


@dataclass(frozen=True, kw_only=True)
class SigLIPConfig:
    """A SigLIP's architecture and loss.

    Attributes:
        embed_dim: D; in the published models the image tower's width, whose pool ends without a projection.
        image: the image tower's architecture, in the paper a ViT with pool="map".
        text: the text tower's architecture, in the paper a `SigLIPTextConfig`.
        activation: of the MLPs of towers that do not say their own.
        text_activation: of the text tower's, where it is another; None: `activation`. (open_clip computes the text towers of the
            first SigLIPs with the exact GELU, though they were trained with its tanh approximation.)
        init_log_scale: where log_scale starts, log of what cosines are multiplied by.
        init_bias: where logit_bias starts. Among B^2 pairs only B are right: with -10 the first steps need not correct that.
        duplicates: as in `CLIPConfig`; every right pair is a positive of its own here.
    """

    embed_dim: int
    image: ImageConfig
    text: TextTowerConfig
    activation: Activation = "gelu_tanh"
    text_activation: Activation | None = None
    init_log_scale: float = math.log(10)
    init_bias: float = -10.0
    duplicates: Literal["plain", "multi_positive"] = "plain"

    def __post_init__(self) -> None:
        if self.duplicates not in ("plain", "multi_positive"):
            raise ValueError(f"duplicates must be 'plain' or 'multi_positive', got {self.duplicates!r}")
        make_activation(self.activation)
        if self.text_activation is not None:
            make_activation(self.text_activation)


class SigLIP(DualEncoderMixin, nn.Module):
    """Two towers, a learnable scale and bias, a sigmoid for each pair.

    sigmoid(exp(log_scale) cosine + logit_bias) is the probability that a text fits a picture, of that pair alone: the texts of a
    picture do not share 1 among them. Neither scale nor bias has a bound, as in the paper.

    Attributes:
        config: the architecture.
        image_tower: float pixels [B, 3, S, S] -> [B, D].
        text_tower: tokens [N, L] -> [N, D].
        log_scale: scalar parameter; its exponential multiplies cosine similarities.
        logit_bias: scalar parameter, added to each logit.
        tokenizer: texts -> tokens; set by whoever makes or loads the model.
        preprocessor: PIL image -> pixels; set by whoever makes or loads the model.
    """

    logit_bias: nn.Parameter

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = build_image_tower(config.image, config.embed_dim, config.activation)
        self.text_tower = build_text_tower(config.text, config.embed_dim, config.text_activation or config.activation)
        self.log_scale = nn.Parameter(torch.tensor(config.init_log_scale))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.init_bias)))
        number_streams(self)

    @classmethod
    def default_preprocessor(cls, config: Any) -> Preprocess:
        """The published SigLIPs': both sides resized to the image size, pixels in [-1, 1]; CLIP's for other image towers."""
        from wordsight.data.transform import Preprocess

        if getattr(config.image, "pool", None) != "map":
            return Preprocess(image_size_px=config.image.image_size_px)
        half = (0.5, 0.5, 0.5)
        return Preprocess(image_size_px=config.image.image_size_px, resize="squash", mean=half, std=half)

    def loss_from_embeddings(self, embeddings: Mapping[str, Tensor], ring: Ring | None = None) -> dict[str, Term]:
        """The loss of the whole (global) batch from its embeddings: one term, "contrastive", whose count is the pairs.

        -1/B sum_ij log sigmoid(z_ij (exp(log_scale) image_i text_j + logit_bias)), z_ij = 1 where text j is right for image i,
        else -1: section 3.2.
        """
        image_BD = embeddings["image"]
        arguments = pair_arguments(embeddings, self.config.duplicates)
        loss = sigmoid(image_BD, embeddings["text"], self.log_scale, self.logit_bias, ring=ring, **arguments)
        return self.contrastive_term(loss, image_BD)

    def expected_initial_loss(self, num_pairs: int) -> float:
        """The loss of B distinct pairs whose cosines are all 0: softplus(-bias) + (B - 1) softplus(bias), nats an image."""
        right, wrong = (math.log1p(math.exp(-abs(z))) + max(z, 0.0) for z in (-self.config.init_bias, self.config.init_bias))
        return right + (num_pairs - 1) * wrong

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that the loss itself uses: the scale and the bias."""
        return [self.log_scale, self.logit_bias]

    def clamp_(self) -> None:
        """Nothing has a bound here."""
