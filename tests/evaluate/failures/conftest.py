"""Models whose answers are known: one that is told the truth, any scores one likes, and random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from wordsight.evaluate.failures import Item


class Scorer(nn.Module):
    """A PairScorer that scores the identity of a picture and the text itself.

    Args:
        score: (hash of the picture, text) -> score.
    """

    def __init__(self, score: Callable[[bytes, str], float]) -> None:
        super().__init__()
        self.score = score
        self.pictures: list[bytes] = []
        self.texts: list[str] = []

    def _place(self, known: list[Any], thing: Any) -> int:
        if thing not in known:
            known.append(thing)
        return known.index(thing)

    def preprocess(self, image: Image.Image) -> Tensor:
        digest = hashlib.sha256(image.tobytes()).digest()
        return torch.full((3, 1, 1), float(self._place(self.pictures, digest)))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[self._place(self.texts, text)] for text in texts])

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        return pixels[:, 0, 0, :1]

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        return tokens.float()

    def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
        rows = [[self.score(self.pictures[int(i)], self.texts[int(t)]) for t in texts[:, 0]] for i in images[:, 0]]
        return torch.tensor(rows)


def oracle(items: Iterable[Item]) -> Scorer:
    """A model that scores what belongs together 1 and all else 0."""
    truth = set()
    for item in items:
        digests = [hashlib.sha256(picture().tobytes()).digest() for picture in item.pictures]
        if item.is_group:
            truth |= {(digests[k], item.texts[k]) for k in (0, 1)}
        elif len(item.texts) == 1:
            truth.add((digests[item.right[0]], item.texts[0]))
        else:
            truth.add((digests[0], item.texts[item.right[0]]))
    return Scorer(lambda picture, text: float((picture, text) in truth))


class RandomModel(nn.Module):
    """A small dual encoder with random weights: convolutions over 32 pixels, and a bag of letters in their order."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.look = nn.Sequential(
            nn.Conv2d(3, 16, 5, 3), nn.GELU(), nn.Conv2d(16, 32, 3, 2), nn.GELU(), nn.Flatten(), nn.LazyLinear(32)
        )
        self.letters = nn.Embedding(128, 32)
        self.read = nn.GRU(32, 32, batch_first=True)
        with torch.no_grad():
            self.look(torch.zeros(1, 3, 32, 32))

    def preprocess(self, image: Image.Image) -> Tensor:
        small = image.resize((32, 32), Image.Resampling.BILINEAR)
        return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(32, 32, 3).permute(2, 0, 1) / 127.5 - 1

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[ord(letter) % 128 for letter in text.ljust(64)[:64]] for text in texts])

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        return self.look(pixels)

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        return self.read(self.letters(tokens))[0].mean(1)


@pytest.fixture
def random_model() -> Callable[[int], RandomModel]:
    return RandomModel
