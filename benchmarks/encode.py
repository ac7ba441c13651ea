"""Texts and pictures to vectors beside open_clip's CLIP with the same weights, outputs asserted equal first.

`python -m benchmarks.encode --json OUT` writes the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import alternate, captions, main, our_model, peer_model, row
from wordsight.data.tokenize import ClipTokenizer

NUM_TEXTS = 32
NUM_IMAGES = 8
REPEATS = 5
TOLERANCE = 1e-4  # of unit vectors


def measure(name: str, count: int, ours: Callable[[], Tensor], peer: Callable[[], Tensor], must: float, note: str) -> dict:
    """A row of items a second, both sides in turns."""
    with torch.inference_mode():
        difference = (ours() - peer()).abs().max().item()
        assert difference < TOLERANCE, f"{name}: the outputs differ by {difference}"
        best = alternate({"ours": ours, "peer": peer}, REPEATS)
    note = f"one core, fastest of {REPEATS}, batch {count}{note}; outputs differ by at most {difference:.0e}"
    return row(name, count / best["ours"], count / best["peer"], "1/s", must, note, higher_is_better=True)


def run() -> list[dict]:
    """The rows for the table."""
    torch.manual_seed(0)
    rows = []
    tokens = ClipTokenizer.clip()(captions(NUM_TEXTS))
    lengths = tokens.argmax(1) + 1
    pixels = torch.randn(NUM_IMAGES, 3, 224, 224)
    for name in ("ViT-B/32", "RN50"):
        peer = peer_model(name).eval()
        ours = our_model(name, peer).eval()
        if name == "ViT-B/32":
            rows.append(
                measure(
                    "text encoding, ViT-B/32's tower",
                    NUM_TEXTS,
                    lambda m=ours: m.encode_text(tokens),
                    lambda m=peer: m.encode_text(tokens, normalize=True),
                    3.0,
                    f", real captions of {lengths.min()} to {lengths.max()} tokens",
                )
            )
        rows.append(
            measure(
                f"image encoding, {name}",
                NUM_IMAGES,
                lambda m=ours: m.encode_image(pixels),
                lambda m=peer: m.encode_image(pixels, normalize=True),
                1.0,
                "",
            )
        )
    return rows


if __name__ == "__main__":
    main(run, __doc__)
