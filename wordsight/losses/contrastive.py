"""InfoNCE between two sets of embeddings (CPC, arXiv 1807.03748; ConVIRT, arXiv 2010.00747; CLIP, arXiv 2103.00020, figure 3).

Shape legend: B batch, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(image: Tensor, text: Tensor, log_scale: Tensor, *, positives: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE: the mean over rows of -log softmax(exp(log_scale) image text') at the true pair, both ways, halved.

    Logits and softmax are float32 (or wider, if the embeddings are) under autocast too. With every pair equally likely the loss
    is log B.

    Args:
        image: [B, D], L2-normalised.
        text: [B, D], L2-normalised; row i belongs to row i of `image`.
        log_scale: scalar, log of the inverse temperature.
        positives: bool [B, B], [i, j] true where text j is right for image i; each row's target is then spread evenly over its
            true columns (and each column's over its true rows). If None, the diagonal.

    Returns:
        Scalar, nats, mean over the 2 B rows and columns.
    """
    dtype = torch.promote_types(image.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        logits_BB = log_scale.to(dtype).exp() * image.to(dtype) @ text.to(dtype).T
        if positives is None:
            target_B = torch.arange(len(logits_BB), device=logits_BB.device)
            return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2
        to_text_BB, to_image_BB = positives.to(dtype), positives.T.to(dtype)
        to_text = F.cross_entropy(logits_BB, to_text_BB / to_text_BB.sum(1, keepdim=True))
        to_image = F.cross_entropy(logits_BB.T, to_image_BB / to_image_BB.sum(1, keepdim=True))
        return (to_text + to_image) / 2


def same_pair(text_ids: Tensor, image_ids: Tensor) -> Tensor:
    """Which text is right for which image, where a batch repeats itself: bool [B, B].

    Text j is right for image i if it is the same text as text i, or if its own image is the same picture as image i. The diagonal
    is always true and the relation is symmetric.

    Args:
        text_ids: int64 [B], equal exactly where two texts are the same.
        image_ids: int64 [B], equal exactly where two images are the same.
    """
    return (text_ids[:, None] == text_ids) | (image_ids[:, None] == image_ids)
