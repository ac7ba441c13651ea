"""A small Embedder that can be right or wrong on purpose, and pictures whose content it reads."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40), "grey": (128, 128, 128)}


class ColourModel(nn.Module):
    """Embeds a picture as its mean colour and a text as the colour words in it: a dual encoder whose answers are known."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(3))
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = None

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.tensor(list(image.resize((4, 4)).convert("RGB").getdata())).T.reshape(3, 4, 4) / 255.0 - 0.4

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        names = list(COLOURS)
        rows = [[i + 1 for i, name in enumerate(names) if name in text] + [0] * len(names) for text in texts]
        return torch.tensor([row[: len(names)] for row in rows])

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        assert not self.training
        return pixels.mean((2, 3)) @ self.mix

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        assert not torch.is_grad_enabled()
        table = torch.tensor([(0.0, 0.0, 0.0), *COLOURS.values()]) / 255.0 - 0.4
        table[0] = 0
        return table[tokens].sum(1) + 1e-3


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def model() -> ColourModel:
    return ColourModel()


@pytest.fixture
def colour_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make class folders `root/<colour>/<n>.png`; a wrong picture of blue lies among the reds on request."""

    def make(counts: dict[str, int], *, wrong: int = 0, name: str = "colours") -> Path:
        root = tmp_path / name
        for label, count in counts.items():
            (root / label).mkdir(parents=True)
            for i in range(count):
                colour = COLOURS["blue"] if label == "red" and i < wrong else COLOURS[label]
                (root / label / f"{i:02}.png").write_bytes(picture(colour, (20 + i, 16)))
        return root

    return make
