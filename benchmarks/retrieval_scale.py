"""Retrieval in both directions beside the bare matrix products of one pass, on random unit vectors; and the memory that it takes.

`rank_both` gives every rank of every picture among all texts and of every text among all pictures, exactly. The peer computes
the same tiles of scores in float32 and throws them away: nobody can be faster. Random vectors are the hard case: their right
scores lie amid all others, where most scores are open within the products' error. Both are measured in processor seconds on one
thread, the peer one half before and one half after, so that what runs beside matters little; all of it goes on several threads.

`python -m benchmarks.retrieval_scale --json OUT` writes the rows. WORDSIGHT_RETRIEVAL_SHARE=1 takes all 100,000 pictures
(twenty minutes of one core), by default a fifth of them; the texts are always 500,000.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.peers import main, row
from wordsight.evaluate.metrics import rank_queries
from wordsight.evaluate.ranking import rank_both

NUM_PICTURES, NUM_TEXTS, WIDTH = 100_000, 500_000, 512
SHARE = float(os.environ.get("WORDSIGHT_RETRIEVAL_SHARE", "0.2"))  # of the pictures
BLOCKS = (1024, 8192)  # as rank_both's
MUST = 1 / 1.6
MEMORY_GB = 4.0
CHECKED = 64  # pictures and texts whose ranks are compared with those in float64


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, texts and whose each text is: as many a picture as all of the texts give."""
    torch.manual_seed(0)
    num_pictures = round(NUM_PICTURES * SHARE)
    images_ND, texts_MD = torch.empty(num_pictures, WIDTH), torch.empty(NUM_TEXTS, WIDTH)
    for vectors in (images_ND, texts_MD):
        for part in vectors.split(8192):
            part.copy_(normalize(torch.randn(len(part), WIDTH), dim=1))
    return images_ND, texts_MD, torch.arange(NUM_TEXTS) % num_pictures


def products_s(blocks: Sequence[Tensor], texts_MD: Tensor) -> float:
    """Processor seconds of the tiles of scores alone."""
    tile = torch.empty(BLOCKS[0] * BLOCKS[1])
    start = time.process_time()
    for images in blocks:
        for texts in texts_MD.split(BLOCKS[1]):
            torch.mm(images, texts.T, out=tile[: len(images) * len(texts)].view(len(images), len(texts)))
    return time.process_time() - start


def resident_gb() -> float | None:
    """The largest resident size that this process has had; None where the system does not say it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024 / 1e9


def run() -> list[dict]:
    """The rows for the table."""
    torch.set_num_threads(1)
    images_ND, texts_MD, owners_M = data()
    pictures_N = torch.arange(len(images_ND))
    blocks = images_ND.split(BLOCKS[0])
    peer_s = products_s(blocks[::2], texts_MD)
    start = time.process_time()
    to_text, to_image = rank_both(images_ND, texts_MD, pictures_N, owners_M)
    ours_s = time.process_time() - start
    memory_gb = resident_gb()
    peer_s += products_s(blocks[1::2], texts_MD)
    expected = rank_queries(images_ND[:CHECKED], texts_MD, pictures_N[:CHECKED], owners_M)
    assert (to_text.ranks[:CHECKED] == expected.ranks).all(), "ranks differ from those in float64"
    expected = rank_queries(texts_MD[:CHECKED], images_ND, owners_M[:CHECKED], pictures_N)
    assert (to_image.ranks[:CHECKED] == expected.ranks).all(), "ranks differ from those in float64"
    name = f"retrieval, {len(images_ND):,} pictures x {NUM_TEXTS:,} texts"
    note = (
        f"both directions, every rank exact, D = {WIDTH}; processor seconds on one thread; peer: the float32 products of one pass"
    )
    rows = [row(name, ours_s, peer_s, "s", MUST, note)]
    if memory_gb is not None:
        held_gb = (images_ND.numel() + texts_MD.numel()) * 4 / 1e9
        note = f"the largest resident size, with the vectors ({held_gb:.2f} GB) and PyTorch itself; peer: the limit"
        rows.append(row(f"{name}, memory", memory_gb, MEMORY_GB, "GB", 1.0, note))
    return rows


if __name__ == "__main__":
    main(run, __doc__)
