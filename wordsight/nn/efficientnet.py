"""EfficientNet: inverted bottlenecks scaled together in width, depth and resolution (arXiv 1905.11946), and EfficientNet-Lite.

Drop connect is stochastic depth (arXiv 1603.09382) with numbers by row; the squeeze of a channel is arXiv 1709.01507.
Shape legend: B batch, S image side in pixels, C channels, h w places of a map, F features after the pool, E embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wordsight.nn.random import uniform
from wordsight.nn.resnet import run_stage
from wordsight.nn.transformer import drop_path

CHANNEL_UNIT = 8  # scaled widths are multiples of it
NORM_EPS = 1e-3
ACTIVATIONS: dict[str, type[nn.Module]] = {"swish": nn.SiLU, "relu6": nn.ReLU6}
PADDINGS = ("same", "even")


@dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """An EfficientNet's architecture; the seven tuples have an entry a stage, before scaling (B0's are the defaults).

    Attributes:
        image_size_px: side of the square input.
        width_factor: multiplies channels, which are then rounded to multiples of 8 (never down by more than a tenth).
        depth_factor: multiplies a stage's blocks, rounded up.
        stem_channels: after the first convolution.
        channels: after each stage.
        repeats: blocks of each stage.
        kernel_sizes: of the depthwise convolutions, odd.
        strides: of each stage's first block, 1 or 2.
        expansions: inner channels of a block over its input's.
        head_channels: of the 1x1 convolution, norm and activation that close the published classifiers; None: the tower ends with
            the last stage, as ALIGN's does.
        squeeze_ratio: squeezed channels over a block's input channels; None: nothing is squeezed (Lite).
        activation: "swish", or "relu6" (Lite).
        fixed_ends: neither width nor depth of stem, head, first and last stage are scaled, but for the last stage's width (Lite).
        padding: where a stride is 2, "same" pads as TensorFlow's SAME does for the size at hand; "even" as it does for even
            sizes, whatever the size (Keras' models of no fixed size, transformers' AlignModel).
        square_blocks: with "even", the blocks (counted from 0) that pad all sides alike.
        drop_connect: what a block's rate of being skipped in training grows towards: block i of n has drop_connect * i / n.
        norm_momentum: the share of a batch in batch norm's running statistics; TensorFlow's momentum .99 is .01 here.
        project: whether a matrix takes the pooled features to the embedding; without it the embedding is the features.
    """

    image_size_px: int = 224
    width_factor: float = 1.0
    depth_factor: float = 1.0
    stem_channels: int = 32
    channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    head_channels: int | None = 1280
    squeeze_ratio: float | None = 0.25
    activation: Literal["swish", "relu6"] = "swish"
    fixed_ends: bool = False
    padding: Literal["same", "even"] = "same"
    square_blocks: tuple[int, ...] = ()
    drop_connect: float = 0.2
    norm_momentum: float = 0.01
    project: bool = True

    def __post_init__(self) -> None:
        if self.image_size_px < 1:
            raise ValueError(f"image_size_px must be at least 1, got {self.image_size_px}")
        lengths = {name: len(getattr(self, name)) for name in ("channels", "repeats", "kernel_sizes", "strides", "expansions")}
        if len(set(lengths.values())) > 1 or not self.channels:
            said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"an EfficientNet's tuples need an entry a stage each: {said}")
        if not (self.width_factor > 0 and self.depth_factor > 0):
            raise ValueError(f"width_factor and depth_factor must be above 0, got {self.width_factor}, {self.depth_factor}")
        if min(*self.channels, *self.repeats, *self.expansions, self.stem_channels) < 1:
            raise ValueError("an EfficientNet's channels, repeats and expansions must be at least 1")
        if any(size < 1 or size % 2 == 0 for size in self.kernel_sizes) or any(s not in (1, 2) for s in self.strides):
            raise ValueError(f"kernels must be odd and strides 1 or 2, got {self.kernel_sizes} and {self.strides}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"an EfficientNet's activation is one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {self.padding!r}")
        if not 0.0 <= self.drop_connect < 1.0:
            raise ValueError(f"drop_connect must lie in [0, 1), got {self.drop_connect}")

    def round_channels(self, channels: int) -> int:
        """Channels times the width factor, as a multiple of 8 that is at least nine tenths of it."""
        wanted = channels * self.width_factor
        rounded = max(CHANNEL_UNIT, int(wanted + CHANNEL_UNIT / 2) // CHANNEL_UNIT * CHANNEL_UNIT)
        return rounded + CHANNEL_UNIT if rounded < 0.9 * wanted else rounded

    @property
    def stem_width(self) -> int:
        """Channels after the stem, scaled."""
        return self.stem_channels if self.fixed_ends else self.round_channels(self.stem_channels)

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Blocks of each stage, scaled."""
        ends = (0, len(self.repeats) - 1) if self.fixed_ends else ()
        return tuple(n if i in ends else math.ceil(self.depth_factor * n) for i, n in enumerate(self.repeats))

    @property
    def num_features(self) -> int:
        """F, the pooled features."""
        if self.head_channels is None:
            return self.round_channels(self.channels[-1])
        return self.head_channels if self.fixed_ends else self.round_channels(self.head_channels)


# width factor, depth factor, side in pixels: arXiv 1905.11946 and its code; L2 is arXiv 1911.04252's; Lite's are of its code
SCALES: dict[str, tuple[float, float, int]] = {
    "b0": (1.0, 1.0, 224),
    "b1": (1.0, 1.1, 240),
    "b2": (1.1, 1.2, 260),
    "b3": (1.2, 1.4, 300),
    "b4": (1.4, 1.8, 380),
    "b5": (1.6, 2.2, 456),
    "b6": (1.8, 2.6, 528),
    "b7": (2.0, 3.1, 600),
    "l2": (4.3, 5.3, 800),
    "lite0": (1.0, 1.0, 224),
    "lite1": (1.0, 1.1, 240),
    "lite2": (1.1, 1.2, 260),
    "lite3": (1.2, 1.4, 280),
    "lite4": (1.4, 1.8, 300),
}


def efficientnet(name: str) -> EfficientNetConfig:
    """The published EfficientNet of that name: "b0" to "b7", "l2", "lite0" to "lite4".

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SCALES:
        raise ValueError(f"there is no EfficientNet {name!r}; there are {', '.join(SCALES)}")
    width, depth, side = SCALES[name]
    config = EfficientNetConfig(image_size_px=side, width_factor=width, depth_factor=depth)
    if name.startswith("lite"):
        config = replace(config, squeeze_ratio=None, activation="relu6", fixed_ends=True)
    return config


class StridedConv(nn.Conv2d):
    """A convolution without bias that pads itself: for stride 1 all sides alike, for stride 2 by `padding_kind`.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: odd.
        stride: 1 or 2.
        groups: C for a depthwise one.
        padding_kind: "same", "even" (see `EfficientNetConfig.padding`) or "square" (all sides alike).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int, groups: int = 1, padding_kind: str = "same"
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=False)
        self.padding_kind = "square" if stride == 1 else padding_kind

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', ceil(h / stride), ceil(w / stride)]; with "even" padding odd sides are rounded down."""
        half = self.kernel_size[0] // 2
        # TensorFlow's SAME: the padding that is needed at all, less of it before than after
        before = [
            half if self.padding_kind == "square" or (side % 2 and self.padding_kind == "same") else half - 1
            for side in x.shape[2:]
        ]
        if before == [half, half]:
            return F.conv2d(x, self.weight, None, self.stride, half, 1, self.groups)
        top, left = before
        # a kernel of 1 has nothing to pad, and skips the last row and column of an even side by itself
        x = F.pad(x, (max(left, 0), half, max(top, 0), half))
        return F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)


class ConvNorm(nn.Module):
    """A convolution, batch norm and, where there is one, an activation."""

    def __init__(self, conv: nn.Conv2d, momentum: float, activation: str | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=NORM_EPS, momentum=momentum)
        self.activation = ACTIVATIONS[activation]() if activation is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        return self.activation(self.norm(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Each channel times a gate that sees the mean of all channels (arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int, activation: str) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.activation = ACTIVATIONS[activation]()
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return x * self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class MBConv(nn.Module):
    """An inverted bottleneck: expand (1x1), filter each channel (depthwise), gate, project (1x1), on a residual where it fits.

    Only blocks that repeat a stage's first one have the residual; where its stride is 1 and no channels change, the paper's code
    would add one to that too, which no published member of the family has.
    """

    def __init__(
        self, config: EfficientNetConfig, in_channels: int, stage: int, *, first: bool, padding_kind: str, drop_rate: float
    ) -> None:
        super().__init__()
        inner, momentum = in_channels * config.expansions[stage], config.norm_momentum
        out_channels = config.round_channels(config.channels[stage])
        self.residual = not first
        self.drop_rate = drop_rate
        self.random_stream = 0
        self.expand = (
            ConvNorm(nn.Conv2d(in_channels, inner, 1, bias=False), momentum, config.activation) if inner != in_channels else None
        )
        depthwise = StridedConv(
            inner,
            inner,
            config.kernel_sizes[stage],
            stride=config.strides[stage] if first else 1,
            groups=inner,
            padding_kind=padding_kind,
        )
        self.depthwise = ConvNorm(depthwise, momentum, config.activation)
        squeezed = None if config.squeeze_ratio is None else max(1, int(in_channels * config.squeeze_ratio))
        self.squeeze = None if squeezed is None else SqueezeExcite(inner, squeezed, config.activation)
        self.project = ConvNorm(nn.Conv2d(inner, out_channels, 1, bias=False), momentum, None)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        y = self.depthwise(x if self.expand is None else self.expand(x))
        y = self.project(y if self.squeeze is None else self.squeeze(y))
        if not self.residual:
            return y
        if self.training and self.drop_rate > 0.0:
            draw_B1 = uniform(len(y), 1, stream=self.random_stream, device=y.device)
            y = drop_path(y, draw_B1[:, 0], self.drop_rate)
        return x + y


class EfficientNet(nn.Module):
    """Stem, blocks, the closing convolution where there is one, mean over places, projection where there is one.

    Args:
        config: the architecture.
        embed_dim: E.

    Raises:
        ValueError: there is no projection, and E is not the number of features.
    """

    def __init__(self, config: EfficientNetConfig, embed_dim: int) -> None:
        super().__init__()
        if not config.project and embed_dim != config.num_features:
            raise ValueError(
                f"an EfficientNet of {config.num_features} features without a projection can't give {embed_dim}: set embed_dim="
                f"{config.num_features}, or project=true"
            )
        self.config = config
        self.activation_checkpointing = False
        stem = StridedConv(3, config.stem_width, 3, stride=2, padding_kind=config.padding)
        self.stem = ConvNorm(stem, config.norm_momentum, config.activation)
        self.blocks = nn.ModuleList(_make_blocks(config))
        self.head: ConvNorm | None = None
        if config.head_channels is not None:
            closing = nn.Conv2d(config.round_channels(config.channels[-1]), config.num_features, 1, bias=False)
            self.head = ConvNorm(closing, config.norm_momentum, config.activation)
        # a bare matrix, as in the other towers: optimisers that treat hidden layers apart leave it out
        self.projection = nn.Parameter(torch.empty(config.num_features, embed_dim)) if config.project else None
        self._init_weights()

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: float [B, 3, S, S], normalised.

        Returns:
            [B, E], not normalised.
        """
        features_BF = self.features(pixels)
        return features_BF if self.projection is None else features_BF @ self.projection

    def features(self, pixels: Tensor) -> Tensor:
        """What the projection reads: [B, 3, S, S] -> [B, F]."""
        return self.forward_map(pixels).mean((2, 3))

    def forward_map(self, pixels: Tensor) -> Tensor:
        """The last feature map: [B, 3, S, S] -> [B, F, h, w]."""
        if pixels.is_cuda or not torch.is_grad_enabled():
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = run_stage(self.stem, pixels, self.activation_checkpointing)
        for block in self.blocks:
            x = run_stage(block, x, self.activation_checkpointing)
        return x if self.head is None else run_stage(self.head, x, self.activation_checkpointing)

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        """The places of the last feature map as tokens, row by row: [B, 3, S, S] -> [B, h w, F]."""
        return self.forward_map(pixels).flatten(2).transpose(1, 2)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute stem, blocks and head in the backward pass, not keeping their activations; batch statistics count once."""
        self.activation_checkpointing = enabled

    def _init_weights(self) -> None:
        """Convolutions as in the published code: normal, variance 2 over the outputs that a place of the input reaches."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                reached = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / reached))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.projection is not None:
            nn.init.normal_(self.projection, std=self.config.num_features**-0.5)


def _make_blocks(config: EfficientNetConfig) -> list[MBConv]:
    """All stages' blocks in order."""
    blocks: list[MBConv] = []
    total, in_channels = sum(config.num_blocks), config.stem_width
    for stage, repeats in enumerate(config.num_blocks):
        for j in range(repeats):
            square = config.padding == "even" and len(blocks) in config.square_blocks
            block = MBConv(
                config,
                in_channels,
                stage,
                first=j == 0,
                padding_kind="square" if square else config.padding,
                drop_rate=config.drop_connect * len(blocks) / total,
            )
            blocks.append(block)
            in_channels = block.project.conv.out_channels
    return blocks
