"""What several commands do first: load a model, say what was assumed, put it on a device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

QUICKSTART = "runs/quickstart"
DEVICES = ("auto", "cpu", "cuda", "mps")


def load_model(path_or_name: str, architecture: str | None, device: str) -> Any:
    """The model in evaluation mode on `device`; what `wordsight.load` assumed about it goes to stderr.

    Raises:
        FileNotFoundError: nothing there; the quickstart's folder gets a hint how to make it.
        ValueError: what `wordsight.load` raises, or no such device.
    """
    if path_or_name == QUICKSTART and not Path(path_or_name).exists():
        raise FileNotFoundError(
            f"no model in {QUICKSTART} yet: make it with `wordsight quickstart`, or name another with --model"
        )

    import wordsight
    from wordsight.train.distributed import World, pick_device

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        model = wordsight.load(path_or_name, model=architecture)
    for note in notes:
        click.echo(f"Note: {note.message}", err=True)
    return model.to(pick_device(device, World())).eval()
