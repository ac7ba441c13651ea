"""The towers that systems are put together from: which config means which tower, and a system's config as JSON.

Shape legend: B batch, N texts, S image side in pixels, L text length in tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from torch import nn

from wordsight.nn.bert import Bert, BertConfig
from wordsight.nn.convnet import ConvNet, ConvNetConfig
from wordsight.nn.efficientnet import EfficientNet, EfficientNetConfig
from wordsight.nn.resnet import ModifiedResNet, ResNetConfig
from wordsight.nn.text import SigLIPText, SigLIPTextConfig, TextConfig, TextTransformer
from wordsight.nn.vit import VisionTransformer, ViTConfig

ImageConfig = ViTConfig | ResNetConfig | ConvNetConfig | EfficientNetConfig
TextTowerConfig = TextConfig | BertConfig | SigLIPTextConfig
# names as they stand in JSON
IMAGE_TOWERS: dict[str, type] = {
    "vit": ViTConfig,
    "resnet": ResNetConfig,
    "convnet": ConvNetConfig,
    "efficientnet": EfficientNetConfig,
}
TEXT_TOWERS: dict[str, type] = {"transformer": TextConfig, "bert": BertConfig, "siglip": SigLIPTextConfig}

Config = TypeVar("Config")


def build_image_tower(config: ImageConfig, embed_dim: int, activation: str) -> nn.Module:
    """The image tower that a config's type stands for: float pixels [B, 3, S, S] -> [B, D]."""
    match config:
        case ViTConfig():
            return VisionTransformer(config, embed_dim, activation)
        case ResNetConfig():
            return ModifiedResNet(config, embed_dim)
        case ConvNetConfig():
            return ConvNet(config, embed_dim)
        case EfficientNetConfig():
            return EfficientNet(config, embed_dim)
    raise ValueError(f"an image tower's config is one of {', '.join(IMAGE_TOWERS)}, got {type(config).__name__}")


def build_text_tower(config: TextTowerConfig, embed_dim: int, activation: str) -> nn.Module:
    """The text tower that a config's type stands for: int64 tokens [N, L] -> [N, D]."""
    match config:
        case TextConfig():
            return TextTransformer(config, embed_dim, activation)
        case SigLIPTextConfig():
            return SigLIPText(config, embed_dim, activation)
        case BertConfig():
            return Bert(config, embed_dim)
    raise ValueError(f"a text tower's config is one of {', '.join(TEXT_TOWERS)}, got {type(config).__name__}")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A system's config as plain JSON values; what kind its towers are stands in their "type"."""
    return {
        **asdict(config),
        "image": {"type": _kind(config.image, IMAGE_TOWERS), **asdict(config.image)},
        "text": {"type": _kind(config.text, TEXT_TOWERS), **asdict(config.text)},
    }


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The config that `config_to_dict` wrote.

    Args:
        cls: the system's config class, with fields `image` and `text`.
        values: JSON values; a text tower without a "type" is a transformer.

    Raises:
        ValueError: on an unknown or missing key or type, naming it and what is allowed.
    """
    image = _tower("image", values.get("image", {}), IMAGE_TOWERS, None)
    text = _tower("text", values.get("text", {}), TEXT_TOWERS, "transformer")
    return _build(cls, {**values, "image": image, "text": text})


def _kind(config: Any, towers: Mapping[str, type]) -> str:
    return next(name for name, cls in towers.items() if type(config) is cls)


def _tower(what: str, values: Mapping[str, Any], towers: Mapping[str, type], default: str | None) -> Any:
    kind = values.get("type", default)
    if kind not in towers:
        raise ValueError(f"{what} tower type {kind!r} is unknown; allowed are {', '.join(towers)}")
    # JSON has no tuples
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key != "type"}
    return _build(towers[kind], given)


def _build(cls: type[Config], values: Mapping[str, Any]) -> Config:
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # every config is a dataclass
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None
