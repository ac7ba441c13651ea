"""What the model benchmarks share: open_clip's CLIP with the same weights, real captions, timings taken in turns."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wordsight import catalog
from wordsight.data import open_source
from wordsight.interop import openai
from wordsight.models.contrastive.clip import CLIP


def import_open_clip() -> Any:
    """open_clip; its torchvision may be built for another torch, and then lacks two operators."""
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            continue
    import open_clip

    return open_clip


def peer_model(name: str) -> torch.nn.Module:
    """open_clip's CLIP of a catalogue name, with random weights."""
    return import_open_clip().create_model(f"{name.replace('/', '-')}-quickgelu")


def our_model(name: str, peer: torch.nn.Module | None = None) -> CLIP:
    """Our CLIP of a catalogue name, with the peer's weights or random ones."""
    model = CLIP(catalog.find(name).config)
    if peer is not None:
        model.load_state_dict(openai.to_ours(peer.state_dict()))
    return model


def captions(count: int) -> list[str]:
    """Captions of the embedded pictures, from all over its sources: a name and the first line of keywords, in a prompt."""
    source = open_source("sample:train")
    step = len(source) // count
    names = [source[i * step].captions[:2] for i in range(count)]
    return [f"A picture of {', '.join(name)}." for name in names]


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Processor seconds of the fastest of `repeats` calls of each function, called in turns after one warm-up each.

    On one thread, so that they are what a quiet machine's clock would show, whatever else runs beside.
    """
    torch.set_num_threads(1)
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - start)
    return best


def row(
    name: str, ours: float, peer: float, unit: str, must: float | None, note: str = "", *, higher_is_better: bool = False
) -> dict:
    """One row of the table; its ratio is above 1 where we are better."""
    ratio = ours / peer if higher_is_better else peer / ours
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "must": must, "note": note}


def main(run: Callable[[], list[dict]], description: str) -> None:
    """Run a benchmark from the command line: print its rows, write them with `--json OUT`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here")
    out = parser.parse_args().json
    rows = run()
    for r in rows:
        figures = (
            "not measured"
            if r["ours"] is None
            else f"{r['ours']:.4g} {r['unit']}"
            if r["peer"] is None
            else f"{r['ours']:.4g} against {r['peer']:.4g} {r['unit']}, ratio {r['ratio']:.2f}"
        )
        print(f"{r['name']}: {figures}; {r['note']}")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")
