"""What fine-tuning needs of an image tower: a twin that shares what stands still, its parts from first to last, a head.

Shape legend: B batch, S image side in pixels, F features that the projection reads, D embedding width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wordsight.nn.convnet import ConvNet
from wordsight.nn.efficientnet import EfficientNet
from wordsight.nn.resnet import ModifiedResNet
from wordsight.nn.transformer import Block
from wordsight.nn.vit import VisionTransformer

FIRST = ("patch_embed", "class_token", "position_embedding", "norm_pre", "stem")  # what stands before a trunk's parts


class SimilarityHead(nn.Module):
    """z_c = scale w_c f / |f| + b_c; as a cosine head z_c = scale cos(w_c, f), without b.

    With the texts' unit vectors as rows and the model's scale both are its zero-shot classifier.

    Attributes:
        weight: [C, D]; unit vectors of drawn directions at first.
        bias: [C], 0 at first, or None.
        scale: does not learn.
    """

    def __init__(self, width: int, num_classes: int, scale: float, *, cosine: bool) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, width), dim=1))
        self.bias = None if cosine else nn.Parameter(torch.zeros(num_classes))

    def forward(self, features_BD: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        features_BD = F.normalize(features_BD, dim=1)
        if self.bias is None:
            return self.scale * F.linear(features_BD, F.normalize(self.weight, dim=1))
        return self.scale * F.linear(features_BD, self.weight) + self.bias


def share_tower(tower: nn.Module, learns: Callable[[str], bool]) -> nn.Module:
    """A twin of a tower, in evaluation mode, that may learn in part while the tower stays as it is.

    Args:
        tower: not changed.
        learns: whether the parameter of that name is a copy that takes a gradient. All others, and all buffers, lie in the
            tower's own memory, and take none.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in tower.buffers()}
    for name, parameter in tower.named_parameters():
        value = parameter.detach()
        memo[id(parameter)] = nn.Parameter(value.clone() if learns(name) else value, requires_grad=learns(name))
    twin = copy.deepcopy(tower, memo)
    if hasattr(twin, "locked"):  # a locked trunk keeps nothing for a backward pass
        twin.locked = False  # type: ignore[assignment]  # a plain attribute that nn.Module's types know nothing of
    return twin.eval()


def tower_parts(tower: nn.Module) -> list[tuple[str, ...]]:
    """The parts of a tower that can learn from the last one on, first to last: each the names that its parameters begin with.

    A vision transformer's parts are its blocks, a convolutional tower's its stages.

    Raises:
        ValueError: an unknown tower.
    """
    own = "trunk." if hasattr(tower, "trunk") else ""
    match getattr(tower, "trunk", tower):
        case VisionTransformer() as trunk:
            return [(f"{own}blocks.{i}.",) for i in range(len(trunk.blocks))]
        case ModifiedResNet() | ConvNet() as trunk:
            return [(f"{own}stages.{i}.",) for i in range(len(trunk.stages))]
        case EfficientNet() as trunk:
            ends = [sum(trunk.config.num_blocks[: i + 1]) for i in range(len(trunk.config.num_blocks))]
            starts = [0, *ends[:-1]]
            return [tuple(f"{own}blocks.{i}." for i in range(a, b)) for a, b in zip(starts, ends, strict=True)]
        case trunk:
            raise ValueError(f"a {type(trunk).__name__} has no known parts to fine-tune: use part='full'")


def behind(tower: nn.Module, num_parts: int) -> Callable[[str], bool]:
    """Whether a parameter of that name is of a tower's last parts, or of what stands behind them (norm, pool, projection).

    Raises:
        ValueError: not 1 to all of the tower's parts.
    """
    parts = tower_parts(tower)
    if not 1 <= num_parts <= len(parts):
        raise ValueError(f"last_blocks must be 1 to {len(parts)}, the blocks or stages of this image tower, got {num_parts}")
    own = "trunk." if hasattr(tower, "trunk") else ""
    before = (*(own + name for name in FIRST), *(name for part in parts[: len(parts) - num_parts] for name in part))
    return lambda name: not name.startswith(before)


def transformer_blocks(tower: nn.Module, what: str) -> list[Block]:
    """The blocks of a vision transformer.

    Raises:
        ValueError: another tower, for which there is no `what`.
    """
    trunk = getattr(tower, "trunk", tower)
    if not isinstance(trunk, VisionTransformer):
        raise ValueError(
            f"{what} changes the blocks of a vision transformer, and this image tower, of type {type(trunk).__name__}, has none: "
            "use part='full' or 'last'"
        )
    return [block for block in trunk.blocks if isinstance(block, Block)]


def projection_names(tower: nn.Module) -> tuple[str, ...]:
    """What the names begin with of the parameters that `last_projection` reads."""
    if hasattr(tower, "trunk"):
        return ("head.",)
    return ("attnpool.proj.",) if isinstance(tower, ModifiedResNet) else ("projection",)


def last_projection(tower: Any) -> tuple[Tensor, Tensor | None]:
    """How a tower takes its penultimate features to the embedding, exactly: f @ matrix + offset.

    Returns:
        The matrix [F, D] and the offset [D] or None; float32 copies on the CPU.

    Raises:
        ValueError: it ends in a head of several layers.
    """
    offset_D: Tensor | None = None
    if hasattr(tower, "trunk"):
        if isinstance(tower.head, nn.Linear):
            matrix_FD, offset_D = tower.head.weight.T, tower.head.bias
        elif isinstance(tower.head, nn.Identity):
            matrix_FD = torch.eye(tower.trunk.config.num_features)
        else:
            raise ValueError(
                "the image tower ends in a head of several layers, not in one matrix: use fine_tune with part='full'"
            )
    elif isinstance(tower, ModifiedResNet):
        matrix_FD, offset_D = tower.attnpool.proj.weight.T, tower.attnpool.proj.bias
    else:
        matrix_FD = torch.eye(tower.config.num_features) if tower.projection is None else tower.projection
    offset_D = None if offset_D is None else offset_D.detach().float().cpu().clone()
    return matrix_FD.detach().float().cpu().clone(), offset_D
