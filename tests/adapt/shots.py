"""Features of a few pictures a class, and a small dual encoder whose texts fit them: what the estimators' tests share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NAMES = ("wolf", "ant", "bee", "cow", "eel")
WIDTH = 24


def directions(width: int = WIDTH, num_classes: int = len(NAMES)) -> np.ndarray:
    """What the classes look like: [C, D], in the order of sorted names."""
    return np.random.default_rng(7).normal(size=(num_classes, width))


def shots(num: int, *, seed: int = 0, noise: float = 1.0, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """`num` pictures of each class, shuffled: float32 features [N, D], not of unit length, and their names."""
    draw = np.random.default_rng(seed)
    targets = draw.permutation(np.repeat(np.arange(len(NAMES)), num))
    features = 4 * (directions(width)[targets] + noise * draw.normal(size=(len(targets), width)))
    return features.astype(np.float32), np.array(sorted(NAMES))[targets]


class TinyEmbedder(nn.Module):
    """An Embedder of words: a text's vector is the sum over its words, a class name's word near its pictures' direction."""

    def __init__(self, width: int = WIDTH, *, text_noise: float = 0.8, log_scale: float = 3.0) -> None:
        super().__init__()
        words = torch.tensor(directions(width))
        noise = torch.tensor(np.random.default_rng(8).normal(size=words.shape))
        self.words = nn.Parameter((3 * (words + text_noise * noise)).float())
        self.other = nn.Parameter(0.2 * torch.ones(width))
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.logit_bias = None
        self.provenance = {"prompts": "simple"}
        self.preprocessor = SimpleNamespace(to_config=lambda: {"side": 1})
        self.tokenizer = SimpleNamespace(to_config=lambda: {"words": len(NAMES)})

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        raise AssertionError("these tests have features, no pictures")

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        table = torch.cat([self.other[None], self.words])
        vectors = table[tokens].sum(1)
        return nn.functional.normalize(vectors, dim=1) if normalize else vectors

    def preprocess(self, image: Any) -> Tensor:
        raise AssertionError("these tests have features, no pictures")

    def tokenize(self, texts: Any) -> Tensor:
        names = sorted(NAMES)
        rows = [[names.index(word) + 1 if word in names else 0 for word in text.strip(".").split()[-4:]] for text in texts]
        return torch.tensor([[0] * (4 - len(row)) + row for row in rows])
