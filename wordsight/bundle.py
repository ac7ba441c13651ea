"""Load, save, create and convert a model WITH its tokenizer, preprocessing and activation: no wrong numbers silently.

A wordsight folder holds `model.safetensors`, `tokenizer.json` and `wordsight.json` (architecture, activation, preprocessing,
tokenizer, provenance). The layouts are in `interop`; docs/guides/checkpoints.md says what is read and written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import wordsight
from wordsight import catalog
from wordsight.interop import huggingface, open_clip, own
from wordsight.interop.checkpoint import CONFIGS, check_parts, layout_of, read
from wordsight.interop.contents import Contents, read_json, write_json


def load(path_or_name: str | Path, model: str | None = None) -> Any:
    """Load a model ready to use: weights in float32, evaluation mode, with its tokenizer and preprocessing.

    Reads wordsight, open_clip and transformers folders, run folders (the best model), OpenAI's TorchScript archives, state
    dicts and training checkpoints in .pt, .bin or .safetensors. No code of a file is run and nothing is downloaded.

    Args:
        path_or_name: a file, a folder, or a catalogue name whose weights lie in one of the known local places.
        model: the catalogue name of architecture and activation, for files that don't say them; checked against those that do.

    Returns:
        The model. Weights stored as float16 or bfloat16 are widened, which is exact.

    Raises:
        FileNotFoundError: nothing there; says where it looked.
        ValueError: a missing, surplus or misshaped weight, a contradiction in activation, architecture, vocabulary or
            preprocessing, an unknown layout or a hostile file; names it and how to mend it.
    """
    contents = read(path_or_name, model)
    for note in contents.notes:
        warnings.warn(note, stacklevel=2)
    return _build(contents)


def create(name_or_config: Any, seed: int = 0) -> Any:
    """A fresh model with random weights, in evaluation mode, with preprocessing and, for CLIP's vocabulary, its tokenizer.

    Args:
        name_or_config: a catalogue name or a config. A config of another vocabulary gets no tokenizer: set `model.tokenizer`.
        seed: of the weights; the global random state is neither used nor changed.

    Raises:
        ValueError: an unknown name, with the nearest ones.
    """
    config = catalog.find(name_or_config).config if isinstance(name_or_config, str) else name_or_config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        system = catalog.system_class(config)
        model = system(config)
    model.preprocessor, model.tokenizer = system.default_preprocessor(config), system.default_tokenizer(config)
    model.provenance = {"source": f"created by wordsight.create, seed {seed}"}
    return model.eval()


def save(model: Any, folder: str | Path) -> Path:
    """Write a model as a wordsight folder, which `load` reads back bit by bit.

    Args:
        model: with its tokenizer and preprocessor; weights are written in the dtype that they have.
        folder: made if need be; an older wordsight folder there is replaced, other files in it stay.

    Returns:
        The folder.

    Raises:
        ValueError: no tokenizer or preprocessor, or one that does not fit the architecture.
    """
    if model.tokenizer is None or model.preprocessor is None:
        what = "tokenizer" if model.tokenizer is None else "preprocessor"
        raise ValueError(f"the model has no {what}: set model.{what} before saving, so that it can be used rightly later")
    contents = Contents(
        source=Path(folder),
        layout="wordsight",
        tensors={name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        config=model.config,
        tokenizer=model.tokenizer,
        preprocess=model.preprocessor,
        provenance=model.provenance,
    )
    check_parts(contents, model.config)
    return _write(contents, Path(folder), "wordsight")


def convert(src: str | Path, dst: str | Path, to: str = "wordsight", *, model: str | None = None) -> Path:
    """Write a checkpoint in another layout, with everything that makes it load there; the weights keep their dtype, bit by bit.

    Args:
        src: whatever `load` takes.
        dst: the folder to write.
        to: "wordsight", "open_clip" (its `local-dir:` schema) or "huggingface" (transformers' CLIPModel and CLIPProcessor).
        model: as in `load`.

    Returns:
        The folder.

    Raises:
        ValueError: what `load` raises, an unknown layout, or an architecture that the other library does not have (a ResNet in
            transformers).
    """
    if to not in CONFIGS:
        raise ValueError(f"to must be one of {', '.join(CONFIGS)}, got {to!r}")
    contents = read(src, model)
    for note in contents.notes:
        warnings.warn(note, stacklevel=2)
    return _write(contents, Path(dst), to)


def _build(contents: Contents) -> Any:
    """The model of checked contents, which are used up: weights copied to float32, no random number drawn."""
    assert contents.config is not None
    with torch.device("meta"):
        model = catalog.system_class(contents.config)(contents.config)
    state = {}
    for name in list(contents.tensors):  # copied, because what was read may be a map of the file; one at a time, to hold it once
        tensor = contents.tensors.pop(name)
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
        if tensor.dtype == torch.float64:
            warnings.warn(f"{contents.source}: {name} is float64 and was rounded to float32", stacklevel=3)
    model.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a buffer that is no part of the state dict"
    model.tokenizer, model.preprocessor = contents.tokenizer, contents.preprocess
    model.provenance = {"source": str(contents.source), "layout": contents.layout, **(contents.provenance or {})}
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------ writing


def _write(contents: Contents, folder: Path, to: str) -> Path:
    config, tokenizer, preprocess = contents.config, contents.tokenizer, contents.preprocess
    assert config is not None
    assert tokenizer is not None
    assert preprocess is not None
    other = layout_of(folder) if folder.is_dir() else None
    if other not in (None, to):
        raise ValueError(
            f"{folder} holds a model in the layout of {other} ({CONFIGS[other]}): choose another folder, or remove it first"
        )
    write = {"open_clip": open_clip.write_folder, "huggingface": huggingface.write_folder, "wordsight": own.write_folder}[to]
    with _staged(folder, CONFIGS[to]) as staging:
        write(staging, contents.tensors, config, tokenizer, preprocess)
        if to == "wordsight":
            provenance = dict(contents.provenance or {"source": str(contents.source), "layout": contents.layout})
            values = read_json(staging / own.CONFIG)
            write_json(
                staging / own.CONFIG,
                values | {"provenance": provenance | {"wordsight": wordsight.__version__, "torch": torch.__version__}},
            )
    return folder


@contextmanager
def _staged(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder beside `folder` whose files get there together, on the disk before they get their names.

    Without an older `folder` that is one rename. With one, its `marker` (the config, without which it is no model folder) goes
    first and comes back last: a crash in between leaves a folder that can't be mistaken for a model, never a mixture of two.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for path in (*staging.iterdir(), staging):
            _fsync(path)
        if not folder.exists():
            staging.rename(folder)
        else:
            (folder / marker).unlink(missing_ok=True)
            for path in sorted(staging.iterdir(), key=lambda p: p.name == marker):
                os.replace(path, folder / path.name)
            _fsync(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows can't open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
