"""A compact residual CNN for small pictures: basic blocks of arXiv 1512.03385, short and wide like DAWNBench's ResNet-9.

It is the quickstart's image tower. The stem folds each patch of pixels into channels, so that every convolution is dense, 3x3 and
at low resolution, which is what a CPU computes fastest.

Shape legend: B batch, S image side in pixels, C channels, h w places of a map, P pooled features, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wordsight.nn.resnet import run_stage


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """A compact residual CNN's architecture.

    Attributes:
        image_size_px: side of the square input, a multiple of patch_size_px * 2 ** (stages - 1).
        patch_size_px: side of the patch whose pixels become channels; the first map has S / patch_size_px places a side.
        widths: channels of each stage; every stage but the first begins by halving the resolution.
        layers: residual blocks of each stage, as many numbers as widths; 0 leaves the opening convolution alone.
        pool: what the projection sees of the last map: its mean ("mean") or every place ("flat").
    """

    image_size_px: int = 32
    patch_size_px: int = 4
    widths: tuple[int, ...] = (64, 128)
    layers: tuple[int, ...] = (0, 1)
    pool: Literal["mean", "flat"] = "flat"

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.layers) or min(self.layers) < 0 or min(self.widths) < 1:
            raise ValueError(f"a ConvNet needs a width and a depth a stage, got widths={self.widths}, layers={self.layers}")
        if self.patch_size_px < 1:
            raise ValueError(f"patch_size_px must be at least 1, got {self.patch_size_px}")
        step = self.patch_size_px * 2 ** (len(self.widths) - 1)
        if self.image_size_px < step or self.image_size_px % step:
            raise ValueError(
                f"a ConvNet of {len(self.widths)} stages and patches of {self.patch_size_px} px needs an image_size_px divisible "
                f"by {step}, got {self.image_size_px}"
            )
        if self.pool not in ("mean", "flat"):
            raise ValueError(f"pool must be 'mean' or 'flat', got {self.pool!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """Places of the last map, down and across."""
        return (self.image_size_px // self.patch_size_px >> (len(self.widths) - 1),) * 2


class Opening(nn.Module):
    """What opens a stage: a 3x3 convolution (of the folded patches, or with stride 2), batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h/stride, w/stride]."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions on a residual stream."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(x + self.bn2(self.conv2(y)), inplace=True)


class ConvNet(nn.Module):
    """Folded patches, stages of an opening convolution and residual blocks, a pool, a batch norm, a projection.

    Args:
        config: the architecture.
        embed_dim: E.
    """

    def __init__(self, config: ConvNetConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        stages, in_channels = [], 3 * config.patch_size_px**2
        for i, (channels, num_blocks) in enumerate(zip(config.widths, config.layers, strict=True)):
            opening = Opening(in_channels, channels, stride=2 if i > 0 else 1)
            stages.append(nn.Sequential(opening, *[BasicBlock(channels) for _ in range(num_blocks)]))
            in_channels = channels
        self.stages = nn.ModuleList(stages)
        num_places = config.grid[0] * config.grid[1] if config.pool == "flat" else 1
        # what comes out of a ReLU points the same way for every picture (mean cosine .76 at the start, with this norm .01)
        self.norm = nn.BatchNorm1d(in_channels * num_places)
        # a bare matrix, as in the text tower: optimisers that treat hidden layers apart leave it out
        num_features = in_channels * num_places
        self.projection = nn.Parameter(torch.empty(num_features, embed_dim).normal_(std=(3 * num_features) ** -0.5))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: float [B, 3, S, S], normalised.

        Returns:
            [B, E], not normalised.
        """
        return self.features(pixels) @ self.projection

    def features(self, pixels: Tensor) -> Tensor:
        """What the projection reads: [B, 3, S, S] -> [B, C], or [B, C h w] of a flat pool."""
        map_BChw = self.forward_map(pixels)
        return self.norm(map_BChw.mean((2, 3)) if self.config.pool == "mean" else map_BChw.flatten(1))

    def forward_map(self, pixels: Tensor) -> Tensor:
        """The last feature map: [B, 3, S, S] -> [B, C, h, w]."""
        x = F.pixel_unshuffle(pixels, self.config.patch_size_px).contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = run_stage(stage, x, self.activation_checkpointing)
        return x

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        """The places of the last feature map as tokens, row by row: [B, 3, S, S] -> [B, h w, C]."""
        return self.forward_map(pixels).flatten(2).transpose(1, 2)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the stages in the backward pass, not keeping their activations; batch statistics count once."""
        self.activation_checkpointing = enabled
