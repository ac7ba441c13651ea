"""The tiled contrastive losses beside the plain ones: time, memory and the curve over batch sizes, at width 512 in float32.

"Plain" is what everybody writes: the [B, B] matrix, two cross entropies, autograd. "Four products" are the bare matrix products
that a method which holds no matrix needs (logits twice, two gradients), in the same tiles and nothing else. Memory is the
high-water mark of a process's resident size above what it has with the features and their gradients in place. The last row is a
whole training step of a ViT-tiny at 64 px with a global batch of 16,384 pairs, by gradient caching. Wall-clock time in all
threads: run it on an idle machine. `python -m benchmarks.contrastive_loss --json OUT` writes the rows.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import main
from wordsight.losses.contrastive import TILE, info_nce, sigmoid
from wordsight.train.speed import peak_memory

WIDTH = 512
LARGE, PLAIN = 32_768, 8_192
CURVE = tuple(1024 * 2**i for i in range(7))  # 1k to 64k
PLAIN_UP_TO = 16_384  # 1 GB for each copy of the matrix, of which autograd holds several
GLOBAL_BATCH, MICRO_BATCH = 16_384, 64


def make_inputs(batch: int) -> list[Tensor]:
    """Features and the scale (and the bias), with gradients in place."""
    g = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(batch, WIDTH, generator=g), dim=-1) for _ in range(2)]
    inputs = [*features, torch.tensor(math.log(1 / 0.07)), torch.tensor(-10.0)]
    for tensor in inputs:
        tensor.requires_grad_().grad = torch.zeros_like(tensor)
    return inputs


def loss_and_backward(loss: str, batch: int, tile: int | None) -> Callable[[], None]:
    """One forward and backward pass of a loss."""
    inputs = make_inputs(batch)

    def step() -> None:
        value = info_nce(*inputs[:3], tile=tile) if loss == "info_nce" else sigmoid(*inputs, tile=tile)
        value.backward()

    return step


def four_products(batch: int) -> Callable[[], None]:
    """Logits, logits again, and the two products that bring the gradients to the features, tile by tile."""
    image, text = (tensor.detach() for tensor in make_inputs(batch)[:2])
    at_image, at_text = torch.zeros_like(image), torch.zeros_like(text)

    def step() -> None:
        for top in range(0, batch, TILE):
            for left in range(0, batch, TILE):
                rows, columns = slice(top, top + TILE), slice(left, left + TILE)
                torch.mm(image[rows], text[columns].T)
                tile = torch.mm(image[rows], text[columns].T)
                at_image[rows].addmm_(tile, text[columns])
                at_text[columns].addmm_(tile.T, image[rows])

    return step


def seconds(step: Callable[[], None], least_s: float = 2.0) -> float:
    """The fastest of the calls that fit into `least_s`, at least one, after a first that does not count if it was short."""
    best, began = math.inf, time.perf_counter()
    while True:
        start = time.perf_counter()
        step()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - began > least_s:
            return best


def memory_above_features(loss: str, batch: int) -> int:
    """Bytes, in a process of its own."""
    code = f"import benchmarks.contrastive_loss as b; print(b.report_memory({loss!r}, {batch}))"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def report_memory(loss: str, batch: int) -> int:
    """What `memory_above_features` asks a process: a small loss first, so that the libraries' own memory is there before."""
    loss_and_backward(loss, 4 * TILE, None)()
    step = loss_and_backward(loss, batch, None)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    step()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the high-water mark (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def training_step() -> dict:
    """Seconds of one update at the global batch, and the process's high-water mark: measured in a process of its own."""
    code = "import benchmarks.contrastive_loss as b; print(*b.report_training_step())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    taken, resident, loss = done.stdout.split()
    note = (
        f"ViT-tiny 12 x 192, patches of 16, text 12 x 192; micro-batches of {MICRO_BATCH}; {float(taken):.0f} s a step, loss "
        f"{float(loss):.2f} (log B = {math.log(GLOBAL_BATCH):.2f}); peer: the limit"
    )
    return _row(f"training step, global batch {GLOBAL_BATCH:,}: resident", int(resident) / 1e9, 4.0, "GB", 1.0, note)


def report_training_step() -> tuple[float, int, float]:
    """Seconds, bytes, loss."""
    from wordsight.models.contrastive.clip import CLIP, CLIPConfig
    from wordsight.nn.text import TextConfig
    from wordsight.nn.vit import ViTConfig
    from wordsight.train.step import Stepper
    from wordsight.types import Batch

    torch.manual_seed(0)
    image = ViTConfig(image_size_px=64, patch_size_px=16, width=192, num_layers=12, num_heads=3, patch_dropout=0.25)
    text = TextConfig(vocab_size=4096, context_length=20, width=192, num_layers=12, num_heads=3)
    system = CLIP(CLIPConfig(embed_dim=WIDTH, image=image, text=text)).train()
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-4)
    tokens = torch.randint(1, 4094, (GLOBAL_BATCH, 20))
    tokens[:, 8] = 4095
    ids = torch.arange(GLOBAL_BATCH)
    pixels = torch.randint(0, 256, (GLOBAL_BATCH, 3, 64, 64), dtype=torch.uint8)
    batch = Batch(pixels=pixels, tokens=tokens, text_ids=ids, image_ids=ids, keys=("",) * GLOBAL_BATCH)
    stepper = Stepper(
        system, micro_batch_size=MICRO_BATCH, prepare=lambda part, draws: replace(part, pixels=part.pixels.float() / 127.5 - 1)
    )
    began = time.perf_counter()
    loss = stepper.backward(batch, 1)
    optimizer.step()
    return time.perf_counter() - began, peak_memory(torch.device("cpu")), loss.total.item()


def run() -> list[dict]:
    """All rows; about ten minutes."""
    rows = []
    for loss in ("info_nce", "sigmoid"):
        used = memory_above_features(loss, LARGE) / 1e9
        note = "loss and backward, above the features and their gradients; peer: the limit"
        rows.append(_row(f"{loss}, B = {LARGE:,}: memory", used, 0.3, "GB", 1.0, note))
    bare = seconds(four_products(LARGE))
    for loss in ("info_nce", "sigmoid"):
        tiled = {batch: seconds(loss_and_backward(loss, batch, TILE)) for batch in CURVE if loss == "info_nce" or batch <= LARGE}
        plain = {batch: seconds(loss_and_backward(loss, batch, 0)) for batch in CURVE if batch <= PLAIN_UP_TO}
        per_pair = tiled[LARGE] / LARGE**2, plain[PLAIN] / PLAIN**2
        note = f"nanoseconds a pair of pairs; the plain version at B = {PLAIN:,}, whose matrix still fits"
        rows.append(_row(f"{loss}, B = {LARGE:,}: time a pair", per_pair[0] * 1e9, per_pair[1] * 1e9, "ns", 1.7, note))
        note = "peer: the four bare products in the same tiles; at most 1.35 times their time is a ratio of .74"
        if loss == "sigmoid":
            note += "; it needs three in one process"
        rows.append(_row(f"{loss}, B = {LARGE:,}: beside four products", tiled[LARGE], bare, "s", 1 / 1.35, note))
        for batch in CURVE:
            if batch in tiled:
                peer = plain.get(batch)
                note = "peer: plain" if peer else "plain: too large"
                rows.append(_row(f"{loss}, B = {batch:,}", tiled[batch], peer, "s", None, note))
    rows.append(training_step())
    return rows


def _row(name: str, ours: float, peer: float | None, unit: str, must: float | None, note: str) -> dict:
    """A row in which less is better."""
    ratio = None if peer is None else peer / ours
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "must": must, "note": note}


if __name__ == "__main__":
    main(run, "The tiled contrastive losses.")
