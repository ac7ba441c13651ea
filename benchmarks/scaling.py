"""What the contrastive loss sends and holds over several processes: formulas, checked against 2 and 3 processes of this machine.

`python -m benchmarks.scaling --json OUT` measures bytes sent and memory of the ring and of gathering, beside the formulas of this
file; `python -m benchmarks.scaling --plan` prints docs/scaling.md's tables for 8, 64 and 512 GPUs from the same formulas.

Symbols: N processes, b pairs a process, D width of an embedding, s bytes of a number as it is sent, t side of a tile, P
parameters.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contrastive_loss import resident
from benchmarks.peers import main
from wordsight.losses.contrastive import TILE, info_nce
from wordsight.losses.ring import Ring
from wordsight.train.distributed import World

ROWS, WIDTH = 4_096, 512


def ring_bytes_sent(n: int, b: int, d: int, s: int = 4) -> float:
    """Bytes that a process sends for one loss and its gradient: texts out in both passes, their sums and gradients all the way
    home.

    Forward: N - 1 times the block (b D s, and a byte a text that says whether it is right for any image), N times its 4 sums a
    text. Backward: N - 1 times the block with 3 numbers a text, N times its gradient. Sums and gradients are float32.
    """
    block = b * d * s + b
    return (n - 1) * block + n * b * 4 * 4 + (n - 1) * (block + b * 3 * 4) + n * b * d * 4


def gather_bytes_received(n: int, b: int, d: int, s: int = 4) -> float:
    """Bytes that a process receives to hold everyone's images and texts; nothing is sent back."""
    return (n - 1) * 2 * b * d * s


def ring_memory(n: int, b: int, d: int, t: int = TILE, s: int = 4) -> float:
    """Bytes above the own features and their gradients, at the worst moment of the backward pass.

    The gradient of the rows, of the own texts on their way home and of those that visit (3 b D float32), one more b D while both
    are added, the block at hand if it is a visitor's and the one that is coming (2 b D s), and three tiles.
    """
    blocks = 0 if n == 1 else 2 if n > 2 else 1
    return (4 if n > 1 else 2) * b * d * 4 + blocks * b * d * s + 3 * t * t * 4


def gather_memory(n: int, b: int, d: int, t: int = TILE, s: int = 4) -> float:
    """Bytes above the own features: everyone's images and texts, the float32 sums of their gradients, and those as they are sent
    where that is another type; three tiles.
    """
    return 2 * n * b * d * (s + 4 + (s if s != 4 else 0)) + 3 * t * t * 4


def ddp_bytes_sent(n: int, parameters: float, s: int = 4) -> float:
    """A ring all-reduce of the gradients."""
    return 2 * (n - 1) / n * parameters * s


def fsdp_bytes_sent(n: int, parameters: float, s: int = 2, passes: int = 2) -> float:
    """All-gather of the weights in each forward and backward pass, reduce-scatter of the gradients (float32)."""
    return (n - 1) / n * parameters * (passes * s + 4)


class CountingRing(Ring):
    """A ring that counts what this process sends."""

    sent = 0

    def _exchange(self, tensors: Sequence[Tensor], rows: int, first_tag: int) -> Any:
        self.sent += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return super()._exchange(tensors, rows, first_tag)


def _measure(rank: int, n: int, port: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=n)
    try:
        found: dict[str, float] = {}
        for exchange in ("ring", "gather"):
            for rows in (256, ROWS):  # the first, so that the libraries' own memory is there before
                g = torch.Generator().manual_seed(rank)
                image, text = (F.normalize(torch.randn(rows, WIDTH, generator=g), dim=-1).requires_grad_() for _ in range(2))
                image.grad, text.grad = torch.zeros_like(image), torch.zeros_like(text)
                ring = CountingRing()
                before = resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")
                if exchange == "ring":
                    info_nce(image, text, torch.tensor(2.66), ring=ring).backward()
                else:
                    world = World(rank, n)
                    both = [world.gather_rows(tensor, [rows] * n).requires_grad_() for tensor in (image, text)]
                    info_nce(*both, torch.tensor(2.66), tile=TILE).backward()
                found[f"{exchange} memory"] = resident("VmHWM") - before
                found[f"{exchange} sent"] = ring.sent
                dist.barrier()
        results[rank] = found
    finally:
        dist.destroy_process_group()


def measure(n: int) -> list[dict[str, float]]:
    """Bytes of every one of `n` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # what is freed leaves the process at once: no slack of the allocator's is counted
    )
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_measure, args=(n, port, results), nprocs=n)  # type: ignore[no-untyped-call]
        return [results[rank] for rank in range(n)]


def run() -> list[dict]:
    """Measured against the formulas."""
    rows = []
    for n in (2, 3):
        found = measure(n)
        sent, least = found[0]["ring sent"], ring_bytes_sent(n, ROWS, WIDTH)
        note = f"{ROWS:,} pairs of width {WIDTH} a process, float32; peer: the formula; equal on all processes"
        assert {f["ring sent"] for f in found} == {sent}
        rows.append(_row(f"ring of {n}: sent by a process", sent / 1e6, least / 1e6, note))
        for exchange, formula in (("ring", ring_memory), ("gather", gather_memory)):
            worst = max(f[f"{exchange} memory"] for f in found)
            note = "the worst process, above its features and their gradients; peer: the formula"
            rows.append(_row(f"{exchange} of {n}: memory", worst / 1e6, formula(n, ROWS, WIDTH) / 1e6, note))
    return rows


def _row(name: str, ours: float, peer: float, note: str) -> dict:
    return {"name": name, "ours": ours, "peer": peer, "ratio": peer / ours, "unit": "MB", "must": None, "note": note}


def plan() -> str:
    """The tables of docs/scaling.md."""
    width, parameters = 768, 427_616_513  # ViT-L/14
    titles = ("GPUs", "Batch", "Pairs a GPU", "Plain matrix", "Gather: memory", "Ring: memory")
    titles += ("Gather: received", "Ring: sent", "DDP: sent", "FSDP2: sent")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for n in (8, 64, 512):
        for batch in (32_768, 65_536, 131_072):
            b = batch // n
            figures = (
                batch**2 * 4,
                gather_memory(n, b, width, s=2),
                ring_memory(n, b, width, s=2),
                gather_bytes_received(n, b, width, s=2),
                ring_bytes_sent(n, b, width, s=2),
                ddp_bytes_sent(n, parameters),
                fsdp_bytes_sent(n, parameters, passes=3),
            )
            lines.append(f"| {n} | {batch:,} | {b:,} | " + " | ".join(f"{value / 1e9:.3g} GB" for value in figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--plan" in sys.argv:
        print(plan())
    else:
        main(run, "What the contrastive loss sends and holds over several processes.")
