"""A data set of 60 pictures of colours and shapes with captions, a small tokenizer, and a recipe that trains on them in a
second."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from wordsight.data.tokenize import train_tokenizer
from wordsight.models.contrastive.clip import CLIPConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.vit import ViTConfig
from wordsight.train.recipe import DataConfig, OptimConfig, Recipe

COLOURS = ("red", "green", "blue", "orange", "purple")
SHAPES = ("ellipse", "rectangle", "line")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 60 pictures of 24 px, each with two captions."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(60):
        colour, shape = COLOURS[i % 5], SHAPES[i % 3]
        image = Image.new("RGB", (24, 24), (250 - i, 250, 200 + i % 50))
        getattr(ImageDraw.Draw(image), shape)((2 + i % 7, 3, 20, 18 + i % 5), fill=colour)
        image.save(folder / f"{i:02d}.png")
        rows.append((f"{i:02d}.png", f"a {colour} {shape}", f"{shape}, number {i}"))
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "caption_2"), *rows])
    return folder / "pairs.csv"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 540 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"a {c} {s}" for c in COLOURS for s in SHAPES] + [f"{s}, number {i}" for s in SHAPES for i in range(60)]
    train_tokenizer(texts, 540).save(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(pairs: Path, tokenizer_folder: Path) -> Recipe:
    """12 steps of 10, patch dropout and stochastic depth, micro-batches, an average of the weights."""
    return Recipe(
        model=CLIPConfig(
            embed_dim=8,
            image=ViTConfig(
                image_size_px=16, patch_size_px=4, width=16, num_layers=2, num_heads=2, patch_dropout=0.5, stochastic_depth=0.2
            ),
            text=TextConfig(vocab_size=540, context_length=10, width=16, num_layers=2, num_heads=2),
        ),
        tokenizer=str(tokenizer_folder / "tokenizer.json"),
        data=DataConfig(sources=(str(pairs),)),
        optim=OptimConfig(lr=1e-2, warmup_steps=3, grad_clip=1.0),
        steps=12,
        batch_size=10,
        micro_batch_size=4,
        ema_decay=0.9,
        checkpoint_every_steps=3,
        checkpoint_every_s=None,
    )


@pytest.fixture(scope="session", autouse=True)
def _quick_report() -> Iterator[None]:
    """The report is drawn by another room and takes longer than these runs; tests/e2e has it whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wordsight.train.rundir.RunFolder.write_report", lambda self: self.write_text("report.html", "<p>quick"))
        yield
