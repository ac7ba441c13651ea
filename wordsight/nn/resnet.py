"""CLIP's modified ResNet (arXiv 2103.00020, section 2.4): three-convolution stem, antialiased strides, attention pool.

Shape legend: B batch, S image side in pixels, C channels, h w places of a map, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wordsight.nn.pool import AttentionPool
from wordsight.nn.random import uniform
from wordsight.nn.transformer import depth_rates, drop_path

EXPANSION = 4  # a bottleneck's output over its inner width


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A modified ResNet's architecture.

    Attributes:
        image_size_px: side of the square input, a multiple of 32.
        layers: bottlenecks in each of the four stages.
        width: channels after the stem; the last map has 32 times as many.
        num_heads: heads of the attention pool; CLIP has width * 32 / 64 of them.
        stochastic_depth: the last bottleneck's rate of being skipped in training.
    """

    image_size_px: int = 224
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64
    num_heads: int = 32
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        if self.image_size_px < 32 or self.image_size_px % 32:
            raise ValueError(f"a ResNet's image_size_px must be a multiple of 32, got {self.image_size_px}")
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise ValueError(f"a ResNet has 4 stages of at least 1 bottleneck each, got layers={self.layers}")

    @property
    def grid(self) -> tuple[int, int]:
        """Places of the last map, down and across."""
        return (self.image_size_px // 32,) * 2


class Stem(nn.Module):
    """Three convolutions, the first with stride 2, and an average pool: a quarter of the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C, S/4, S/4]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return F.avg_pool2d(x, 2)


class Downsample(nn.Module):
    """The shortcut where shape changes: average pool by the stride, then a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h/stride, w/stride]."""
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return self.bn(self.conv(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions on a residual stream; a stride is an average pool before the last one."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        self.stride = stride
        self.drop_rate = drop_rate
        self.random_stream = 0
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        changes_shape = stride > 1 or in_channels != out_channels
        self.downsample = Downsample(in_channels, out_channels, stride) if changes_shape else None
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h/stride, w/stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = F.avg_pool2d(y, self.stride) if self.stride > 1 else y
        y = self.bn3(self.conv3(y))
        if self.training and self.drop_rate > 0.0:
            draw_B1 = uniform(len(y), 1, stream=self.random_stream, device=y.device)
            y = drop_path(y, draw_B1[:, 0], self.drop_rate)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ModifiedResNet(nn.Module):
    """Stem, four stages of bottlenecks, attention pool.

    Args:
        config: the architecture.
        embed_dim: E.
    """

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.stem = Stem(config.width)
        rates = iter(depth_rates(config.stochastic_depth, sum(config.layers)))
        in_channels, stages = config.width, []
        for i, num_blocks in enumerate(config.layers):
            blocks = []
            for j in range(num_blocks):
                channels = config.width * 2**i
                blocks.append(Bottleneck(in_channels, channels, 2 if i > 0 and j == 0 else 1, next(rates)))
                in_channels = channels * EXPANSION
            stages.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)
        self.attnpool = AttentionPool(in_channels, config.num_heads, config.grid, embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: float [B, 3, S, S], normalised.

        Returns:
            [B, E], not normalised.
        """
        return self.attnpool(self.forward_map(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """What the attention pool's last projection reads: [B, 3, S, S] -> [B, 32 * width]."""
        return self.attnpool.pooled(self.forward_map(pixels))

    def forward_map(self, pixels: Tensor) -> Tensor:
        """The last feature map: [B, 3, S, S] -> [B, 32 * width, S/32, S/32]."""
        if pixels.is_cuda or not torch.is_grad_enabled():
            # faster, but on a CPU batch norm's gradients round twice as far in it, for no gain in speed
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = run_stage(self.stem, pixels, self.activation_checkpointing)
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = run_stage(block, x, self.activation_checkpointing)
        return x

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        """The places of the last feature map as tokens, row by row: [B, 3, S, S] -> [B, (S/32)^2, 32 * width]."""
        return self.forward_map(pixels).flatten(2).transpose(1, 2)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute stem and bottlenecks in the backward pass, not keeping their activations; batch statistics count once."""
        self.activation_checkpointing = enabled


def run_stage(module: nn.Module, x: Tensor, activation_checkpointing: bool) -> Tensor:
    """`module(x)`, recomputed in the backward pass where that is asked for; batch statistics count once."""
    if activation_checkpointing and torch.is_grad_enabled():
        contexts = partial(checkpoint_contexts, module)
        return checkpoint(module, x, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
    return module(x)


def checkpoint_contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds a checkpointed module in its forward pass, and in its recomputation."""
    return nullcontext(), frozen_statistics(module)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within, batch norms in training mode use the batch's statistics without adding them to the running ones.

    For a second forward pass over the same batch (recomputation, two-pass gradient caching), which must not count it twice.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:  # and not track_running_stats = False, with which the recomputation would save other tensors
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches
