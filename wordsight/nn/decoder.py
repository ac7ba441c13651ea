"""The light decoder that reads all tokens of a frozen image tower: a few transformer blocks, one token's output, a head.

It is the module of "Exploring Vision-Language Models for Imbalanced Learning" (arXiv 2304.01457, section 4): 3 blocks as wide as
the tower, 4 heads, MLPs half as wide, the class token's output without a norm, a linear head. Where the tower has no class token
(the places of a map, a tower pooled by a probe) the mean of its tokens stands in front of them, as in CLIP's attention pool, and
its output is read.

Cosine head and a head from text features: LIFT (arXiv 2309.10019, sections 4.1 and 4.2). Calibrations of a trained head: LWS
(1910.09217), DisAlign (2103.16370), MARC (2112.07225).

Only what is used is computed, with the same result and the same gradients: the last block has one query, and so needs no keys and
values of the tokens (`first_row`); the first one reads tokens that do not learn, so its norm goes into its projection
(`frozen_input`). By operations learning is three quarters of what whole blocks take.

Shape legend: B batch, T tokens, W width, C classes, H heads, E width of a head, D embedding width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wordsight.nn.convnet import ConvNet
from wordsight.nn.efficientnet import EfficientNet
from wordsight.nn.resnet import ModifiedResNet
from wordsight.nn.transformer import Block, Transformer
from wordsight.nn.vit import VisionTransformer

HEADS = ("linear", "cosine")
CALIBRATIONS = ("plain", "confident")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's architecture.

    Attributes:
        width: W of the tokens.
        num_classes: C.
        class_token: whether the first token is a class token.
        num_layers: blocks; 0: the head reads the class token, or the mean, as it is.
        num_heads: of each block; divides the width.
        mlp_ratio: hidden width of the MLPs over W.
        head: "linear": w_c f + b_c; "cosine": head_scale cos(w_c, f).
        head_scale: of a cosine head.
        norm_eps: of a layer norm before the head; None: there is none, as published.
        calibration: what corrects a trained head's logits; see `Calibration`.
    """

    width: int
    num_classes: int
    class_token: bool = True
    num_layers: int = 3
    num_heads: int = 4
    mlp_ratio: float = 0.5
    head: Literal["linear", "cosine"] = "linear"
    head_scale: float = 25.0
    norm_eps: float | None = None
    calibration: Literal["plain", "confident"] | None = None

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.num_layers < 0:
            raise ValueError(f"num_layers must be at least 0, got {self.num_layers}")
        if self.num_layers and (self.num_heads < 1 or self.width % self.num_heads):
            raise ValueError(f"num_heads must divide the tokens' width {self.width}, got {self.num_heads}")
        if self.num_layers and not self.mlp_ratio * self.width >= 1:
            raise ValueError(f"mlp_ratio must give a width of at least 1, got {self.mlp_ratio} of {self.width}")
        if not self.head_scale > 0:
            raise ValueError(f"head_scale must be above 0, got {self.head_scale}")


class CosineHead(nn.Module):
    """z_c = scale cos(w_c, f).

    Attributes:
        weight: [C, W], of any length.
    """

    def __init__(self, width: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(num_classes, width) * width**-0.5)

    def forward(self, features_BW: Tensor) -> Tensor:
        """[B, W] -> [B, C]."""
        return self.scale * F.linear(F.normalize(features_BW, dim=1), F.normalize(self.weight, dim=1))


class Calibration(nn.Module):
    """What corrects the logits z of a head that stands still.

    "plain" is a_c z_c + b_c l_c: with l = 0 LWS, with l_c = |w_c| MARC. "confident" is (1 + g a_c) z_c + g b_c with a confidence
    g = sigmoid(v f + u) of the features: DisAlign. Each starts as the head alone.

    Attributes:
        scale: a, [C].
        shift: b, [C].
        lengths: l, [C], which do not learn.
        confidence: v and u, or None.
    """

    lengths: Tensor

    def __init__(self, width: int, num_classes: int, kind: str) -> None:
        super().__init__()
        if kind not in CALIBRATIONS:
            raise ValueError(f"calibration must be one of {', '.join(CALIBRATIONS)}, got {kind!r}")
        self.confidence = nn.Linear(width, 1) if kind == "confident" else None
        self.scale = nn.Parameter(torch.ones(num_classes) if self.confidence is None else torch.zeros(num_classes))
        self.shift = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("lengths", torch.ones(num_classes))

    def forward(self, logits_BC: Tensor, features_BW: Tensor) -> Tensor:
        """[B, C], [B, W] -> [B, C]."""
        if self.confidence is None:
            return self.scale * logits_BC + self.shift * self.lengths
        sure_B1 = self.confidence(features_BW).sigmoid()
        return (1 + sure_B1 * self.scale) * logits_BC + sure_B1 * self.shift


class TokenDecoder(nn.Module):
    """Blocks over all tokens, the first one's output, a head.

    Attributes:
        blocks: None with 0 layers.
        norm: before the head, or None.
        head: features [B, W] -> logits [B, C].
        calibration: of the head's logits, or None.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks: Transformer | None = None
        if config.num_layers:
            self.blocks = Transformer(
                width=config.width,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                mlp_width=round(config.width * config.mlp_ratio),
                activation="gelu",
            )
        self.norm = None if config.norm_eps is None else nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = make_head(config)
        kind = config.calibration
        self.calibration = None if kind is None else Calibration(config.width, config.num_classes, kind)

    def forward(self, tokens_BTW: Tensor) -> Tensor:
        """Tokens [B, T, W] -> logits [B, C]."""
        return self.classify(self.features(tokens_BTW))

    def features(self, tokens_BTW: Tensor) -> Tensor:
        """What the head reads: [B, T, W] -> [B, W]."""
        if not self.config.class_token:
            tokens_BTW = torch.cat([tokens_BTW.mean(1, keepdim=True), tokens_BTW], dim=1)
        if self.blocks is None:
            features_BW = tokens_BTW[:, 0]
        else:
            *before, last = self.blocks
            for place, block in enumerate(before):
                tokens_BTW = block(tokens_BTW) if place else frozen_input(block, tokens_BTW)  # type: ignore[arg-type]
            features_BW = first_row(last, tokens_BTW)  # type: ignore[arg-type]
        return features_BW if self.norm is None else self.norm(features_BW)

    def classify(self, features_BW: Tensor) -> Tensor:
        """What the features are taken for: [B, W] -> [B, C]."""
        logits_BC = self.head(features_BW)
        return logits_BC if self.calibration is None else self.calibration(logits_BC, features_BW)

    def classifier_rows(self) -> Tensor:
        """The head's rows as they multiply the features (of unit length before a cosine head): [C, W]."""
        weight_CW = self.head.weight
        assert isinstance(weight_CW, Tensor)
        return self.head.scale * F.normalize(weight_CW, dim=1) if isinstance(self.head, CosineHead) else weight_CW

    @torch.no_grad()
    def open_blocks(self) -> None:
        """Let each block start by passing its input on: the last matrices of its branches become 0."""
        for block in self.blocks or ():
            assert isinstance(block, Block)
            for linear in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)


def frozen_input(block: Block, x_BTW: Tensor) -> Tensor:
    """A block's output, its first norm's gain and offset multiplied into the projection behind it: A (g n + b) = (A g) n + A b.

    Where x needs no gradient, n needs none, and the backward pass is spared a product of all tokens with A.

    Args:
        block: without stochastic depth.
        x_BTW: [B, T, W].

    Returns:
        [B, T, W].
    """
    attn, norm = block.attn, block.norm1
    n_BTW = F.layer_norm(x_BTW, norm.normalized_shape, eps=norm.eps)
    qkv = F.linear(n_BTW, attn.qkv.weight * norm.weight, attn.qkv.bias + attn.qkv.weight @ norm.bias)
    q_BHTE, k_BHTE, v_BHTE = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE)
    x_BTW = x_BTW + attn.proj(out_BHTE.transpose(1, 2).flatten(2))
    return x_BTW + block.mlp(block.norm2(x_BTW))


def first_row(block: Block, x_BTW: Tensor) -> Tensor:
    """A block's output at the first token alone, without keys and values.

    With one query q_h a head, q_h . (K_h n_t + c) = (K_h' q_h) . n_t + a number that softmax does not see, and
    sum_t a_t (V_h n_t + d) = V_h (sum_t a_t n_t) + d: products with H vectors a sample take the place of those with T tokens.

    Args:
        block: without stochastic depth.
        x_BTW: [B, T, W].

    Returns:
        [B, W].
    """
    attn = block.attn
    n_BTW = block.norm1(x_BTW)
    q_HEW, k_HEW, v_HEW = attn.qkv.weight.unflatten(0, (3, attn.num_heads, -1))
    q_HE, _, v_HE = attn.qkv.bias.unflatten(0, (3, attn.num_heads, -1))
    q_BHE = torch.einsum("bw,hew->bhe", n_BTW[:, 0], q_HEW) + q_HE
    asked_BHW = torch.einsum("bhe,hew->bhw", q_BHE * q_HE.shape[1] ** -0.5, k_HEW)
    seen_BHW = (asked_BHW @ n_BTW.mT).softmax(-1) @ n_BTW
    out_BHE = torch.einsum("bhw,hew->bhe", seen_BHW, v_HEW) + v_HE
    x_BW = x_BTW[:, 0] + attn.proj(out_BHE.flatten(1))
    return x_BW + block.mlp(block.norm2(x_BW))


def make_head(config: DecoderConfig) -> nn.Linear | CosineHead:
    """A head with drawn weights."""
    if config.head == "cosine":
        return CosineHead(config.width, config.num_classes, config.head_scale)
    return nn.Linear(config.width, config.num_classes)


def read_out(tower: Any) -> tuple[nn.LayerNorm | None, Tensor, Tensor]:
    """How an image tower takes its class token, or the mean of its places, to the embedding: norm(f) @ matrix + offset.

    Exact for a vision transformer's class token and an EfficientNet. Where the tower pools by place (a ConvNet with "flat", an
    attention pool) the mean over places stands in for what it weighs.

    Returns:
        The norm or None, the matrix [W, D], the offset [D]; copies.

    Raises:
        ValueError: there is no such matrix (a probe's pool, an MLP as head).
    """
    norm: nn.LayerNorm | None = None
    match getattr(tower, "trunk", tower):
        case VisionTransformer(pool=None) as trunk:
            norm, matrix_WD = copy.deepcopy(trunk.norm_post), _matrix(trunk.projection, trunk.config.width)
            offset_D = matrix_WD.new_zeros(matrix_WD.shape[1])
        case EfficientNet() as trunk:
            matrix_WD = _matrix(trunk.projection, trunk.config.num_features)
            offset_D = matrix_WD.new_zeros(matrix_WD.shape[1])
        case ModifiedResNet() as trunk:
            pool = trunk.attnpool
            matrix_WD, offset_D = (pool.proj.weight @ pool.v.weight).T, pool.proj(pool.v.bias)
        case ConvNet() as trunk:
            matrix_WD, offset_D = _read_out_convnet(trunk)
        case trunk:
            raise ValueError(f"no matrix takes the tokens of this {type(trunk).__name__} to the embedding: use init='random'")
    head = getattr(tower, "head", None) if hasattr(tower, "trunk") else None
    if isinstance(head, nn.Linear):
        matrix_WD, offset_D = matrix_WD @ head.weight.T, head(offset_D)
    elif head is not None and not isinstance(head, nn.Identity):
        raise ValueError("the image tower ends in a head that is no matrix: use init='random'")
    return norm, matrix_WD.detach().float().clone(), offset_D.detach().float().clone()


def _matrix(projection: Tensor | None, width: int) -> Tensor:
    return torch.eye(width) if projection is None else projection


def _read_out_convnet(tower: ConvNet) -> tuple[Tensor, Tensor]:
    """Batch norm as it is in evaluation, then the projection, summed over places."""
    norm = tower.norm
    assert norm.running_var is not None
    assert norm.running_mean is not None
    gain_P = norm.weight / (norm.running_var + norm.eps).sqrt()
    offset_D = (norm.bias - gain_P * norm.running_mean) @ tower.projection
    matrix_PD = gain_P[:, None] * tower.projection
    return matrix_PD.unflatten(0, (tower.config.widths[-1], -1)).sum(1), offset_D
