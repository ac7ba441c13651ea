"""An epoch of the decoder from kept tokens beside one through the tower that made them, a ViT-B/16 with random weights.

Both sides read the same views of the same pictures and take the same steps; only where the tokens come from differs. What both
give is asserted equal first. `python -m benchmarks.token_cache --json OUT` writes the rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import wordsight
from benchmarks.peers import alternate, main, row
from wordsight.adapt.imbalanced import Schedule, step_loss, train
from wordsight.adapt.token_cache import Tokens, cache_tokens, tower_tokens
from wordsight.data import open_source
from wordsight.nn.decoder import DecoderConfig, TokenDecoder

NUM_PICTURES = 32
BATCH_SIZE = 16
NUM_CLASSES = 100
REPEATS = 2
MUST = 10.0
TOLERANCE = 1e-3  # of float16's tokens, over the largest


def read_epoch(tokens: Tokens) -> torch.Tensor:
    """The tokens of one random view of every picture, batch by batch; the last batch's."""
    for start in range(0, len(tokens), BATCH_SIZE):
        rows = np.arange(start, min(start + BATCH_SIZE, len(tokens)))
        batch = tokens.batch(rows, np.zeros(len(rows), np.int64))
    return batch


def train_epoch(tokens: Tokens, num_layers: int, precision: str) -> None:
    """One epoch of a new decoder."""
    decoder = TokenDecoder(DecoderConfig(width=tokens.width, num_classes=NUM_CLASSES, num_layers=num_layers))
    targets_N = torch.arange(len(tokens)) % NUM_CLASSES
    schedule = Schedule(steps=len(tokens) // BATCH_SIZE, batch_size=BATCH_SIZE, precision=precision)
    loss = step_loss("cross_entropy", torch.ones(NUM_CLASSES), steps=schedule.steps)
    train(decoder, tokens.batch, targets_N, loss, schedule, num_views=tokens.num_views)


EPOCHS: tuple[tuple[str, str, Callable[[Tokens], object]], ...] = (
    ("an epoch of ViT-B/16's tokens", "what the cache replaces", read_epoch),
    ("an epoch of a head on ViT-B/16", "0 blocks", partial(train_epoch, num_layers=0, precision="float32")),
    (
        "an epoch of the decoder on ViT-B/16, bfloat16",
        "3 blocks, learning in bfloat16 on both sides; the tower in float32, as models are loaded (in bfloat16 too, about 6 is "
        "to be expected)",
        partial(train_epoch, num_layers=3, precision="bfloat16"),
    ),
    (
        "an epoch of the decoder on ViT-B/16, float32",
        "3 blocks, whose learning both sides compute: by operations a fifth of the tower's pass, which bounds the ratio at 6.0",
        partial(train_epoch, num_layers=3, precision="float32"),
    ),
)


def run() -> list[dict]:
    """The rows for the table."""
    torch.manual_seed(0)
    model = wordsight.create("ViT-B/16")
    source = open_source("sample:train")
    pictures = [source[i * (len(source) // NUM_PICTURES)] for i in range(NUM_PICTURES)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kept = cache_tokens(model, pictures, folder, num_views=1)
        size_mb = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        through = tower_tokens(model, pictures, num_views=1)
        a, b = read_epoch(kept), read_epoch(through)
        difference = ((a - b).abs().max() / b.abs().max()).item()
        assert difference < TOLERANCE, f"tokens differ by {difference} of the largest"
        common = (
            f"processor seconds on one core, fastest of {REPEATS}, {NUM_PICTURES} pictures, a random view each, batch "
            f"{BATCH_SIZE}; float16, {size_mb / 2 / NUM_PICTURES:.2f} MB a view, error {kept.rms_error:.0e}"
        )
        for name, note, epoch in EPOCHS:
            best = alternate({"ours": partial(epoch, kept), "peer": partial(epoch, through)}, REPEATS)
            rows.append(row(f"{name}, from kept tokens", best["ours"], best["peer"], "s", MUST, f"{note}; {common}"))
    return rows


if __name__ == "__main__":
    main(run, __doc__)
