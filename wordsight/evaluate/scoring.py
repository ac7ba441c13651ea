"""What a picture and a text score with each other: an inner product, or what the model itself computes of the pair, in tiles.

Shape legend: N pictures, C texts, D embedding width, K vectors of one picture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wordsight.evaluate.metrics import Scores, score_block
from wordsight.evaluate.modes import judging
from wordsight.system import PairScorer

TILE_NUMBERS = 1 << 25  # pictures x texts x numbers kept of a picture that meet at once in a PairScorer: 128 MiB of float32


def pair_scores(model: Any) -> Scores:
    """The function (images [N, D] or [N, K, D], texts [C, D]) -> float32 [N, C] on the CPU by which `model` wants to be judged.

    Inner products of unit vectors, or the model's own `similarities` (`wordsight.system.PairScorer`) in tiles.
    """
    return partial(_in_tiles, model.similarities, model) if isinstance(model, PairScorer) else score_block


def from_texts(scores: Scores) -> Scores:
    """The same scores asked from the other side: (texts, images) -> [C, N]."""
    return score_block if scores is score_block else partial(_turned, scores)


def _turned(scores: Scores, texts: Tensor, images: Tensor) -> Tensor:
    return scores(images, texts).T


def _in_tiles(similarities: Callable[[Tensor, Tensor], Tensor], model: Any, images: Tensor, texts: Tensor) -> Tensor:
    """`similarities` of all pairs, a tile at a time; the tiles depend on the sizes alone."""
    pairs = max(1, TILE_NUMBERS // max(1, images[:1].numel()))
    columns = min(len(texts), max(1, int(pairs**0.5)))
    rows = max(1, pairs // max(1, columns))
    scores_NC = torch.empty(len(images), len(texts))
    with judging(model) as device:
        for i in range(0, len(images), rows):
            part = images[i : i + rows].to(device)
            for j in range(0, len(texts), columns):
                tile = similarities(part, texts[j : j + columns].to(device))
                if tile.shape != (len(part), len(texts[j : j + columns])):
                    raise ValueError(
                        f"{type(model).__name__}.similarities gave {tuple(tile.shape)} for {len(part)} pictures and "
                        f"{len(texts[j : j + columns])} texts: it must give one number a pair"
                    )
                scores_NC[i : i + rows, j : j + columns] = tile.float().cpu()
    if not torch.isfinite(scores_NC).all():
        raise ValueError(f"{type(model).__name__}.similarities gives infinite or undefined scores: they can not be ranked")
    return scores_NC
