"""One training step of ViT-B/32 beside open_clip's: same weights, pictures, captions and AdamW; time and peak memory.

A step is forward, loss, backward, update. Both losses are asserted equal before anything is measured. Memory is the highest
resident size of a process that takes two steps, one for each side. `python -m benchmarks.train_step --json OUT` writes the rows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import alternate, captions, import_open_clip, main, our_model, peer_model, row
from wordsight.data.tokenize import ClipTokenizer
from wordsight.models.contrastive.clip import CLIP
from wordsight.train.speed import peak_memory
from wordsight.types import Batch

MODEL = "ViT-B/32"
BATCH_SIZE = 32
REPEATS = 3
MUST = 1.35
TOLERANCE = 1e-4  # of the two losses, about 3.5


def make_data() -> tuple[Tensor, Tensor]:
    """Random pixels, which cost what any cost, and real captions."""
    torch.manual_seed(0)
    return torch.randn(BATCH_SIZE, 3, 224, 224), ClipTokenizer.clip()(captions(BATCH_SIZE))


def our_step(model: CLIP, pixels: Tensor, tokens: Tensor, *, bf16: bool = False) -> Callable[[], Tensor]:
    """A function that takes one step and returns its loss."""
    ids = torch.arange(len(pixels))
    batch = Batch(pixels=pixels, tokens=tokens, text_ids=ids, image_ids=ids, keys=tuple(map(str, ids.tolist())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = model.loss(batch)["contrastive"].value
        loss.backward()
        optimizer.step()
        model.clamp_()
        return loss.detach()

    return step


def peer_step(model: torch.nn.Module, pixels: Tensor, tokens: Tensor, *, bf16: bool = False) -> Callable[[], Tensor]:
    """The same with open_clip's model and loss."""
    criterion = import_open_clip().ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = criterion(*model(pixels, tokens))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss.detach()

    return step


def bf16_missing() -> str | None:
    """Why bf16 is not worth a measurement here, or None if the processor has instructions for it."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return None
    return "not measured: this processor has neither avx512_bf16 nor amx_bf16, so bf16 products are emulated"


def measure_time(precision: str) -> dict:
    """Seconds a step, both sides in turns."""
    name = f"training step, {MODEL}, batch {BATCH_SIZE}, {precision}"
    if precision == "bf16" and (reason := bf16_missing()):
        return {"name": name, "ours": None, "peer": None, "ratio": None, "unit": "s", "must": MUST, "note": reason}
    pixels, tokens = make_data()
    peer = peer_model(MODEL)
    ours = our_model(MODEL, peer)
    bf16 = precision == "bf16"
    steps = {"ours": our_step(ours, pixels, tokens, bf16=bf16), "peer": peer_step(peer, pixels, tokens, bf16=bf16)}
    first = {side: step().item() for side, step in steps.items()}
    assert abs(first["ours"] - first["peer"]) < (0.05 if bf16 else TOLERANCE), f"the losses differ: {first}"
    best = alternate(steps, REPEATS)
    lengths = (tokens.argmax(1) + 1).tolist()
    captions_note = f"captions of {min(lengths)} to {max(lengths)} tokens, {sum(lengths) / BATCH_SIZE:.0f} on average"
    note = f"one core, fastest of {REPEATS}; {captions_note}"
    return row(name, best["ours"], best["peer"], "s", MUST, note)


def measure_memory() -> dict:
    """Highest resident size, a process for each side."""
    peaks = {}
    for side in ("ours", "peer"):
        code = f"from benchmarks.train_step import peak_memory_mb; print(peak_memory_mb({side!r}))"
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        peaks[side] = float(output.split()[-1])
    name = f"peak memory of the training step, {MODEL}, batch {BATCH_SIZE}, fp32"
    return row(name, peaks["ours"], peaks["peer"], "MB", 1.0, "highest resident size of the process")


def peak_memory_mb(side: str) -> float:
    """Take two steps and return this process's highest resident size; both sides import the same libraries."""
    import_open_clip()
    data = make_data()
    step = our_step(our_model(MODEL), *data) if side == "ours" else peer_step(peer_model(MODEL), *data)
    for _ in range(2):
        step()
    return peak_memory(torch.device("cpu")) / 2**20


def run() -> list[dict]:
    """The rows for the table."""
    return [measure_memory(), measure_time("fp32"), measure_time("bf16")]


if __name__ == "__main__":
    main(run, __doc__)
