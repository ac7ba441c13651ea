"""CLIP: an image tower and a text tower trained to agree on pairs (arXiv 2103.00020).

Shape legend: B batch, N texts, L context length, S image side in pixels, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wordsight.embed import EmbedderMixin
from wordsight.losses.contrastive import info_nce, same_pair
from wordsight.nn.convnet import ConvNet, ConvNetConfig
from wordsight.nn.random import number_streams
from wordsight.nn.resnet import ModifiedResNet, ResNetConfig
from wordsight.nn.text import TextConfig, TextTransformer
from wordsight.nn.transformer import Activation, make_activation
from wordsight.nn.vit import VisionTransformer, ViTConfig
from wordsight.types import Batch, Term

if TYPE_CHECKING:
    from wordsight.data.tokenize import ClipTokenizer
    from wordsight.data.transform import Preprocess

ImageConfig = ViTConfig | ResNetConfig | ConvNetConfig
# names as they stand in JSON
IMAGE_CONFIGS: dict[str, type[ImageConfig]] = {"vit": ViTConfig, "resnet": ResNetConfig, "convnet": ConvNetConfig}


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
    """

    embed_dim: int
    image: ImageConfig
    text: TextConfig
    activation: Activation = "quick_gelu"
    init_log_scale: float = math.log(1 / 0.07)
    max_log_scale: float = math.log(100)
    duplicates: Literal["plain", "multi_positive"] = "plain"

    def __post_init__(self) -> None:
        if self.duplicates not in ("plain", "multi_positive"):
            raise ValueError(f"duplicates must be 'plain' or 'multi_positive', got {self.duplicates!r}")
        make_activation(self.activation)


class CLIP(EmbedderMixin, nn.Module):
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
        self.text_tower = TextTransformer(config.text, config.embed_dim, config.activation)
        self.log_scale = nn.Parameter(torch.tensor(config.init_log_scale))
        self.logit_bias = None
        self.tokenizer: ClipTokenizer | None = None
        self.preprocessor: Preprocess | None = None
        number_streams(self)

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed images.

        Args:
            pixels: float [B, 3, S, S], normalised by the model's preprocessing.
            normalize: whether rows get length 1.

        Returns:
            [B, D].

        Raises:
            ValueError: on integer pixels or another size than the model's.
        """
        side = self.config.image.image_size_px
        if not pixels.is_floating_point() or pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
            raise ValueError(
                f"pixels are {pixels.dtype} {tuple(pixels.shape)}, this model takes normalised floats (B, 3, {side}, {side}); "
                "make them with model.preprocess(pil_image)"
            )
        features_BD = self.image_tower(pixels)
        return F.normalize(features_BD, dim=-1) if normalize else features_BD

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed texts.

        Args:
            tokens: int64 [N, <= L], the end-of-text token in each row.
            normalize: whether rows get length 1.

        Returns:
            [N, D].

        Raises:
            ValueError: on another shape, or rows longer than the model's context.
        """
        longest = self.config.text.context_length
        if tokens.is_floating_point() or tokens.ndim != 2 or not 0 < tokens.shape[1] <= longest:
            raise ValueError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}, this model takes integers (N, at most {longest}); "
                "make them with model.tokenize(texts)"
            )
        features_ND = self.text_tower(tokens)
        return F.normalize(features_ND, dim=-1) if normalize else features_ND

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Symmetric InfoNCE over the batch; see `info_nce`."""
        return self.loss_from_embeddings(self.embeddings(batch))

    def embeddings(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss needs of each sample: image and text [B, D], L2-normalised, and the ids that show duplicates [B]."""
        return {
            "image": self.encode_image(batch.pixels),
            "text": self.encode_text(batch.tokens),
            "text_ids": batch.text_ids,
            "image_ids": batch.image_ids,
        }

    def loss_from_embeddings(self, embeddings: Mapping[str, Tensor]) -> dict[str, Term]:
        """The loss of the whole (global) batch from its embeddings: one term, "contrastive", whose count is the pairs."""
        image_BD, text_BD = embeddings["image"], embeddings["text"]
        positives_BB = None
        if self.config.duplicates == "multi_positive":
            positives_BB = same_pair(embeddings["text_ids"], embeddings["image_ids"])
        # at the bound itself clamp lets gradients through, and clamp_() keeps the parameter from passing it
        log_scale = self.log_scale.clamp(max=self.config.max_log_scale)
        loss = info_nce(image_BD, text_BD, log_scale, positives=positives_BB)
        return {"contrastive": Term(sum=loss * len(image_BD), count=len(image_BD))}

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that the loss itself uses: the scale."""
        return [self.log_scale]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring log_scale back under its bound; call after each update, so that its gradient never dies above it."""
        self.log_scale.clamp_(max=self.config.max_log_scale)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Trade compute for memory in both towers; results and random numbers stay the same."""
        self.image_tower.set_activation_checkpointing(enabled)
        self.text_tower.set_activation_checkpointing(enabled)


def build_image_tower(config: ImageConfig, embed_dim: int, activation: str) -> VisionTransformer | ModifiedResNet | ConvNet:
    """The image tower that a config's type stands for."""
    match config:
        case ViTConfig():
            return VisionTransformer(config, embed_dim, activation)
        case ResNetConfig():
            return ModifiedResNet(config, embed_dim)
        case ConvNetConfig():
            return ConvNet(config, embed_dim)


def config_to_dict(config: CLIPConfig) -> dict[str, Any]:
    """The config as plain JSON values; the image tower's kind stands in its "type"."""
    kind = next(name for name, cls in IMAGE_CONFIGS.items() if type(config.image) is cls)
    return {**asdict(config), "image": {"type": kind, **asdict(config.image)}}


def config_from_dict(values: Mapping[str, Any]) -> CLIPConfig:
    """The config that `config_to_dict` wrote.

    Raises:
        ValueError: on an unknown or missing key or type, naming it and what is allowed.
    """
    image = dict(values.get("image", {}))
    kind = image.pop("type", None)
    if kind not in IMAGE_CONFIGS:
        raise ValueError(f"image tower type {kind!r} is unknown; allowed are {', '.join(IMAGE_CONFIGS)}")
    image = {key: tuple(value) if isinstance(value, list) else value for key, value in image.items()}  # JSON has no tuples
    parts = {"image": _build(IMAGE_CONFIGS[kind], image), "text": _build(TextConfig, values.get("text", {}))}
    return _build(CLIPConfig, {**values, **parts})


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None
