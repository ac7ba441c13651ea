"""Learned position embeddings carried over to another resolution.

Shape legend: T tokens, W width, P prefix tokens (the class token), Gh x Gw grid of patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(position_embedding: Tensor, grid: tuple[int, int], *, num_prefix: int = 1) -> Tensor:
    """Interpolate a square grid of position embeddings to another grid (bicubic, antialiased); the prefix stays as it is.

    ViT (arXiv 2010.11929, section 3.2) interpolates at fine-tuning; CLIP's attention pool (arXiv 2103.00020) has the same layout.

    Args:
        position_embedding: [P + G * G, W], of any float dtype.
        grid: (Gh, Gw), the patches of the new resolution.
        num_prefix: P, how many first rows belong to no patch.

    Returns:
        [P + Gh * Gw, W], of the dtype given; the very same tensor if the grid is the same.

    Raises:
        ValueError: if the rows after the prefix are not a square grid.
    """
    num_patches = position_embedding.shape[0] - num_prefix
    side = round(max(num_patches, 0) ** 0.5)
    if num_patches < 1 or side * side != num_patches:
        raise ValueError(
            f"{position_embedding.shape[0]} positions less {num_prefix} prefix rows are not a square grid; "
            "pass the num_prefix that the tower has (1 for a class token or an attention pool's mean)"
        )
    if grid == (side, side):
        return position_embedding
    prefix_PW, patches_TW = position_embedding.split([num_prefix, num_patches])
    image_1WGG = patches_TW.to(torch.promote_types(patches_TW.dtype, torch.float32)).T.reshape(1, -1, side, side)
    resized_1WGG = F.interpolate(image_1WGG, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix_PW, resized_1WGG.flatten(2)[0].T.to(patches_TW.dtype)])
