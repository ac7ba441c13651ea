"""What an image tower's projection reads: `features`, of every kind of tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wordsight.nn.convnet import ConvNet, ConvNetConfig
from wordsight.nn.efficientnet import EfficientNet, EfficientNetConfig
from wordsight.nn.resnet import ModifiedResNet, ResNetConfig
from wordsight.nn.towers import build_image_tower
from wordsight.nn.vit import VisionTransformer, ViTConfig

VIT = {"image_size_px": 32, "patch_size_px": 8, "width": 24, "num_layers": 2, "num_heads": 2}
CONFIGS: dict[str, Any] = {
    "vit": ViTConfig(**VIT),
    "vit map": ViTConfig(**VIT, pool="map", norm_pre=False, patch_bias=True),
    "convnet mean": ConvNetConfig(image_size_px=32, patch_size_px=4, widths=(8, 16), layers=(1, 1), pool="mean"),
    "convnet flat": ConvNetConfig(image_size_px=32, patch_size_px=4, widths=(8, 16), layers=(1, 1), pool="flat"),
    "resnet": ResNetConfig(image_size_px=64, layers=(1, 1, 1, 1), width=8),
    "efficientnet": EfficientNetConfig(image_size_px=32),
}
WIDTHS = {"vit": 24, "vit map": 24, "convnet mean": 16, "convnet flat": 16 * 16, "resnet": 256}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_projection_of_the_features_is_the_embedding(kind: str) -> None:
    tower: Any = build_image_tower(CONFIGS[kind], 12, "gelu").eval()
    pixels = torch.randn(3, 3, CONFIGS[kind].image_size_px, CONFIGS[kind].image_size_px)
    with torch.no_grad():
        features, embedding = tower.features(pixels), tower(pixels)
    assert features.shape == (3, WIDTHS.get(kind) or CONFIGS[kind].num_features)
    if isinstance(tower, ModifiedResNet):
        projected = tower.attnpool.proj(features)
    else:
        assert isinstance(tower, VisionTransformer | ConvNet | EfficientNet)
        projected = features @ tower.projection
    torch.testing.assert_close(projected, embedding)
